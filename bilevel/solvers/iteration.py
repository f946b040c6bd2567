"""The loop that runs an iterative solver: a fixed number of steps, or steps until ‖F‖ ≤ tol."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.solvers.protocol import IterativeSolver, report
from bilevel.types import PyTree, Solution


def iterate(solver: IterativeSolver, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
    """Run an iterative solver for ``max_steps`` steps, or for fewer if it has a ``tol`` that the residual meets."""
    solver.check(condition)

    def residual(w: PyTree) -> PyTree:
        return condition.residual(w, theta, data)

    if solver.tol is not None:
        (w, memory), last, steps = until_converged(
            solver.update, lambda state: residual(state[0]), solver.start(init), solver.max_steps, solver.tol
        )
        return with_memory(report(last, w, steps, solver.tol), solver, memory)

    def advance(_: jax.Array, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        return solver.update(state, residual(state[0]))

    w, memory = jax.lax.fori_loop(0, solver.max_steps, advance, solver.start(init))
    return with_memory(report(residual(w), w, steps=solver.max_steps), solver, memory)


def with_memory(solution: Solution, solver: IterativeSolver, memory: PyTree) -> Solution:
    """Return the solution with the memory of its run if the solver was resumed, else unchanged."""
    return solution if getattr(solver, "memory", None) is None else replace(solution, memory=memory)


def until_converged(
    update: Callable[[PyTree, PyTree], PyTree],
    residual: Callable[[PyTree], PyTree],
    state: PyTree,
    max_steps: int,
    tol: float | None,
) -> tuple[PyTree, PyTree, jax.Array]:
    """Update a state until ‖F‖ ≤ tol, at most ``max_steps`` times.

    Args:
        update: ``update(state, F)`` returns the next state.
        residual: returns F for a state.
        state: the first state.
        max_steps: the budget.
        tol: the tolerance for ‖F‖. With None, only a residual that is zero or NaN ends the loop before ``max_steps``
            updates. A NaN residual ends it with any ``tol``.

    Returns:
        the last state, its F, and the number of updates.
    """

    def unfinished(carry: Any) -> jax.Array:
        _, current_residual, steps = carry
        return (steps < max_steps) & (tree.norm(current_residual) > (tol or 0.0))

    def advance(carry: Any) -> Any:
        state, current_residual, steps = carry
        state = update(state, current_residual)
        return state, residual(state), steps + 1

    return jax.lax.while_loop(unfinished, advance, (state, residual(state), jnp.int32(0)))
