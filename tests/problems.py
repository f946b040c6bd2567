"""Bilevel problems with closed-form inner solutions, which several test files share.

A :class:`Case` carries ``exact(theta, data) -> w``, which does not use `bilevel`. JAX differentiates
``outer(exact(theta, data), theta, data)`` to any order, which gives the exact hypergradient and Hessian.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel as bl


@dataclass(frozen=True)
class Case:
    """A bilevel problem with the arguments θ, init and data, and the formula of its inner solution."""

    condition: bl.Condition
    outer: Callable
    theta: object
    init: object
    data: object
    exact: Callable
    kappa: float
    """A bound on the condition number of ∂residual/∂w. A linear solve magnifies rounding by up to this factor."""

    @property
    def problem(self) -> bl.Problem:
        return bl.Problem(self.condition, self.outer)

    def value(self, theta, data=None):
        """Return the outer value at the exact inner solution."""
        data = self.data if data is None else data
        return self.outer(self.exact(theta, data), theta, data)

    @property
    def gradient(self):
        return jax.grad(self.value)(self.theta)

    @property
    def tolerance(self) -> float:
        """The relative tolerance 100·eps·kappa: inner and adjoint solve have errors of a few eps·kappa each."""
        return 100 * float(np.finfo(np.float64).eps) * self.kappa


def newton(condition, init, theta, data):
    """Find w by five steps of Newton's method with a dense Jacobian.

    The function has the signature of an inner solver, so tests pass it as one.
    """
    flat, unravel = ravel_pytree(init)

    def residual(w):
        return ravel_pytree(condition.residual(unravel(w), theta, data))[0]

    def step(_, w):
        return w - jnp.linalg.solve(jax.jacobian(residual)(w), residual(w))

    return unravel(jax.lax.fori_loop(0, 5, step, flat))


def affine_root() -> Case:
    """Return the case M(θ)w = data·(Cθ + d) with a non-symmetric M(θ). Both w and θ are trees of mixed shapes."""
    rng = np.random.default_rng(0)
    matrix = np.eye(4) * 3 + rng.normal(size=(4, 4))
    slope, coefficients, offset = rng.normal(size=(4, 4)) * 0.3, rng.normal(size=(4, 3)), rng.normal(size=4)
    assert np.linalg.norm(matrix - matrix.T) > 1

    def system(theta):
        flat = jnp.concatenate([theta["a"], theta["b"][None]])
        return matrix + flat[0] * slope, coefficients @ flat + offset

    def unpack(flat):
        return {"vector": flat[:3], "scalar": flat[3]}

    def residual(w, theta, data):
        left, right = system(theta)
        return unpack(left @ jnp.append(w["vector"], w["scalar"]) - right * data)

    def exact(theta, data):
        left, right = system(theta)
        return unpack(jnp.linalg.solve(left, right * data))

    def outer(w, theta, data):
        return jnp.sum(jnp.sin(w["vector"])) * w["scalar"] + jnp.sum(theta["a"] ** 2) * theta["b"]

    theta = {"a": jnp.array([0.3, -0.7]), "b": jnp.array(1.1)}
    init = {"vector": jnp.zeros(3), "scalar": jnp.zeros(())}
    kappa = float(np.linalg.cond(matrix + 0.3 * slope))
    return Case(bl.Root(residual), outer, theta, init, jnp.array(1.5), exact, kappa)


def ridge() -> Case:
    """Return the case of ridge regression, ½‖Xw − y‖²/n + ½θ‖w‖² with n samples: w = (XᵀX/n + θI)⁻¹Xᵀy/n."""
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(rng.normal(size=12))
    n = x.shape[0]

    def objective(w, theta, data):
        x, y = data
        return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * theta * jnp.sum(w**2)

    def exact(theta, data):
        x, y = data
        return jnp.linalg.solve(x.T @ x / n + theta * jnp.eye(3), x.T @ y / n)

    def outer(w, theta, data):
        return jnp.sum((w - jnp.array([0.5, -0.2, 0.1])) ** 2)

    theta = jnp.array(0.7)
    kappa = float(jnp.linalg.cond(x.T @ x / n + theta * jnp.eye(3)))
    return Case(bl.Stationary(objective), outer, theta, jnp.zeros(3), (x, y), exact, kappa)


def quadratic() -> Case:
    """Return the case of ½wᵀQw − data·‖θ‖²·wᵀCθ. Its solution w = data·‖θ‖²·Q⁻¹Cθ is cubic in θ."""
    rng = np.random.default_rng(2)
    factor = rng.normal(size=(4, 4))
    matrix, coefficients = jnp.asarray(factor @ factor.T + np.eye(4)), jnp.asarray(rng.normal(size=(4, 2)))

    def objective(w, theta, data):
        return 0.5 * w @ matrix @ w - w @ coefficients @ theta * jnp.sum(theta**2) * data

    def exact(theta, data):
        return jnp.linalg.solve(matrix, coefficients @ theta) * jnp.sum(theta**2) * data

    def outer(w, theta, data):
        return jnp.sum(jnp.cos(w)) + jnp.sum(w) * theta[0]

    theta, kappa = jnp.array([0.6, -0.9]), float(jnp.linalg.cond(matrix))
    return Case(bl.Stationary(objective), outer, theta, jnp.zeros(4), jnp.array(1.0), exact, kappa)


def imaml(strength: float = 2.0) -> Case:
    """Return the case of ½(w − t)ᵀH(w − t) + ½λ‖w − θ‖², with t the data and λ the strength.

    The solution is w = (H + λI)⁻¹(Ht + λθ), and the hypergradient is (I + H/λ)⁻¹∇outer(w).
    """
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(3, 3))
    hessian = jnp.asarray(factor @ factor.T)

    def objective(w, theta, data):
        error = jnp.append(w["a"], w["b"]) - data
        return 0.5 * error @ hessian @ error

    def exact(theta, data):
        flat = jnp.append(theta["a"], theta["b"])
        right = hessian @ data + strength * flat
        solution = jnp.linalg.solve(hessian + strength * jnp.eye(3), right)
        return {"a": solution[:2], "b": solution[2]}

    def outer(w, theta, data):
        return jnp.sum(w["a"] ** 3) + jnp.sin(w["b"])

    theta = {"a": jnp.array([0.4, -1.2]), "b": jnp.array(0.3)}
    kappa = float(jnp.linalg.cond(hessian + strength * jnp.eye(3)))
    data = jnp.asarray(rng.normal(size=3))
    return Case(bl.Proximal(objective, strength), outer, theta, theta, data, exact, kappa)


def contraction() -> Case:
    """Return the case w = ½Mw + data·sin(Cθ), with an orthogonal M that is not symmetric."""
    rng = np.random.default_rng(4)
    matrix, coefficients = np.linalg.qr(rng.normal(size=(3, 3)))[0] * 0.5, rng.normal(size=(3, 2))

    def mapping(w, theta, data):
        return matrix @ w + jnp.sin(coefficients @ theta) * data

    def exact(theta, data):
        return jnp.linalg.solve(np.eye(3) - matrix, jnp.sin(coefficients @ theta) * data)

    def outer(w, theta, data):
        return jnp.sum(jnp.exp(0.3 * w)) + theta @ theta

    kappa = float(np.linalg.cond(np.eye(3) - matrix))
    return Case(bl.FixedPoint(mapping), outer, jnp.array([0.2, 0.7]), jnp.zeros(3), jnp.array(1.3), exact, kappa)


EIGENVALUES = np.array([1.0, 3.0])


def diagonal_quadratic(eigenvalues=EIGENVALUES) -> bl.Stationary:
    """Return the condition of ½wᵀDw − wᵀθ, with a diagonal D and the solution D⁻¹θ.

    K steps of gradient descent from 0 with step size η give (I − (I − ηD)ᴷ)D⁻¹θ.
    """
    return bl.Stationary(lambda w, theta, data: 0.5 * w @ (eigenvalues * w) - w @ theta)


def descent_problem() -> bl.Problem:
    """Return the problem with the outer function ½‖w‖² and the condition :func:`diagonal_quadratic`."""
    return bl.Problem(diagonal_quadratic(), lambda w, theta, data: 0.5 * jnp.sum(w**2))


# A quadratic in four variables, for tests of constraints and penalties. On a known active set, its minimum has a closed
# form.
FACTOR = np.random.default_rng(0).normal(size=(4, 4))
MATRIX = FACTOR @ FACTOR.T / 4 + np.eye(4)  # eigenvalues between 1 and 3.4
TARGET = np.array([0.9, -0.3, 0.4, 1.4])
WEIGHTS = np.array([1.0, -2.0, 0.5, 3.0])


def distance_to_target(w, theta, data):
    """Return the inner objective ½(w − data)ᵀQ(w − data) with Q = MATRIX."""
    return 0.5 * (w - data) @ MATRIX @ (w - data)


def weighted_outer(w, theta, data):
    """Return Σᵢ (vᵢwᵢ + 0.3wᵢ²) with v = WEIGHTS. The derivative in w is v + 0.6w."""
    return jnp.sum(WEIGHTS * w + 0.3 * w**2)


def minimum_on_plane(matrix, slope, rows, values):
    """Return argmin ½xᵀ·matrix·x − xᵀ·slope subject to rows·x = values, and the multipliers of the rows."""
    system = jnp.block([[jnp.asarray(matrix), rows.T], [rows, jnp.zeros((len(rows),) * 2)]])
    solution = jnp.linalg.solve(system, jnp.concatenate([slope, values]))
    return solution[: len(slope)], solution[len(slope) :]


def central_differences(value, theta, step=1e-5):
    """Return (value(θ + step) − value(θ − step)) / 2step for each entry of a pytree θ.

    The error is step²/6 times a third derivative, plus the error of a value divided by the step.
    """
    flat, unravel = ravel_pytree(theta)
    moved = [[value(unravel(flat + sign * row)) for sign in (1, -1)] for row in step * np.eye(flat.size)]
    return unravel(jnp.asarray([(ahead - behind) / (2 * step) for ahead, behind in moved]))


def symmetric_with(eigenvalues, rng):
    """Return a dense symmetric matrix with these eigenvalues and random eigenvectors."""
    basis = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


CASES = {"contraction": contraction, "affine root": affine_root, "ridge": ridge, "quadratic": quadratic, "imaml": imaml}
