"""Newton's method on F(w, θ) = 0, with dense Jacobians: it follows the solution while θ moves.

A solver stops short of the solution, and a difference quotient divides that error by the step. Newton's method removes
the error to rounding, whatever solver is under test.
"""

import jax
import jax.numpy as jnp

from bilevel.conditions import Condition
from bilevel.types import PyTree
from bilevel.verify.flat import Flat, flatten
from bilevel.verify.precision import EPS
from bilevel.verify.references.record import flat_residual

MAX_UNKNOWNS = 400
"""Unknowns up to which Newton's method is used: each of its steps is a dense solve, at every θ that is asked for."""


def refine(condition: Condition, w: PyTree, theta: PyTree, data: PyTree) -> PyTree | None:
    """Return the solution of F = 0 near ``w``, to rounding, or None if Newton's method does not find it."""
    start = flatten(w)
    if start.vector.size > MAX_UNKNOWNS:
        return None
    flat, _ = jax.jit(lambda theta, data: newton(condition, start, theta, data))(theta, data)
    return start.rebuild(flat) if bool(jnp.isfinite(flat).all()) else None


def newton(
    condition: Condition, start: Flat, theta: PyTree, data: PyTree, steps: int = 25
) -> tuple[jax.Array, jax.Array]:
    """Run Newton's method from ``start``; return the solution as a flat vector, and the last step.

    Once a step is below √eps of w, that step and one more are taken. Convergence is quadratic, so the last step is of
    rounding size and estimates the error of w. The solution is NaN if ``steps`` were not enough.
    """
    residual = flat_residual(condition, start, theta, data)

    def newton_step(flat):
        return -jnp.linalg.solve(jax.jacfwd(residual)(flat), residual(flat))

    def unfinished(carry):
        flat, change, count = carry
        return (count < steps) & (jnp.linalg.norm(change) > EPS**0.5 * (1 + jnp.linalg.norm(flat)))

    def advance(carry):
        flat, change, count = carry
        return flat + change, newton_step(flat + change), count + 1

    flat, change, count = jax.lax.while_loop(unfinished, advance, (start.vector, newton_step(start.vector), 0))
    flat = flat + change
    change = newton_step(flat)
    return jnp.where(count < steps, flat + change, jnp.nan), change
