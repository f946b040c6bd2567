"""Conjugate gradients that report what they saw: the recursion of ``CG(engine="watched")`` and of ``HessianFree``."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear.diagnosis import rounding_of_curvature
from bilevel.types import MatVec, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Watched:
    """The state of the recursion; at the end, what it saw.

    Attributes:
        x: the solution so far.
        r: the recursive residual b − Ax.
        p: the search direction.
        rz: ⟨r, M⁻¹r⟩.
        squared: ‖r‖².
        iterations: directions that were multiplied by A.
        least_curvature: the smallest ⟨p, Ap⟩ / ‖p‖² of a direction; infinite before the first.
        largest_stretch: the largest ‖Ap‖ / ‖p‖, a lower bound of ‖A‖.
        negative: whether a direction had ⟨p, Ap⟩ < 0 by more than rounding.
        null: whether a direction had Ap = 0 up to rounding. The recursion stops there.
        going: whether another direction is to be followed.
    """

    x: PyTree
    r: PyTree
    p: PyTree
    rz: jax.Array
    squared: jax.Array
    iterations: jax.Array
    least_curvature: jax.Array
    largest_stretch: jax.Array
    negative: jax.Array
    null: jax.Array
    going: jax.Array


def conjugate_gradients(
    matvec: MatVec,
    b: PyTree,
    init: PyTree | None,
    max_steps: int,
    tol: float,
    preconditioner: MatVec | None = None,
    truncate: bool = False,
) -> Watched:
    """Solve Ax = b for a symmetric A, and return the last state with what the recursion saw.

    Args:
        matvec: A.
        b: the right-hand side; ‖b‖ should be near 1, so that no square over- or underflows.
        init: where x starts; None for zero, which costs no product.
        max_steps: the budget, in products.
        tol: the recursion stops at ‖r‖ ≤ tol·‖b‖.
        preconditioner: r ↦ M⁻¹r; None for the identity.
        truncate: stop at the first ⟨p, Ap⟩ ≤ 0 without following that direction, except that the first direction is
            then followed with length 1. The x of such a solve always descends (Steihaug's rule). Otherwise the
            recursion goes on, as jaxopt's does.

    Source: Hestenes and Stiefel (1952); Steihaug (1983) for the truncation.
    """
    eps = float(jnp.finfo(tree.norm(b).dtype).eps)
    target = tree.vdot(b, b)

    def precondition(r):
        """Return M⁻¹r, ⟨r, M⁻¹r⟩ and ‖r‖²."""
        if preconditioner is None:
            squared = tree.vdot(r, r)
            return r, squared, squared
        z = preconditioner(r)
        return z, tree.vdot(r, z), tree.vdot(r, r)

    def unfinished(squared, iterations):
        return (iterations < max_steps) & (squared > tol**2 * target)

    def advance(state: Watched) -> Watched:
        product = matvec(state.p)
        curvature = tree.vdot(state.p, product)
        # What is only looked at carries no tangent: a forward derivative goes through the solution alone.
        length, size = (tree.norm(jax.lax.stop_gradient(vector)) for vector in (state.p, product))
        seen = jax.lax.stop_gradient(curvature)
        rounding = rounding_of_curvature(length, size)
        stretch = jnp.maximum(state.largest_stretch, size / length)
        # Below a relative residual of eps the directions are rounding noise, and their curvature means nothing.
        meaningful = state.squared > eps**2 * target
        flat = jnp.abs(seen) <= rounding
        null = meaningful & flat & (size <= jnp.sqrt(eps) * stretch * length)
        negative = meaningful & ((seen < -rounding) | ((seen == 0) & ~null))
        follow = (curvature > 0) if truncate else (curvature != 0) & ~null
        alpha = jnp.where(follow, state.rz / jnp.where(follow, curvature, jnp.ones_like(curvature)), 0)
        steepest = truncate & (state.iterations == 0) & ~follow
        x = tree.add(state.x, tree.scale(jnp.where(steepest, jnp.ones_like(alpha), alpha), state.p))
        r = tree.subtract(state.r, tree.scale(alpha, product))
        z, rz, squared = precondition(r)
        p = tree.add(z, tree.scale(rz / state.rz, state.p))
        iterations = state.iterations + 1
        least = jnp.minimum(state.least_curvature, jnp.where(meaningful, seen / length**2, jnp.inf))
        return Watched(
            x, r, p, rz, squared, iterations, least, stretch,
            state.negative | negative, state.null | null, follow & unfinished(squared, iterations),
        )  # fmt: skip

    x = jax.tree.map(jnp.zeros_like, b) if init is None else init
    r = b if init is None else tree.subtract(b, matvec(init))
    z, rz, squared = precondition(r)
    none, zero, no = jnp.int32(0), jnp.zeros_like(rz), jnp.bool_(False)
    start = Watched(x, r, z, rz, squared, none, zero + jnp.inf, zero, no, no, unfinished(squared, none))
    return jax.lax.while_loop(lambda state: state.going, advance, tree.match_varying_axes(start)[0])
