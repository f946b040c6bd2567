"""Stabilised biconjugate gradients: the recursion of ``BiCGStab``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear.system import Recursion, limit_of_rounding, positive
from bilevel.types import MatVec


class _State(NamedTuple):
    x: jax.Array
    r: jax.Array
    p: jax.Array
    v: jax.Array
    rho: jax.Array
    alpha: jax.Array
    omega: jax.Array
    best: jax.Array
    least: jax.Array
    iterations: jax.Array
    norm: jax.Array
    broke: jax.Array
    going: jax.Array


def bicgstab(
    matvec: MatVec,
    b: jax.Array,
    init: jax.Array | None,
    max_steps: int,
    tol: float,
    eps: float,
    preconditioner: MatVec | None = None,
) -> Recursion:
    """Solve Ax = b for a vector b, and return the iterate with the smallest recursive residual.

    The residual is not monotone and may grow by orders of magnitude before it falls. The recursion stops at
    ‖r‖ ≤ tol·‖b‖ and at the limit of rounding. It breaks down where a denominator is zero up to rounding.

    Source: van der Vorst (1992).
    """
    size = tree.norm(b)

    def precondition(v):
        return v if preconditioner is None else preconditioner(v)

    def above(x, length, norm):
        return length > jnp.maximum(tol * size, limit_of_rounding(eps, size, norm, x))

    def advance(state: _State) -> _State:
        rho = tree.vdot(shadow, state.r)
        beta = rho / positive(state.rho) * (state.alpha / positive(state.omega))
        p = state.r + beta * (state.p - state.omega * state.v)
        direction = precondition(p)
        v = matvec(direction)
        denominator, length = tree.vdot(shadow, v), tree.norm(v)
        norm = jnp.maximum(state.norm, length / positive(tree.norm(direction)))
        broke = jnp.abs(denominator) <= eps * tree.norm(shadow) * length
        alpha = jnp.where(broke, jnp.zeros_like(rho), rho / positive(denominator))
        s = state.r - alpha * v
        other = precondition(s)
        t = matvec(other)
        t_length = tree.norm(t)
        norm = jnp.maximum(norm, t_length / positive(tree.norm(other)))
        # ⟨t, s⟩ / ‖t‖² without ‖t‖², which would over- or underflow for an A far from 1.
        cosine = tree.vdot(t / positive(t_length), s)
        omega = cosine / positive(t_length)
        x = state.x + alpha * direction + omega * other
        r = s - omega * t
        left = tree.norm(r)
        better = left < state.least
        iterations = state.iterations + 1
        unmet = above(x, left, norm)
        next_rho = tree.vdot(shadow, r)
        broke = broke | (unmet & (jnp.abs(next_rho) <= eps * tree.norm(shadow) * left))
        broke = broke | (unmet & (jnp.abs(cosine) <= eps * tree.norm(s)))
        return _State(
            x, r, p, v, rho, alpha, omega,
            jnp.where(better, x, state.best), jnp.where(better, left, state.least),
            iterations, norm, broke, unmet & ~broke & (iterations < max_steps) & jnp.isfinite(left),
        )  # fmt: skip

    x = jnp.zeros_like(b) if init is None else init
    r = b if init is None else b - matvec(init)
    shadow, least, zero, one = r, tree.norm(r), jnp.zeros_like(size), jnp.ones_like(size)
    going = above(x, least, zero)
    start = _State(
        x, r, jnp.zeros_like(r), jnp.zeros_like(r), one, one, one, x, least,
        jnp.int32(0), zero, jnp.zeros((), bool), going,
    )  # fmt: skip
    state = jax.lax.while_loop(lambda state: state.going, advance, tree.match_varying_axes(start)[0])
    return Recursion(state.best, state.iterations, state.norm, null=jnp.zeros_like(state.broke), broke=state.broke)
