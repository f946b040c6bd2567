"""The inner solver Jaxopt, which runs a solver of the library jaxopt."""

import functools
from dataclasses import dataclass

import jax

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.solvers.protocol import report
from bilevel.types import PyTree, Solution


@dataclass(frozen=True, init=False)
class Jaxopt:
    """A solver of jaxopt, for the conditions that it can solve.

    ===================================================  ================================================
    condition                                            jaxopt solvers
    ===================================================  ================================================
    Stationary, Proximal                                 GradientDescent, LBFGS, BFGS, NonlinearCG, ArmijoSGD,
                                                         PolyakSGD, OptaxSolver, ScipyMinimize
    LeastSquares                                         LevenbergMarquardt, GaussNewton, ScipyLeastSquares, and
                                                         the solvers of Stationary
    Root                                                 Broyden, LevenbergMarquardt, GaussNewton, ScipyRootFinding,
                                                         ScipyLeastSquares
    Root of a scalar w                                   also Bisection
    FixedPoint                                           FixedPointIteration, AndersonAcceleration
    Projected                                            ProjectedGradient, MirrorDescent
    Projected onto a box                                 also LBFGSB and ScipyBoundedMinimize
    Projected onto a box with a quadratic objective      also BoxCDQP
    ProximalGradient                                     ProximalGradient
    ProximalGradient with a CompositeLinearFunction of   also BlockCoordinateDescent
    jaxopt and the same prox for each entry of a vector
    w, or for each row of a matrix w
    KKT with a quadratic objective, affine constraints   OSQP, BoxOSQP
    the same without inequalities                        also EqualityConstrainedQP
    ===================================================  ================================================

    The bounds of a box are computed from its projection. MirrorDescent takes projected gradient steps unless its option
    ``projection_grad(w, gradient, step, (theta, data))`` defines other ones. The SciPy solvers cannot be traced: find w
    with :func:`solve` first, and differentiate at that w.

    To stop the solver, jaxopt compares ``tol`` with an error measure of its own. The status compares ``tol`` with the
    norm of the condition's true residual. It is CONVERGED if the norm is at most ``tol``. If the norm is larger, the
    status is STOPPED if the solver stopped before its budget ended, and MAX_STEPS otherwise. For some conditions the
    two measures differ by a factor, such as the ``step_size`` of :class:`Projected`. For a message about a status of
    STOPPED or MAX_STEPS, :func:`value_and_hypergradient` and :func:`minimize` may run the solver again, to find a
    remedy. They try smaller values of ``tol`` after STOPPED, and a fixed ``stepsize`` if the solver has this option and
    it is not set. The message names the first options with which the true residual is at most the given ``tol``.

    Args:
        solver: the class, or its name (``"LBFGS"``). With a name, jaxopt is imported when the solver is called.
        options: the options of its constructor, such as ``maxiter``, ``tol`` and ``stepsize``. The options
            ``implicit_diff`` and ``implicit_diff_solve`` have no effect, because this library differentiates the
            solution. Options that are functions of the problem, such as ``fun``, come from the condition.

    Raises:
        TypeError: for an instance in place of a class.
        ValueError: when called, for a name that jaxopt does not have, and for a solver that cannot solve the condition.
            The message lists those that can. It is also raised for an option that sets a function of the condition,
            such as ``fun``, or describes it, such as ``has_aux=True``, and for a SciPy solver under a trace.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2))
        >>> solution = Jaxopt("LBFGS", maxiter=20, tol=1e-4)(condition, jnp.zeros(2), jnp.ones(2), None)
        >>> [round(float(entry), 3) for entry in solution.w]
        [1.0, 1.0]
    """

    solver: type | str
    options: tuple[tuple[str, object], ...]

    def __init__(self, solver: type | str, **options: object):
        if not isinstance(solver, type | str):
            is_partial = isinstance(solver, functools.partial)
            name = getattr(solver.func, "__name__", "LBFGS") if is_partial else type(solver).__name__
            got = f"a functools.partial of {name}" if is_partial else f"{name}(…), an instance"
            raise TypeError(
                f"Jaxopt takes a class and makes the solver from the condition, got {got}: use "
                f'Jaxopt("{name}", …) with its options, such as maxiter and tol'
            )
        object.__setattr__(self, "solver", solver)
        object.__setattr__(self, "options", tuple(options.items()))

    @property
    def traceable(self) -> bool:
        """Whether JAX can trace the solver. JAX cannot trace a solver that runs SciPy."""
        names = [self.solver] if isinstance(self.solver, str) else [base.__name__ for base in self.solver.__mro__]
        return not any(name.startswith("Scipy") for name in names)

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        from bilevel._jaxopt import adapters  # imports jaxopt

        init = tree.arrays(init)
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its arithmetic
            w, steps, stopped = adapters.run_solver(self.solver, dict(self.options), condition, init, theta, data)
            w = jax.tree.map(lambda leaf, start: leaf.astype(start.dtype), w, init)
        return report(condition.residual(w, theta, data), w, steps, self.tol, stopped)

    @property
    def accepted_options(self) -> dict[str, object]:
        """The options of the solver's constructor with their default values."""
        from bilevel._jaxopt import library  # imports jaxopt

        return library.option_defaults(self.solver)

    @property
    def tol(self) -> float | None:
        """The tolerance; None if the solver has none, or takes all its steps because the tolerance is 0."""
        tol = dict(self.options).get("tol", self.accepted_options.get("tol"))
        return float(tol) if tol else None  # type: ignore[arg-type]
