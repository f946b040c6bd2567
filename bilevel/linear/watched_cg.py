"""Conjugate gradients that also report curvatures: the recursion of ``CG(engine="watched")`` and ``HessianFree``."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear.diagnosis import rounding_of_curvature
from bilevel.linear.system import limit_of_rounding, start_of
from bilevel.types import MatVec, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CGState:
    """The state of the recursion. The last state is also the report of the solve.

    Below a relative residual of eps the directions are rounding noise, and the curvatures there are not recorded.

    Attributes:
        x: the solution so far.
        r: the recursive residual b − Ax.
        p: the search direction.
        rz: ⟨r, M⁻¹r⟩.
        squared: ‖r‖².
        iterations: the number of directions that were multiplied by A.
        least_curvature: the smallest ⟨p, Ap⟩ / ‖p‖² recorded; infinite if there is none.
        largest_stretch: the largest ‖Ap‖ / ‖p‖, a lower bound of ‖A‖.
        negative: whether a direction had ⟨p, Ap⟩ < 0 by more than rounding, or ⟨p, Ap⟩ = 0 with Ap ≠ 0.
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
) -> CGState:
    """Solve Ax = b for a symmetric A, and return the last state, which holds the solution and the curvatures found.

    Args:
        matvec: A.
        b: the right-hand side, as :func:`normalise` scales it, so that no square over- or underflows.
        init: where x starts; None for zero, which costs no product.
        max_steps: the budget, in products.
        tol: the recursion stops at ‖r‖ ≤ tol·‖b‖, and at the limit of rounding, eps·(‖b‖ + ‖A‖‖x‖).
        preconditioner: r ↦ M⁻¹r; None for the identity.
        truncate: if True, stop at a direction whose ⟨p, Ap⟩ is not above rounding noise and return the x before it; if
            it is the very first direction p, return init + p. From zero, with b the negative gradient, x is then a
            descent direction (Steihaug's rule). If False, a negative ⟨p, Ap⟩ does not stop the recursion, as in
            jaxopt's solver. A direction with Ap = 0 up to rounding, or with ⟨p, Ap⟩ = 0, does.

    Source: Hestenes and Stiefel (1952); Steihaug (1983) for the truncation.
    """
    eps = float(jnp.finfo(tree.norm(b).dtype).eps)
    target, size = tree.vdot(b, b), tree.norm(b)

    def precondition(r):
        """Return M⁻¹r, ⟨r, M⁻¹r⟩ and ‖r‖²."""
        if preconditioner is None:
            squared = tree.vdot(r, r)
            return r, squared, squared
        z = preconditioner(r)
        return z, tree.vdot(r, z), tree.vdot(r, r)

    def unfinished(x, squared, stretch, iterations):
        limit = limit_of_rounding(eps, size, stretch, x)
        return (iterations < max_steps) & (squared > tol**2 * target) & (jnp.sqrt(squared) > limit)

    def advance(state: CGState) -> CGState:
        product = matvec(state.p)
        curvature = tree.vdot(state.p, product)
        # Numbers that only serve the report are cut from differentiation: tangents go through the solution alone.
        length, product_length = (tree.norm(jax.lax.stop_gradient(vector)) for vector in (state.p, product))
        reported_curvature = jax.lax.stop_gradient(curvature)
        rounding = rounding_of_curvature(length, product_length)
        stretch = jnp.maximum(state.largest_stretch, product_length / tree.safe_divisor(length))
        meaningful = state.squared > eps**2 * target
        zero_curvature = jnp.abs(reported_curvature) <= rounding
        null = meaningful & zero_curvature & (product_length <= jnp.sqrt(eps) * stretch * length)
        negative = meaningful & ((reported_curvature < -rounding) | ((reported_curvature == 0) & ~null))
        # Do not follow a curvature that is rounding noise: 1 / curvature would send x far along a null direction of A.
        follow = (curvature > 4 * eps * stretch * length**2) if truncate else (curvature != 0) & ~null
        alpha = jnp.where(follow, state.rz / jnp.where(follow, curvature, jnp.ones_like(curvature)), 0)
        steepest = truncate & (state.iterations == 0) & ~follow
        x = tree.add(state.x, tree.scale(jnp.where(steepest, jnp.ones_like(alpha), alpha), state.p))
        r = tree.subtract(state.r, tree.scale(alpha, product))
        z, rz, squared = precondition(r)
        p = tree.add(z, tree.scale(rz / state.rz, state.p))
        iterations = state.iterations + 1
        least = jnp.minimum(state.least_curvature, jnp.where(meaningful, reported_curvature / length**2, jnp.inf))
        return CGState(
            x, r, p, rz, squared, iterations, least, stretch,
            state.negative | negative, state.null | null, follow & unfinished(x, squared, stretch, iterations),
        )  # fmt: skip

    x, r = start_of(matvec, b, init)
    z, rz, squared = precondition(r)
    no_steps, zero, no = jnp.int32(0), jnp.zeros_like(rz), jnp.bool_(False)
    going = unfinished(x, squared, zero, no_steps)
    start = CGState(x, r, z, rz, squared, no_steps, zero + jnp.inf, zero, no, no, going)
    return jax.lax.while_loop(lambda state: state.going, advance, tree.match_varying_axes(start)[0])
