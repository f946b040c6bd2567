"""The choice of a linear solver by the structure of a condition."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import spectrum, tree
from bilevel.conditions.protocol import Condition, adjoint_residual
from bilevel.linear.dense import LU, Cholesky
from bilevel.linear.iterative import CG, GMRES
from bilevel.linear.system import scaled_operator
from bilevel.types import LinearSolver, PyTree


class LinearChoice(NamedTuple):
    """A linear solver and the reason for it."""

    solver: LinearSolver
    reason: str


DENSE_LIMIT = 500
"""Largest number n of unknowns for which :func:`choose_linear` chooses a dense factorisation.

The factorisation takes n products with A and stores the n² entries of A.
"""
LANCZOS_STEPS = 60
"""Number of Lanczos steps that estimate the eigenvalues for more than ``DENSE_LIMIT`` unknowns.

Each step takes one product with A.
"""
FLOOR = 1e-2
"""Smallest eigenvalue of a damped system, relative to the largest absolute eigenvalue of A.

CG then needs at most about 100 iterations to reach the relative residual 1e-6.
"""


def choose_linear(
    condition: Condition, w: PyTree | None = None, theta: PyTree = None, data: PyTree = None, *, damped: bool = False
) -> LinearChoice:
    """Choose a linear solver that fits the structure of a condition, and say why.

    With ``damped=True``, A = ∂F/∂w may be indefinite at w, as it often is for a network. If A then has an eigenvalue
    that is not positive, the solver gets a ridge r that makes A + rI positive definite. The hypergradient is then not
    the derivative of a solution of F(w, θ) = 0. It is the derivative of the solution of F(w, θ) + r(w − w̄) = 0, with
    w̄ = w held constant. The reason states r. For a :class:`Proximal` of strength λ, A is the scaled matrix I + H/λ,
    and the term in the residual is rλ(w − w̄).

    Args:
        condition: the choice depends on its ``symmetric`` and ``positive_definite``.
        w: a pytree like the inner variables, or of their shapes. If it is given, the choice also depends on the number
            of its entries. With ``damped``, it is the inner solution.
        theta, data: the point where A is evaluated; only ``damped`` uses them.
        damped: whether to look at the eigenvalues of A, and to choose a ridge. Up to ``DENSE_LIMIT`` unknowns they are
            computed from the matrix. For more, Lanczos's method estimates them from 60 products. The smallest
            eigenvalue may lie below its estimate. So the ridge is chosen as if a negative estimate were twice as far
            below zero.

    Returns:
        ``(solver, reason)``; the reason is one sentence, or with ``damped`` a few.

    Raises:
        ValueError: with ``damped``, if w is missing, the condition is not symmetric, or an eigenvalue is not finite.
        TypeError: with ``damped``, for a traced w, θ or data.

    Example:
        >>> from bilevel.conditions import Stationary
        >>> solver, reason = choose_linear(Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2))
        >>> type(solver).__name__, reason
        ('CG', 'Stationary is symmetric: conjugate gradients need one product an iteration and four vectors.')
        >>> saddle = Stationary(lambda w, theta, data: 0.5 * (w[0] ** 2 - 0.25 * w[1] ** 2) - w @ theta)
        >>> solver, reason = choose_linear(saddle, jnp.array([1.0, -4.0]), jnp.ones(2), damped=True)
        >>> type(solver).__name__, round(solver.ridge, 4)
        ('Cholesky', 0.26)
    """
    if damped:
        return _choose_damped(condition, w, theta, data)
    name = type(condition).__name__
    # A Python number has no attribute size and counts as one unknown.
    size = None if w is None else sum(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(w))
    if size is not None and size <= DENSE_LIMIT:
        if condition.symmetric and condition.positive_definite:
            return LinearChoice(Cholesky(), f"{name} is positive definite with {size} unknowns: factorise it.")
        return LinearChoice(LU(), f"{name} has {size} unknowns: a dense factorisation is exact and needs no tuning.")
    if condition.symmetric:
        why = "conjugate gradients need one product an iteration and four vectors."
        return LinearChoice(CG(max_steps=100, tol=1e-6), f"{name} is symmetric: {why}")
    why = "until it restarts, GMRES has the smallest residual of all Krylov methods with as many products."
    return LinearChoice(GMRES(max_steps=100, tol=1e-6), f"{name} is not symmetric: {why}")


def _choose_damped(condition: Condition, w: PyTree, theta: PyTree, data: PyTree) -> LinearChoice:
    name = type(condition).__name__
    if w is None or not condition.symmetric:
        raise ValueError(
            f"choose_linear(damped=True) needs a symmetric condition and its inner solution w, got {name} and "
            f"{'no w: pass w' if w is None else 'a w: use LU or GMRES, which need no definite matrix'}. A ridge makes "
            "a matrix definite only if the matrix is symmetric"
        )
    w, theta, data = tree.arrays(w, "w"), tree.arrays(theta, "theta"), tree.arrays(data, "data")
    if tree.is_traced((w, theta, data)):
        raise TypeError("choose_linear(damped=True) reads eigenvalues, so call it outside of jit, vmap and grad")
    size = sum(leaf.size for leaf in jax.tree.leaves(w))
    eigenvalues = jax.jit(_eigenvalues, static_argnums=0)(condition, w, theta, data)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    if not jnp.isfinite(low + high):
        raise ValueError(f"{name} has no finite eigenvalues at this point: check w, θ and the data")
    dense = size <= DENSE_LIMIT
    found = f"{name} has eigenvalues from {low:.3g} to {high:.3g} at this w"
    rounding = size * tree.eps(w) * max(abs(low), abs(high))
    if low > rounding:
        undamped = Cholesky() if dense else CG(max_steps=100, tol=1e-6)
        doubt = "" if dense else "; Lanczos's method may have missed a smaller one"
        return LinearChoice(undamped, f"{found}, so it needs no ridge{doubt}.")
    least = FLOOR * max(abs(low), abs(high))
    ridge = least - (1 if dense else 2) * min(low, 0.0)
    factor = f"{ridge:.3g}·" if condition.scaling(theta, data) is None else f"{ridge:.3g}·λ·"
    reason = (
        f"{found}, so w is not a strict minimum. The ridge {ridge:.3g} makes them positive. The hypergradient is "
        f"therefore that of the residual F(w, θ) + {factor}(w − w̄), with w̄ = w held constant. If more inner steps "
        "lead to a minimum, no ridge is needed."
    )
    return LinearChoice(Cholesky(ridge) if dense else CG(max_steps=100, tol=1e-6, ridge=ridge), reason)


def _eigenvalues(condition: Condition, w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
    """Return eigenvalues, or Ritz values, of the matrix that a linear solver gets, in ascending order."""
    _, product = jax.linearize(lambda w: adjoint_residual(condition)(w, theta, data), w)
    matvec = scaled_operator(product, condition.scaling(theta, data))
    if sum(leaf.size for leaf in jax.tree.leaves(w)) > DENSE_LIMIT:
        return spectrum.ritz_values(matvec, w, LANCZOS_STEPS)
    dense = spectrum.matrix(matvec, w)
    return jnp.linalg.eigvalsh(0.5 * (dense + dense.T))
