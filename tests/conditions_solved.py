"""Problems with closed-form solutions, at least one for each condition in the table of test_table.py.

There is no problem of LeastSquares here, because test_least_squares.py tests it.

Except for KKT, each step of size one reduces the error to about a half or less, so 60 solver steps or Neumann terms
leave only rounding errors. Every solution depends on θ nonlinearly, so its second derivative is not zero. The closed
forms do not use `bilevel`.
"""

import jax.numpy as jnp
import numpy as np
from problems import Case, minimum_on_plane

import bilevel as bl

Q = np.array([[1.0, 0.3], [0.3, 0.9]])  # eigenvalues 0.65 and 1.25
# Eigenvalues 0.14 and 0.56: with λ near one, H + λI differs from the identity by about a half at most.
HESSIAN = np.array([[0.3, 0.2], [0.2, 0.4]])
NONSYMMETRIC = np.array([[0.1, 0.4], [-0.3, 0.2]])  # of norm 0.45
SLOPES = np.array([[0.7, -0.2], [0.4, 0.9]])
THETA = np.array([0.3, -0.4])
TARGET = np.array([0.5, -0.8])
ETA = 0.9


def outer(w, theta, data):
    return jnp.sum(jnp.sin(w)) + 0.3 * w @ w + theta @ theta * w[0]


def outer_with_multipliers(w, theta, data):
    return outer(w[0], theta, data) + 0.2 * sum(jnp.sum(part**2) for part in w[1:] if part is not None)


def curved(theta):
    """Return SLOPES·sin(θ).

    In most problems this is the coefficient of a term that is linear in w, or the proximal centre.
    """
    return SLOPES @ jnp.sin(theta)


def stationary() -> Case:
    """Return the case of the objective ½(1 + θ₀²/10)wᵀQw − data·wᵀt, with t = curved(θ)."""

    def objective(w, theta, data):
        return 0.5 * (1 + 0.1 * theta[0] ** 2) * w @ Q @ w - w @ curved(theta) * data

    def exact(theta, data):
        return jnp.linalg.solve(Q, curved(theta)) * data / (1 + 0.1 * theta[0] ** 2)

    return Case(bl.Stationary(objective), outer, THETA, np.zeros(2), np.array(1.2), exact, 2.0)


def pulled(strength, center, kappa=2.0) -> Case:
    """Return the case of ½(w − t)ᵀH(w − t) + ½(w − c)ᵀΛ(w − c), with t the data, Λ = diag(strength) and c the centre.

    Its solution is w = (H + Λ)⁻¹(Ht + Λc).
    """

    def objective(w, theta, data):
        return 0.5 * (w - data) @ HESSIAN @ (w - data)

    def exact(theta, data):
        pull = (strength(theta, data) if callable(strength) else strength) * jnp.ones(2)
        return jnp.linalg.solve(HESSIAN + jnp.diag(pull), HESSIAN @ data + pull * center(theta, data))

    return Case(bl.Proximal(objective, strength, center), outer, THETA, np.zeros(2), TARGET, exact, kappa)


def proximal() -> Case:
    return pulled(0.9, lambda theta, data: curved(theta))


def proximal_per_parameter() -> Case:
    return pulled(lambda theta, data: jnp.array([0.7, 1.0]), lambda theta, data: curved(theta))


def proximal_learned() -> Case:
    return pulled(lambda theta, data: 0.9 * jnp.exp(0.3 * theta), lambda theta, data: data**2)


def root() -> Case:
    def matrix(theta):
        return jnp.eye(2) + NONSYMMETRIC * jnp.cos(theta[1])

    def exact(theta, data):
        return jnp.linalg.solve(matrix(theta), curved(theta) * data)

    condition = bl.Root(lambda w, theta, data: matrix(theta) @ w - curved(theta) * data)
    return Case(condition, outer, THETA, np.zeros(2), np.array(1.2), exact, 3.0)


def fixed_point() -> Case:
    def matrix(theta):
        return NONSYMMETRIC * (1 + 0.1 * theta[0])

    def exact(theta, data):
        return jnp.linalg.solve(jnp.eye(2) - matrix(theta), curved(theta) * data)

    condition = bl.FixedPoint(lambda w, theta, data: matrix(theta) @ w + curved(theta) * data)
    return Case(condition, outer, THETA, np.zeros(2), np.array(1.2), exact, 3.0)


def on_a_line(theta, right):
    """Return argmin ½xᵀQx − xᵀright subject to x₀ + x₁ = 1 + θ₁²/2, and the multiplier of this constraint."""
    x, [multiplier] = minimum_on_plane(Q, right, jnp.ones((1, 2)), jnp.stack([1 + 0.5 * theta[1] ** 2]))
    return x, multiplier


def projected() -> Case:
    """Return the case of a quadratic on a simplex of size 1 + θ₁²/2. The third entry of its solution is zero."""

    def objective(w, theta, data):
        return 0.5 * w[:2] @ Q @ w[:2] - w[:2] @ curved(theta) * data + 0.5 * w[2] ** 2 + 2 * w[2]

    def exact(theta, data):
        return jnp.append(on_a_line(theta, curved(theta) * data)[0], 0.0)

    simplex = bl.jaxopt_projection("projection_simplex", lambda theta, data: 1 + 0.5 * theta[1] ** 2)
    condition = bl.Projected(objective, simplex, ETA)
    return Case(condition, outer, THETA, np.full(3, 0.4), np.array(1.2), exact, 3.0)


def proximal_gradient() -> Case:
    """Return the case of a quadratic with ℓ₁ penalties, two of which depend on θ. The solution has signs +, − and 0."""

    def penalties(theta):
        return 0.2 * jnp.exp(jnp.append(theta, 1.0))

    def objective(w, theta, data):
        return 0.5 * w[:2] @ Q @ w[:2] - w[:2] @ data + 0.5 * w[2] ** 2 + 0.1 * w[2]

    def exact(theta, data):
        signs = jnp.array([1.0, -1.0])
        return jnp.append(jnp.linalg.solve(Q, data - signs * penalties(theta)[:2]), 0.0)

    condition = bl.ProximalGradient(objective, bl.jaxopt_prox("prox_lasso", lambda theta, data: penalties(theta)), ETA)
    return Case(condition, outer, THETA, np.array([0.5, -0.5, 0.1]), np.array([0.9, -0.8]), exact, 3.0)


def program_objective(x, theta, data):
    return 0.5 * x @ Q @ x - x @ curved(theta) * data


def kkt_equality() -> Case:
    def exact(theta, data):
        return *on_a_line(theta, curved(theta) * data), None

    condition = bl.KKT(program_objective, equality=lambda x, theta, data: jnp.sum(x) - 1 - 0.5 * theta[1] ** 2)
    init = (np.full(2, 0.5), np.array(0.1), None)
    return Case(condition, outer_with_multipliers, THETA, init, np.array(1.2), exact, 6.0)


def kkt_inequality() -> Case:
    """Return the case of a quadratic with the active constraint x₀ ≤ sin(θ₀) − 1 and the inactive one x₁ ≤ 2.

    The multiplier of the first is the first entry of data·curved(θ) − Qx. The multiplier of the second is zero.
    """

    def bounds(theta):
        return jnp.array([jnp.sin(theta[0]) - 1, 2.0])

    def exact(theta, data):
        right = curved(theta) * data
        x0 = jnp.sin(theta[0]) - 1
        x = jnp.stack([x0, (right[1] - Q[1, 0] * x0) / Q[1, 1]])
        return x, None, jnp.stack([right[0] - Q[0] @ x, jnp.zeros(())])

    condition = bl.KKT(program_objective, inequality=lambda x, theta, data: x - bounds(theta))
    init = (np.array([-0.6, 0.0]), None, np.array([0.6, 0.0]))
    return Case(condition, outer_with_multipliers, THETA, init, np.array(1.2), exact, 6.0)


CASES = {
    "Stationary": stationary,
    "Proximal": proximal,
    "Proximal, λ per parameter": proximal_per_parameter,
    "Proximal, learned λ": proximal_learned,
    "Root": root,
    "FixedPoint": fixed_point,
    "Projected": projected,
    "ProximalGradient": proximal_gradient,
    "KKT, equality": kkt_equality,
    "KKT, inequality": kkt_inequality,
}
