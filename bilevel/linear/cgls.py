"""Conjugate gradients on the normal equations in the form CGLS: the recursion of ``NormalCG``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear.system import Recursion, limit_of_rounding, start_of
from bilevel.types import MatVec


class _State(NamedTuple):
    x: jax.Array
    r: jax.Array
    p: jax.Array
    rho: jax.Array
    slope: jax.Array
    iterations: jax.Array
    norm: jax.Array
    null: jax.Array
    going: jax.Array


def cgls(
    matvec: MatVec,
    b: jax.Array,
    init: jax.Array | None,
    max_steps: int,
    tol: float,
    eps: float,
    preconditioner: MatVec,
) -> Recursion:
    """Solve AᵀAx = Aᵀb for a vector b by conjugate gradients that never form AᵀA and update r = b − Ax.

    The recursion stops at ‖r‖ ≤ tol·‖b‖, and at ‖r‖ ≤ eps·(‖b‖ + ‖A‖‖x‖), the size of the rounding errors in b − Ax. It
    also stops at a direction p with Ap = 0 up to rounding, and at an r ≠ 0 with Aᵀr = 0 up to rounding. Either of these
    two events shows that A is singular. The directions are divided by the slope
    ‖Aᵀr‖, so that no number is of the order of ‖A‖² and A may have any scale.

    Source: Hestenes and Stiefel (1952), section 10; Björck, Elfving, Strakoš (1998) for the rounding errors.
    """
    transpose = jax.linear_transpose(matvec, b)
    size = tree.norm(b)

    def gradient(r):
        """With s = Aᵀr, return the slope ‖s‖, the vector z = M⁻¹s / ‖s‖, and the scalar ⟨s, z⟩ / ‖s‖."""
        (s,) = transpose(r)
        slope = tree.norm(s)
        s = s / tree.safe_divisor(slope)
        z = preconditioner(s)
        return slope, z, tree.vdot(s, z)

    def unfinished(x, r, slope, norm, iterations):
        """Return whether to go on, and whether the slope is zero up to rounding although r is not."""
        left = tree.norm(r)
        above = left > jnp.maximum(tol * size, limit_of_rounding(eps, size, norm, x))
        flat = above & (slope <= 4 * eps * norm * left)
        return (iterations < max_steps) & above & ~flat, flat

    def advance(state: _State) -> _State:
        product = matvec(state.p)
        length, product_length = tree.norm(state.p), tree.norm(product)
        norm = jnp.maximum(state.norm, product_length / tree.safe_divisor(length))
        null = product_length <= 4 * eps * norm * length
        alpha = state.rho * (state.slope / tree.safe_divisor(product_length)) / tree.safe_divisor(product_length)
        alpha = jnp.where(null, jnp.zeros_like(alpha), alpha)
        x, r = state.x + alpha * state.p, state.r - alpha * product
        slope, z, rho = gradient(r)
        norm = jnp.maximum(norm, slope / tree.safe_divisor(tree.norm(r)))
        p = z + rho / state.rho * (slope / state.slope) * state.p
        iterations = state.iterations + 1
        going, flat = unfinished(x, r, slope, norm, iterations)
        return _State(x, r, p, rho, slope, iterations, norm, state.null | null | flat, going & ~null)

    x, r = start_of(matvec, b, init)
    slope, z, rho = gradient(r)
    norm, iterations = slope / tree.safe_divisor(tree.norm(r)), jnp.int32(0)
    going, flat = unfinished(x, r, slope, norm, iterations)
    start = tree.match_varying_axes(_State(x, r, z, rho, slope, iterations, norm, flat, going))[0]
    state = jax.lax.while_loop(lambda state: state.going, advance, start)
    return Recursion(state.x, state.iterations, state.norm, null=state.null, broke=jnp.zeros_like(state.null))
