"""Projections without a closed form, exact to rounding and differentiable in forward and reverse mode.

jaxopt's versions of these projections stop at residuals of 1e-3 to 1e-5 and support only reverse-mode differentiation.
Here an iteration finds the constraints that hold with equality, and is not differentiated. These active constraints
define a face of the set. The projection onto the face is smooth, and is computed to rounding by steps that JAX
differentiates. For sets of vectors this is a linear solve, with exact derivatives of any order. For sets of matrices
these are two Newton steps on the dual problem, with exact derivatives up to the third order.

If no point satisfies the constraints, the result is NaN, and the status of a solve becomes NONFINITE.
"""

import jax
import jax.numpy as jnp

from bilevel._jaxopt.library import jaxopt


def affine_set(x, hyperparams):
    """Return the nearest y to x with Ay = b.

    Args:
        x: the point to project, ``[n]``.
        hyperparams: ``(A, b)`` of shapes ``[m, n]`` and ``[m]``. The rows of A may be linearly dependent.
    """
    matrix, right = hyperparams
    point = x - jnp.linalg.pinv(matrix) @ (matrix @ x - right)
    return _feasible(point, jnp.abs(matrix @ point - right), right)


def polyhedron(x, hyperparams, tol=None):
    """Return the nearest y to x with Ay = b and Gy ≤ h.

    OSQP finds the rows of G that hold with equality.

    Args:
        x: the point to project, ``[n]``.
        hyperparams: ``(A, b, G, h)`` of shapes ``[m, n]``, ``[m]``, ``[k, n]`` and ``[k]``.
        tol: the tolerance of OSQP; None for √eps of x's dtype.
    """
    equal, b, unequal, h = hyperparams
    solver = jaxopt.OSQP(matvec_Q=lambda _, y: y, check_primal_dual_infeasability=False, tol=_tolerance(x, tol))
    fixed = jax.lax.stop_gradient({"params_obj": (None, -x), "params_eq": (equal, b), "params_ineq": (unequal, h)})
    fixed = jax.tree.map(lambda leaf: leaf.astype(float), fixed)  # OSQP creates arrays of the default float dtype
    solution = solver.run(None, **fixed).params
    # A row counts as active if its multiplier is larger than its slack.
    active = solution.dual_ineq > fixed["params_ineq"][1] - fixed["params_ineq"][0] @ solution.primal
    rows = jnp.concatenate([equal, jnp.where(active[:, None], unequal, 0)])
    point = affine_set(x, (rows, jnp.concatenate([b, jnp.where(active, h, 0)])))
    return _feasible(point, jnp.maximum(unequal @ point - h, 0), h)


def box_section(x, hyperparams, tol=None):
    """Return the nearest p to x with α ≤ p ≤ β and wᵀp = c, which is p = clip(x + τw, α, β) for a scalar τ.

    Bisection for τ finds the entries between their bounds. On these entries τ has a closed form.

    Args:
        x: the point to project, ``[n]``.
        hyperparams: ``(α, β, w, c)``: two bounds and positive weights of shape ``[n]``, and a scalar.
        tol: the tolerance of the bisection; None for √eps of x's dtype.
    """
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
    """Return the T nearest to the similarity matrix with T ≥ 0, T1 = a and Tᵀ1 = b.

    Args:
        similarity: the matrix to project, ``[m, n]``.
        marginals: ``(a, b)``, positive vectors of lengths m and n with equal sums.
        tol: the tolerance of the dual LBFGS iteration; None for √eps of the matrix's dtype.
    """
    return _plan(similarity, marginals, jax.nn.relu, lambda z: 0.5 * jax.nn.relu(z) ** 2, tol)


def kl_transport(similarity, marginals, tol=None):
    """Return the T with T1 = a and Tᵀ1 = b of the least KL divergence to exp(similarity); see :func:`transport`."""
    return _plan(similarity, marginals, jnp.exp, jnp.exp, tol)


def birkhoff(similarity, tol=None):
    """Return the doubly stochastic matrix nearest to the square matrix ``similarity``; see :func:`transport`."""
    return transport(similarity, _ones(similarity), tol)


def kl_birkhoff(similarity, tol=None):
    """Return the doubly stochastic matrix of the least KL divergence to exp(similarity); see :func:`transport`."""
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
"""The replacements for functions of `jaxopt.projection`, by the name in jaxopt."""


def _plan(similarity, marginals, plan, conjugate, tol):
    """Return T = plan(similarity + α1ᵀ + 1βᵀ), where the potentials (α, β) minimise the dual problem.

    Args:
        similarity: ``[m, n]``.
        marginals: the required row sums ``[m]`` and column sums ``[n]``.
        plan: the derivative of ``conjugate``, elementwise.
        conjugate: the convex conjugate of the regulariser, elementwise.
        tol: tolerance of LBFGS on the dual.

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
    # The potentials from LBFGS are constants. After k Newton steps, the derivatives up to order 2ᵏ − 1 are exact.
    for _ in range(2):
        # The curvature is singular, because adding a constant to α and subtracting it from β changes nothing.
        inverse = jnp.linalg.pinv(curvature(potentials, similarity, sums), hermitian=True)
        potentials = potentials - inverse @ slope(potentials, similarity, sums)
    result = plan(lifted(potentials, similarity))
    return _feasible(result, jnp.abs(jnp.concatenate([result.sum(1), result.sum(0)]) - sums), sums)


def _ones(similarity):
    return tuple(jnp.ones(size, similarity.dtype) for size in similarity.shape)


def _tolerance(x, tol):
    """Return ``tol``, or √eps by default, the accuracy of an iteration whose gradient has rounding errors."""
    return float(jnp.finfo(x.dtype).eps) ** 0.5 if tol is None else tol


def _feasible(point, violation, right_hand_side):
    """Return ``point``, or NaN if it violates its constraints by far more than rounding.

    A violation above eps^¼ times the size of the right-hand side means that no point satisfies the constraints.
    """
    if violation.size == 0:
        return point
    size = 1 + jnp.max(jnp.abs(right_hand_side))
    tolerance = jnp.asarray(jnp.finfo(point.dtype).eps ** 0.25, point.dtype)
    return jnp.where(jax.lax.stop_gradient(jnp.max(violation) <= tolerance * size), point, jnp.nan)
