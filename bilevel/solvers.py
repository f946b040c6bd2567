"""Inner solvers: how w*(θ) is found.

A solver is a frozen value, called as ``solver(condition, init, theta, data) -> Solution``. An iterative one
also shows its single step (``start``, ``step``), from which a method that differentiates through the
iterations builds its own loop: the numbers are then those of the solver, step for step.

Any function with the same arguments that returns w, or a Solution, is a solver too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.conditions import Condition
from bilevel.types import PyTree, Solution, Status

InnerSolver = Callable[[Condition, PyTree, PyTree, PyTree], PyTree | Solution]


@runtime_checkable
class IterativeSolver(Protocol):
    """A solver that can be taken apart into at most ``steps`` updates of a state ``(w, memory)`` by the residual."""

    steps: int
    tol: float | None

    def check(self, condition: Condition) -> None:
        """Raise ValueError for a condition that these updates cannot solve."""
        ...

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]: ...

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]: ...

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution: ...


@dataclass(frozen=True)
class Optax:
    """Descent on the inner objective with any optax transformation.

    Args:
        transformation: an ``optax.GradientTransformation``; it is given F, the inner gradient.
        steps: the budget, in gradients.
        tol: stop at ‖F‖ ≤ tol; None spends the budget, which is then no failure. With a tol the loop's
            length is known only at run time, so its iterations cannot be differentiated backwards.

    Raises:
        ValueError: for a negative budget or tol, and, when called, for a condition that is no gradient.
    """

    transformation: optax.GradientTransformation
    steps: int
    tol: float | None = None

    def __post_init__(self):
        _check_budget("Optax", self.steps, self.tol)

    def check(self, condition: Condition) -> None:
        _check_descends("Optax", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        return init, self.transformation.init(init)

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        w, memory = state
        updates, memory = self.transformation.update(residual, memory, w)
        return optax.apply_updates(w, updates), memory

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


@dataclass(frozen=True)
class GradientDescent:
    """w ← w − step_size · F(w, θ, data), from ``init``.

    Args:
        step_size: the rate; it converges below 2 / (largest eigenvalue of ∂F/∂w).
        steps: the budget, in gradients.
        tol: stop at ‖F‖ ≤ tol; None spends the budget, which is then no failure.
        momentum: Polyak's heavy ball: m ← momentum·m + F, w ← w − step_size·m.

    Raises:
        ValueError: for a step size that is not positive, a momentum outside [0, 1), a negative budget or
            tol, and, when called, for a condition that is no gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> solution = GradientDescent(0.5, steps=2)(condition, jnp.float32(0.0), jnp.float32(1.0), None)
        >>> float(solution.w), float(solution.residual_norm)
        (0.75, 0.25)
    """

    step_size: float
    steps: int
    tol: float | None = None
    momentum: float = 0.0

    def __post_init__(self):
        _check_budget("GradientDescent", self.steps, self.tol)
        if not self.step_size > 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                "GradientDescent needs a step_size above 0 and a momentum in [0, 1), "
                f"got {self.step_size} and {self.momentum}"
            )

    def check(self, condition: Condition) -> None:
        _check_descends("GradientDescent", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        return init, jax.tree.map(jnp.zeros_like, init) if self.momentum else None

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        w, memory = state
        if self.momentum:
            residual = memory = tree.add(tree.scale(self.momentum, memory), residual)
        return tree.subtract(w, tree.scale(self.step_size, residual)), memory

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


def iterate(solver: IterativeSolver, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
    """All steps of an iterative solver: a loop of fixed length without ``tol``, until ‖F‖ ≤ tol with it."""
    solver.check(condition)

    def residual(w):
        return condition.residual(w, theta, data)

    if solver.tol is None:
        state = jax.lax.fori_loop(0, solver.steps, lambda _, s: solver.update(s, residual(s[0])), solver.start(init))
        return report(residual(state[0]), state[0], steps=solver.steps)
    return _until_converged(solver, residual, init)


def _until_converged(solver, residual, init):
    def unfinished(carry):
        _, slope, steps = carry
        return (steps < solver.steps) & (tree.norm(slope) > solver.tol)

    def advance(carry):
        state, slope, steps = carry
        state = solver.update(state, slope)
        return state, residual(state[0]), steps + 1

    (w, _), slope, steps = jax.lax.while_loop(unfinished, advance, (solver.start(init), residual(init), jnp.int32(0)))
    return report(slope, w, steps, solver.tol)


def report(residual: PyTree, w: PyTree, steps: int | jax.Array, tol: float | None = None) -> Solution:
    """A Solution from the true residual F(w, θ), and the status that follows from it."""
    residual_norm = tree.norm(jax.lax.stop_gradient(residual))
    if tol is None:
        status = jnp.int32(Status.BUDGET_USED)
    else:
        status = jnp.where(residual_norm <= tol, jnp.int32(Status.CONVERGED), jnp.int32(Status.MAX_STEPS))
    status = jnp.where(jnp.isfinite(residual_norm), status, jnp.int32(Status.NONFINITE))
    return Solution(w, residual_norm, jnp.asarray(steps, jnp.int32), status)


def solve(solver: InnerSolver, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
    """Run any solver; what returns a bare w is given its residual here."""
    found = solver(condition, init, theta, data)
    if isinstance(found, Solution):
        return found
    return report(condition.residual(found, theta, data), found, steps=0)


def _check_budget(name, steps, tol):
    if steps < 0 or (tol is not None and not tol >= 0):
        raise ValueError(f"{name} needs steps and tol of at least 0, got {steps} and {tol}")


def _check_descends(name, condition):
    if not condition.symmetric:
        raise ValueError(
            f"{name} follows the gradient of an objective, and {type(condition).__name__} is not one: use a "
            "condition that is (Stationary, Proximal), or a function (condition, init, theta, data) -> w"
        )
