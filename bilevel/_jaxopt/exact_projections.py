"""Projections without a formula: an iteration finds the face of the set, and a linear system the point on it.

jaxopt's own stop at residuals of 1e-3 to 1e-5, and JAX differentiates them backwards alone. Here the iteration,
which is not differentiated, only tells which constraints hold with equality. On that face the projection is smooth:
Newton's method makes it exact to rounding, and JAX differentiates it in any direction and to any order. Where no
point satisfies the constraints the result is NaN, which a status shows.
"""

import jax
import jax.numpy as jnp

from bilevel._jaxopt.library import jaxopt


def affine_set(x, hyperparams):
    """The nearest y with Ay = b, ``hyperparams = (A, b)``; the rows of A may depend on each other."""
    matrix, right = hyperparams
    point = x - jnp.linalg.pinv(matrix) @ (matrix @ x - right)
    return _feasible(point, jnp.abs(matrix @ point - right), right)


def polyhedron(x, hyperparams, tol=None):
    """The nearest y with Ay = b and Gy ≤ h, ``hyperparams = (A, b, G, h)``: OSQP finds the rows of G that hold."""
    equal, b, unequal, h = hyperparams
    solver = jaxopt.OSQP(matvec_Q=lambda _, y: y, check_primal_dual_infeasability=False, tol=_tolerance(x, tol))
    fixed = jax.lax.stop_gradient({"params_obj": (None, -x), "params_eq": (equal, b), "params_ineq": (unequal, h)})
    fixed = jax.tree.map(lambda leaf: leaf.astype(float), fixed)  # OSQP mixes in the default dtype
    found = solver.run(None, **fixed).params
    active = found.dual_ineq > fixed["params_ineq"][1] - fixed["params_ineq"][0] @ found.primal
    rows = jnp.concatenate([equal, jnp.where(active[:, None], unequal, 0)])
    point = affine_set(x, (rows, jnp.concatenate([b, jnp.where(active, h, 0)])))
    return _feasible(point, jnp.maximum(unequal @ point - h, 0), h)


def box_section(x, hyperparams, tol=None):
    """The nearest p with α ≤ p ≤ β and wᵀp = c, ``hyperparams = (α, β, w, c)``, w > 0: p = clip(x + τw, α, β)."""
    low, high, weights, c = hyperparams

    def excess(tau, low, high, x, weights, c):
        return weights @ jnp.clip(x + tau * weights, low, high) - c

    fixed = jax.lax.stop_gradient({"low": low, "high": high, "x": x, "weights": weights, "c": c})
    ends = ((bound - fixed["x"]) / fixed["weights"] for bound in (fixed["low"], fixed["high"]))
    bracket: dict = {"lower": jnp.min(next(ends)), "upper": jnp.max(next(ends)), "check_bracket": False}
    solver = jaxopt.Bisection(excess, maxiter=100, tol=_tolerance(x, tol), **bracket)
    moved = fixed["x"] + jax.lax.stop_gradient(solver.run(None, **fixed).params).astype(x.dtype) * fixed["weights"]
    free = (moved > fixed["low"]) & (moved < fixed["high"])
    bound = jnp.where(moved > fixed["low"], high, low)
    inside = jnp.where(free, weights, 0)
    squares = inside @ inside
    tau = (c - weights @ jnp.where(free, x, bound)) / jnp.where(squares > 0, squares, 1)
    point = jnp.where(free, x + tau * weights, bound)
    return _feasible(point, jnp.abs(weights @ jnp.clip(point, low, high) - c), c)


def transport(similarity, marginals, tol=None):
    """The T nearest to the similarity with T ≥ 0, T1 = a and Tᵀ1 = b, ``marginals = (a, b)``."""
    return _plan(similarity, marginals, jax.nn.relu, lambda z: 0.5 * jax.nn.relu(z) ** 2, tol)


def kl_transport(similarity, marginals, tol=None):
    """The T with T1 = a and Tᵀ1 = b of the least KL divergence to exp(similarity)."""
    return _plan(similarity, marginals, jnp.exp, jnp.exp, tol)


def birkhoff(similarity, tol=None):
    """The doubly stochastic matrix nearest to the similarity."""
    return transport(similarity, _ones(similarity), tol)


def kl_birkhoff(similarity, tol=None):
    """The doubly stochastic matrix of the least KL divergence to exp(similarity)."""
    return kl_transport(similarity, _ones(similarity), tol)


BY_NAME = {
    "projection_affine_set": affine_set,
    "projection_polyhedron": polyhedron,
    "projection_box_section": box_section,
    "projection_transport": transport,
    "projection_birkhoff": birkhoff,
    "kl_projection_transport": kl_transport,
    "kl_projection_birkhoff": kl_birkhoff,
}
"""What stands in for the functions of `jaxopt.projection` of these names."""


def _plan(similarity, marginals, plan, conjugate, tol):
    """T = plan(similarity + α1ᵀ + 1βᵀ), with the potentials (α, β) at the minimum of the dual.

    Source: Blondel, Seguy, Rolet (2018), Smooth and sparse optimal transport, equation 7.
    """
    sums = jnp.concatenate(marginals)
    rows = marginals[0].size

    def lifted(potentials, similarity):
        return similarity + potentials[:rows, None] + potentials[rows:]

    def dual(potentials, similarity, sums):
        return jnp.sum(conjugate(lifted(potentials, similarity))) - potentials @ sums

    solver = jaxopt.LBFGS(
        dual, maxiter=500, tol=_tolerance(similarity, tol), linesearch="backtracking", implicit_diff=False, unroll=False
    )
    fixed = jax.lax.stop_gradient({"similarity": similarity, "sums": sums})
    potentials = jax.lax.stop_gradient(solver.run(jnp.zeros_like(sums), **fixed).params)
    slope, curvature = jax.grad(dual), jax.hessian(dual)
    for _ in range(2):  # the first makes first derivatives exact, the second those up to the third
        # A constant may move from α to β: the curvature has no inverse.
        inverse = jnp.linalg.pinv(curvature(potentials, similarity, sums), hermitian=True)
        potentials = potentials - inverse @ slope(potentials, similarity, sums)
    found = plan(lifted(potentials, similarity))
    return _feasible(found, jnp.abs(jnp.concatenate([found.sum(1), found.sum(0)]) - sums), sums)


def _ones(similarity):
    return tuple(jnp.ones(size, similarity.dtype) for size in similarity.shape)


def _tolerance(x, tol):
    """√eps where none is given: what an iteration reaches that sees a gradient of rounding size."""
    return float(jnp.finfo(x.dtype).eps) ** 0.5 if tol is None else tol


def _feasible(point, violation, right):
    """``point``, or NaN where it violates its constraints by far more than rounding: then no point satisfies them."""
    if violation.size == 0:
        return point
    size = 1 + jnp.max(jnp.abs(right))
    bound = jnp.asarray(jnp.finfo(point.dtype).eps ** 0.25, point.dtype)
    return jnp.where(jax.lax.stop_gradient(jnp.max(violation) <= bound * size), point, jnp.nan)
