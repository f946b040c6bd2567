"""Newton's method on F(w, θ) = 0 with dense Jacobians, which finds the inner solution at each shifted θ.

An inner solver leaves an error in w, and a difference quotient divides it by the step in θ. Newton's method reduces
this error to rounding size, whichever solver is under test.
"""

import jax
import jax.numpy as jnp

from bilevel.conditions import Condition
from bilevel.types import PyTree
from bilevel.verify.flat import Flat, flatten
from bilevel.verify.precision import EPS
from bilevel.verify.programs import kept
from bilevel.verify.references.record import flat_residual

MAX_UNKNOWNS = 400
"""Largest number of unknowns for Newton's method, which solves a dense system in each step and runs anew at each θ."""


def refine(condition: Condition, w: PyTree, theta: PyTree, data: PyTree) -> PyTree | None:
    """Return the solution of F = 0 near ``w``, to rounding.

    Return None for more than ``MAX_UNKNOWNS`` unknowns, or if Newton's method does not converge.
    """
    start = flatten(w)
    if start.vector.size > MAX_UNKNOWNS:
        return None
    flat = _newton_program(condition)(w, theta, data)
    return start.rebuild(flat) if bool(jnp.isfinite(flat).all()) else None


@kept
def _newton_program(condition):
    return jax.jit(lambda w, theta, data: newton(condition, flatten(w), theta, data)[0])


def newton(
    condition: Condition, start: Flat, theta: PyTree, data: PyTree, steps: int = 25
) -> tuple[jax.Array, jax.Array]:
    """Run Newton's method from ``start``; return the solution as a flat vector, and the last step.

    The loop ends at the first step that is at most √eps·(1 + ‖w‖). That step and one more are still taken. Convergence
    is quadratic, so the last step is of rounding size and estimates the error of w. The solution is NaN if ``steps``
    were not enough.
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
