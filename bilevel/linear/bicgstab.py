"""Stabilised biconjugate gradients: the recursion of ``BiCGStab``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear.system import Recursion, limit_of_rounding, start_of
from bilevel.types import MatVec


class _State(NamedTuple):
    """The state of the recursion. The names x, r, p, v, ρ, α and ω are those of van der Vorst (1992).

    Attributes:
        shadow: the shadow residual, which is the residual at the start or at the last restart.
        best: the iterate with the smallest recursive residual so far.
        least: the norm of that residual.
        iterations: iterations taken.
        norm: the largest ‖Au‖ / ‖u‖ over the vectors u that were multiplied by A, a lower bound of ‖A‖.
        fresh: whether the next iteration is the first one after the start or a restart.
        broke: whether the recursion has broken down.
        going: whether there is another iteration.
    """

    x: jax.Array
    r: jax.Array
    shadow: jax.Array
    p: jax.Array
    v: jax.Array
    rho: jax.Array
    alpha: jax.Array
    omega: jax.Array
    best: jax.Array
    least: jax.Array
    iterations: jax.Array
    norm: jax.Array
    fresh: jax.Array
    broke: jax.Array
    going: jax.Array


def bicgstab(
    matvec: MatVec,
    b: jax.Array,
    init: jax.Array | None,
    max_steps: int,
    tol: float,
    eps: float,
    preconditioner: MatVec,
) -> Recursion:
    """Solve Ax = b for a vector b, and return the iterate with the smallest recursive residual.

    The residual is not monotone and may grow by orders of magnitude before it falls. The recursion stops at
    ‖r‖ ≤ tol·‖b‖, and at ‖r‖ ≤ eps·(‖b‖ + ‖A‖‖x‖), the size of the rounding errors in b − Ax. It restarts from the
    current x and residual if ⟨shadow, v⟩, ω or the next ρ = ⟨shadow, r⟩ is zero up to rounding, because α or a later β
    divides by these numbers. It has broken down if this happens in the first iteration after the start or a restart,
    and the residual of that iteration is not below the smallest one so far.

    Source: van der Vorst (1992).
    """
    size = tree.norm(b)

    def above(x, length, norm):
        return length > jnp.maximum(tol * size, limit_of_rounding(eps, size, norm, x))

    def advance(state: _State) -> _State:
        shadow = state.shadow
        rho = tree.vdot(shadow, state.r)
        beta = rho / tree.safe_divisor(state.rho) * (state.alpha / tree.safe_divisor(state.omega))
        beta = jnp.where(state.fresh, jnp.zeros_like(beta), beta)
        p = state.r + beta * (state.p - state.omega * state.v)
        direction = preconditioner(p)
        v = matvec(direction)
        denominator, length = tree.vdot(shadow, v), tree.norm(v)
        norm = jnp.maximum(state.norm, length / tree.safe_divisor(tree.norm(direction)))
        null = jnp.abs(denominator) <= eps * tree.norm(shadow) * length
        alpha = jnp.where(null, jnp.zeros_like(rho), rho / tree.safe_divisor(denominator))
        s = state.r - alpha * v
        other = preconditioner(s)
        t = matvec(other)
        t_length = tree.norm(t)
        norm = jnp.maximum(norm, t_length / tree.safe_divisor(tree.norm(other)))
        # ω = ⟨t, s⟩ / ‖t‖², in two divisions: ‖t‖² would over- or underflow for a very large or a very small ‖A‖.
        cosine = tree.vdot(t / tree.safe_divisor(t_length), s)
        omega = cosine / tree.safe_divisor(t_length)
        x = state.x + alpha * direction + omega * other
        r = s - omega * t
        left = tree.norm(r)
        better = left < state.least
        iterations = state.iterations + 1
        unmet = above(x, left, norm)
        again = null | (jnp.abs(cosine) <= eps * tree.norm(s))
        again = again | (jnp.abs(tree.vdot(shadow, r)) <= eps * tree.norm(shadow) * left)
        broke = unmet & again & state.fresh & ~better
        return _State(
            x, r, jnp.where(again, r, shadow), p, v, rho, alpha, omega,
            jnp.where(better, x, state.best), jnp.where(better, left, state.least),
            iterations, norm, again, broke, unmet & ~broke & (iterations < max_steps) & jnp.isfinite(left),
        )  # fmt: skip

    x, r = start_of(matvec, b, init)
    least, zero, one = tree.norm(r), jnp.zeros_like(size), jnp.ones_like(size)
    start = _State(
        x, r, r, jnp.zeros_like(r), jnp.zeros_like(r), one, one, one, x, least,
        jnp.int32(0), zero, jnp.ones((), bool), jnp.zeros((), bool), above(x, least, zero),
    )  # fmt: skip
    start = tree.match_varying_axes(start)[0]
    state = jax.lax.while_loop(lambda state: state.going, advance, start)
    return Recursion(state.best, state.iterations, state.norm, null=jnp.zeros_like(state.broke), broke=state.broke)
