"""The protocol of an inner solver, its report, and the checks that solvers share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.conditions import Projected, ProximalGradient, Root
from bilevel.conditions.protocol import Condition, GradientCondition, check_condition_type, check_signature, is_gradient
from bilevel.start import Start, StartFunction, choose_start, starting_point
from bilevel.types import PyTree, Solution, Status

InnerSolver = Callable[[Condition, PyTree, PyTree, PyTree], PyTree | Solution]
"""``solver(condition, init, theta, data) -> w``, or a :class:`Solution`; any such function is an inner solver."""


@runtime_checkable
class IterativeSolver(Protocol):
    """A solver that takes at most ``max_steps`` steps. Each updates the state ``(w, memory)`` by the residual at w."""

    @property
    def max_steps(self) -> int: ...

    @property
    def tol(self) -> float | None: ...

    def check(self, condition: Condition) -> None:
        """Raise ValueError for a condition that these updates cannot solve."""
        ...

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]: ...

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]: ...

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution: ...


@runtime_checkable
class ResumableSolver(IterativeSolver, Protocol):
    """An iterative solver whose next run may go on from the memory of the last one.

    :func:`minimize` carries the memory from one outer step to the next. A run of a resumed solver returns the memory
    in ``Solution.memory``.
    """

    def resumed(self, memory: PyTree) -> InnerSolver: ...


def report(
    residual: PyTree,
    w: PyTree,
    steps: int | jax.Array,
    tol: float | None = None,
    stopped: bool | jax.Array = False,
) -> Solution:
    """Return a Solution with the status that follows from the true residual F(w, θ).

    Args:
        residual: F(w, θ).
        w: the inner variables found.
        steps: the steps taken.
        tol: the tolerance for ‖F(w, θ)‖; None for the status BUDGET_USED.
        stopped: whether the solver stopped by itself. If the residual is above ``tol``, the status is STOPPED for True
            and MAX_STEPS for False.
    """
    residual_norm = tree.norm(jax.lax.stop_gradient(residual))
    if tol is None:
        status = jnp.int32(Status.BUDGET_USED)
    else:
        failure = jnp.where(stopped, jnp.int32(Status.STOPPED), jnp.int32(Status.MAX_STEPS))
        status = jnp.where(residual_norm <= tol, jnp.int32(Status.CONVERGED), failure)
    status = jnp.where(jnp.isfinite(residual_norm), status, jnp.int32(Status.NONFINITE))
    return Solution(w, residual_norm, jnp.asarray(steps, jnp.int32), status)


def new_memory(solver: InnerSolver, w: PyTree) -> PyTree:
    """Return the memory of a solver before its first step, or None for a solver that cannot be resumed."""
    return solver.start(w)[1] if isinstance(solver, ResumableSolver) else None


def resumed(solver: InnerSolver, memory: PyTree) -> InnerSolver:
    """Return the solver that goes on from the ``memory`` of an earlier run.

    The solver is returned unchanged if ``memory`` is None, or if the solver cannot be resumed.
    """
    return solver.resumed(memory) if memory is not None and isinstance(solver, ResumableSolver) else solver


def with_residual(solution: Solution, solver: InnerSolver, residual: PyTree) -> Solution:
    """Return the solution with a new report, made from a residual that the caller has computed.

    The compiler then removes the solver's own last evaluation of the residual, which saves one gradient. This is done
    only for an iterative solver without ``tol``. The solution of any other solver is returned unchanged.
    """
    if isinstance(solver, IterativeSolver) and solver.tol is None:
        return replace(report(residual, solution.w, solution.steps), memory=solution.memory)
    return solution


def solve(
    solver: InnerSolver,
    condition: Condition,
    init: Start,
    theta: PyTree,
    data: PyTree,
    *,
    start: StartFunction | None = None,
) -> Solution:
    """Run any inner solver, and compute the residual if the solver returned w alone.

    Outside of ``jit``, a solver of this library is compiled once for each condition and each set of shapes and dtypes.
    It is not compiled if it runs SciPy, or if the solver or the condition cannot be hashed. A function that is no
    solver of this library is called without compilation, because JAX may not be able to trace it.

    Args:
        solver: ``solver(condition, init, theta, data)``.
        condition: what holds at the solution.
        init: where the solver starts, a pytree like w; None with ``start``. A function, a method or a
            ``functools.partial`` is taken as ``start``.
        theta: outer variables.
        data: any pytree.
        start: in place of ``init``, a function ``start(theta, data)`` that returns a pytree like w.

    Raises:
        ValueError: for a solver that returns a tree whose structure or shapes are not those of ``init``, and for a
            solver that cannot solve the condition.
        TypeError: if neither or both of init and start are given, for a leaf of θ, init or data that is neither an
            array nor a number, for a complex leaf of θ, for a leaf of init that is not floating point, for a condition
            without a residual, for a solver that does not take these four arguments, and for a class in place of an
            instance.
    """
    check_condition_type("solve", condition)
    check_solver("solve", solver)
    theta, data = tree.real_arrays(theta, "theta"), tree.arrays(data, "data")
    init = starting_point(choose_start(init, start), theta, data)
    run = _compiled_run if _is_compilable(solver, condition, (init, theta, data)) else _run
    found = run(solver, condition, init, theta, data)
    if isinstance(found, Solution):
        return replace(found, w=_like_start(found.w, init))
    w = _like_start(found, init)
    return report(condition.residual(w, theta, data), w, steps=0)


def _run(solver: InnerSolver, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> PyTree | Solution:
    return solver(condition, init, theta, data)


_compiled_run = jax.jit(_run, static_argnames=("solver", "condition"))


def _is_compilable(solver: InnerSolver, condition: Condition, arguments: PyTree) -> bool:
    """Return whether to compile the call of a solver.

    That is True if JAX can trace the solver, if the solver and the condition can be hashed, and if no argument is
    traced already.
    """
    if not getattr(solver, "traceable", False) or tree.is_traced(arguments):
        return False
    try:
        hash((solver, condition))
    except TypeError:  # a field may be an array
        return False
    return True


def _like_start(w: PyTree, init: PyTree) -> PyTree:
    """Return w in the dtypes of ``init``, or raise ValueError if w is another tree or has other shapes."""
    if jax.tree.structure(w) != jax.tree.structure(init) or tree.shapes(w) != tree.shapes(init):
        got, expected = (tree.shapes_for_message(variables) for variables in (w, init))
        raise ValueError(
            f"an inner solver returns w, a pytree like init of shapes {expected}, or a bl.Solution that holds one; "
            f"got shapes {got}: return w without further outputs, and give init the shapes of the solution"
        )
    return tree.like(tree.arrays(w), tree.arrays(init))


def check_solver(owner: str, solver: InnerSolver) -> None:
    """Raise TypeError for something that cannot be called as an inner solver, such as a class of solvers."""
    check_signature(owner, "solver", solver, "condition", "init", "theta", "data")


def check_budget(name: str, max_steps: int, tol: float | None) -> None:
    """Raise ValueError for a negative budget or tolerance."""
    if max_steps < 0 or (tol is not None and not tol >= 0):
        raise ValueError(f"{name} needs max_steps and tol of at least 0, got {max_steps} and {tol}")


def check_gradient(name: str, condition: Condition) -> GradientCondition:
    """Return the condition, or raise ValueError if its residual is not the gradient of an objective."""
    if is_gradient(condition):
        return condition
    if isinstance(condition, Projected | ProximalGradient):
        remedy = "FISTA, FixedPointIteration, Anderson"
    elif hasattr(condition, "mapping"):
        remedy = "FixedPointIteration, Anderson"
    elif isinstance(condition, Root):
        remedy = 'LevenbergMarquardt, GaussNewton, Jaxopt("Broyden")'
    else:
        remedy = "a fitting Jaxopt solver"
    raise ValueError(
        f"{name} needs a condition that is the gradient of an objective, and {type(condition).__name__} is not: use "
        f"Stationary, Proximal or LeastSquares, or solve it by {remedy} or by a function "
        "(condition, init, theta, data) -> w"
    )


def check_mapping(name: str, condition: Condition) -> None:
    """Raise ValueError for a condition without a mapping."""
    if not hasattr(condition, "mapping"):
        raise ValueError(
            f"{name} repeats a mapping, and {type(condition).__name__} has no mapping: use FixedPoint, "
            "Projected or ProximalGradient as the condition. Or use another solver: GradientDescent, Optax or "
            "HessianFree for Stationary, Proximal and LeastSquares, LevenbergMarquardt or GaussNewton for LeastSquares "
            "and Root, or a function (condition, init, theta, data) -> w for any condition"
        )
