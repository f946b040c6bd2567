"""The loop that runs an iterative solver: a fixed number of steps, or steps until ‖F‖ ≤ tol."""

from collections.abc import Callable
from dataclasses import replace

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
        return _until_converged(solver, solver.tol, residual, init)

    def advance(_: jax.Array, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        return solver.update(state, residual(state[0]))

    w, memory = jax.lax.fori_loop(0, solver.max_steps, advance, solver.start(init))
    return with_memory(report(residual(w), w, steps=solver.max_steps), solver, memory)


def with_memory(solution: Solution, solver: IterativeSolver, memory: PyTree) -> Solution:
    """Return the solution of a resumed solver with the memory of its run. Any other solution has none."""
    return solution if getattr(solver, "memory", None) is None else replace(solution, memory=memory)


def _until_converged(
    solver: IterativeSolver, tol: float, residual: Callable[[PyTree], PyTree], init: PyTree
) -> Solution:
    def unfinished(carry):
        _, current_residual, steps = carry
        return (steps < solver.max_steps) & (tree.norm(current_residual) > tol)

    def advance(carry):
        state, current_residual, steps = carry
        state = solver.update(state, current_residual)
        return state, residual(state[0]), steps + 1

    start = solver.start(init), residual(init), jnp.int32(0)
    (w, memory), last_residual, steps = jax.lax.while_loop(unfinished, advance, start)
    return with_memory(report(last_residual, w, steps, tol), solver, memory)
