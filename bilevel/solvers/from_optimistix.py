"""The inner solver Optimistix, which runs a solver of the library Optimistix."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.solvers.protocol import check_budget, report
from bilevel.types import PyTree, Solution, Status

# _FITTING has an entry for each kind of condition. Each key is the name of an attribute. The kind of a condition is the
# first key of _FITTING, from the top, whose attribute the condition has. The entry lists the classes of Optimistix that
# solve this kind. For each class it names the function of Optimistix that runs the solver, and the method of the
# condition that this function is given.
_OF_RESIDUAL = {
    "AbstractRootFinder": ("root_find", "residual"),
    "AbstractLeastSquaresSolver": ("root_find", "residual"),
    "AbstractMinimiser": ("root_find", "residual"),  # Optimistix then minimises solver.norm of the residual
}
_OF_MAPPING = {"AbstractFixedPointSolver": ("fixed_point", "mapping")}
_OF_OBJECTIVE = {"AbstractMinimiser": ("minimise", "potential")}
_FITTING = {
    "residuals": {"AbstractLeastSquaresSolver": ("least_squares", "residuals")} | _OF_OBJECTIVE,
    "potential": _OF_OBJECTIVE,
    "prox": _OF_MAPPING,
    "projection": _OF_MAPPING,
    "mapping": _OF_MAPPING | _OF_RESIDUAL,
    "residual": _OF_RESIDUAL,
}
_EXAMPLES = {
    "AbstractRootFinder": "a root finder (Newton, Chord)",
    "AbstractLeastSquaresSolver": "a solver of least squares (LevenbergMarquardt, GaussNewton, Dogleg)",
    "AbstractFixedPointSolver": "FixedPointIteration",
    "AbstractMinimiser": "a minimiser (BFGS, LBFGS, NonlinearCG, GradientDescent, OptaxMinimiser, NelderMead)",
}


@dataclass(frozen=True)
class Optimistix:
    """A solver of Optimistix, for the conditions that it can solve. Needs ``pip install optimistix``.

    =======================================  ==================================================================
    condition                                solvers of Optimistix
    =======================================  ==================================================================
    Stationary, Proximal                     minimisers: BFGS, LBFGS, NonlinearCG, GradientDescent, OptaxMinimiser, …
    LeastSquares                             solvers of least squares, which get its residuals: LevenbergMarquardt,
                                             GaussNewton, Dogleg, …; and minimisers, which get ½‖r‖²
    Root, KKT                                root finders: Newton, Chord; solvers of least squares; and minimisers,
                                             which get the residual's ``norm``, a field of the solver
    FixedPoint                               FixedPointIteration; and all of Root
    Projected, ProximalGradient              FixedPointIteration
    =======================================  ==================================================================

    w is raveled into one vector of JAX's default dtype. The functions of the condition get w in its own dtypes. The
    solver stops by its own ``rtol`` and ``atol``.

    With ``tol``, the status is CONVERGED if the norm of the condition's true residual is at most ``tol``. If the norm
    is larger, the status is STOPPED where Optimistix met its own criterion, MAX_STEPS where its budget ended, and
    BREAKDOWN where it reports another failure. Without ``tol``, the status is BREAKDOWN where Optimistix reports a
    failure other than the end of the budget, and BUDGET_USED otherwise. A residual that is not finite has the status
    NONFINITE.

    Args:
        solver: an instance of a solver of Optimistix, such as ``optimistix.BFGS(rtol=1e-6, atol=1e-6)``.
        max_steps: the budget, in steps of the solver of Optimistix.
        tol: the tolerance for the norm of the condition's residual. It decides the status only: the solver stops by its
            own ``rtol`` and ``atol``.

    Raises:
        ImportError: if Optimistix is not installed.
        TypeError: for a solver that is not an instance of a solver of Optimistix.
        ValueError: for a negative budget or tol, for Bisection and GoldenSearch, which need bounds of w, and, when
            called, for a solver that cannot solve the condition. The message lists those that can.

    Example:
        >>> import jax.numpy as jnp
        >>> import optimistix
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2))
        >>> solver = Optimistix(optimistix.BFGS(rtol=1e-5, atol=1e-5), tol=1e-4)
        >>> solution = solver(condition, jnp.zeros(2), jnp.ones(2), None)
        >>> [round(float(entry), 3) for entry in solution.w], Status(int(solution.status)).name
        ([1.0, 1.0], 'CONVERGED')
    """

    solver: Any
    max_steps: int = 256
    tol: float | None = None

    traceable = True

    def __post_init__(self) -> None:
        optimistix = _import_optimistix()
        if not isinstance(self.solver, tuple(getattr(optimistix, family) for family in _EXAMPLES)):
            raise TypeError(
                "Optimistix takes an instance of a solver of optimistix, such as optimistix.BFGS(rtol=1e-6, "
                f"atol=1e-6), got {self.solver!r}"
            )
        if isinstance(self.solver, optimistix.Bisection | optimistix.GoldenSearch):
            raise ValueError(
                f"optimistix.{type(self.solver).__name__} needs bounds of w, which no condition has: use Newton for a "
                "root and BFGS for a minimum"
            )
        check_budget("Optimistix", self.max_steps, self.tol)

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        optimistix = _import_optimistix()
        runner, method = self._adapter(optimistix, condition)
        function, init = getattr(condition, method), tree.arrays(init)
        start, unravel = ravel_pytree(tree.widened(init))
        dtype = start.dtype
        # Several solvers make numbers of JAX's default dtype, so that their loop fails in a narrower one.
        start = start.astype(float)

        def as_w(x: jax.Array) -> PyTree:
            return tree.like(unravel(x.astype(dtype)), init)

        def flat_function(x: jax.Array, _: None) -> jax.Array:
            value = function(as_w(x), theta, data)
            return (value if method == "potential" else ravel_pytree(tree.widened(value))[0]).astype(start.dtype)

        with jax.numpy_dtype_promotion("standard"):  # Optimistix mixes dtypes in its arithmetic
            found = getattr(optimistix, runner)(
                flat_function, self.solver, start, max_steps=self.max_steps, adjoint=_NO_ADJOINT, throw=False
            )
        w = as_w(found.value)
        met = found.result == optimistix.RESULTS.successful
        out_of_steps = found.result == optimistix.RESULTS.nonlinear_max_steps_reached
        solution = report(condition.residual(w, theta, data), w, found.stats["num_steps"], self.tol, met)
        unsolved = (solution.status != int(Status.CONVERGED)) & ~met & ~out_of_steps
        worst = jnp.maximum(solution.status, jnp.int32(Status.BREAKDOWN))
        return replace(solution, status=jnp.where(unsolved, worst, solution.status))

    def _adapter(self, optimistix: Any, condition: Condition) -> tuple[str, str]:
        """Return the function of Optimistix that runs the solver, and the method of the condition that it gets."""
        fitting = _FITTING[next(name for name in _FITTING if hasattr(condition, name))]
        for family, adapter in fitting.items():
            if isinstance(self.solver, getattr(optimistix, family)):
                return adapter
        raise ValueError(
            f"optimistix.{type(self.solver).__name__} does not solve {type(condition).__name__}: use "
            f"{', or '.join(_EXAMPLES[family] for family in fitting)}, or a function (condition, init, theta, data) -> "
            "w"
        )


class _NoAdjoint:
    """An ``adjoint`` for Optimistix that attaches no derivative, because this library differentiates the solution.

    JAX can still differentiate the loop itself in forward mode, as :class:`ForwardUnrolled` does.
    """

    def apply(self, run: Callable[[Any], PyTree], rewrite: object, inputs: tuple, tags: object) -> PyTree:
        from equinox.internal import while_loop

        return run((*inputs, partial(while_loop, kind="lax")))


_NO_ADJOINT = _NoAdjoint()


def _import_optimistix() -> Any:
    try:
        import optimistix
    except ImportError as error:
        raise ImportError("bl.Optimistix needs the package optimistix: pip install optimistix") from error
    return optimistix
