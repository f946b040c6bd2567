"""Families of regularised regression, ridge and logistic, with the logarithms of the penalties as outer variables."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel.conditions import Stationary
from bilevel.problem import Problem
from bilevel.testing.cases import Case, flatten, outer
from bilevel.testing.families.building_blocks import Options, make_case, orthogonal
from bilevel.testing.families.suggested import suggest_descent


def ridge(**options: Any) -> Case:
    """Draw ½‖Xw − y‖²/s + ½Σ exp(θ_j)w_j² for s = 2·size samples, with one θ_j per feature or one θ for all."""
    return _regression("ridge", Options(**options), _solve_ridge)


def logistic(**options: Any) -> Case:
    """Draw the mean of log(1 + exp(−y⟨x, w⟩)) + ½Σ exp(θ_j)w_j²; NumPy finds w by Newton's method, to rounding."""
    return _regression("logistic", Options(**options), _solve_logistic)


def _regression(family, options, closed_form):
    rng, n = np.random.default_rng(options.seed), options.size
    samples = 2 * n
    left = np.linalg.qr(rng.normal(size=(samples, n)))[0]
    x = np.sqrt(samples) * (left * np.geomspace(1 / options.condition, 1, n) ** 0.5) @ orthogonal(rng, n).T
    y = x @ rng.normal(size=n) + 0.5 * rng.normal(size=samples)
    if family == "logistic":
        x, y = 2 * x, np.sign(y)  # the square of the factor cancels the largest curvature of the logistic loss, ¼
    m = 1 if options.theta == "scalar" else n
    theta = 0.3 * rng.normal(size=m) - np.log(options.condition)
    problem = _regression_problem(family, options.w, options.theta)
    return make_case(family, options, problem, {"x": x, "y": y}, closed_form, suggest_descent, theta)


@functools.cache
def _regression_problem(family, w_layout, theta_layout):
    del w_layout, theta_layout  # keys of the cache: each problem object is compiled for one pair of layouts
    losses = {
        "ridge": lambda predicted, y: 0.5 * (predicted - y) ** 2,
        "logistic": lambda predicted, y: jnp.logaddexp(0.0, -y * predicted),
    }

    def objective(w, theta, data):
        flat = flatten(w)
        loss = losses[family](data["x"] @ flat, data["y"])
        return jnp.mean(loss) + 0.5 * jnp.sum(jnp.exp(flatten(theta)) * flat**2)

    return Problem(Stationary(objective, positive_definite=True), outer)


def _through_penalties(left, w, theta):
    """Return w, ∂w/∂θ and A, given w and A (the argument ``left``).

    The penalties are λ = exp(θ). A scalar θ gives the same penalty to every feature.

    ∂w/∂θ = −A⁻¹diag(λw)P with P = ∂(log λ)/∂θ, which is I, or a column of ones for a scalar θ.
    """
    assignment = np.eye(w.size) if theta.size == w.size else np.ones((w.size, 1))
    penalties = assignment @ np.exp(theta)
    return w, -np.linalg.solve(left, (penalties * w)[:, None] * assignment), left


def _solve_ridge(data, theta):
    x, y = data["x"], data["y"]
    left = x.T @ x / len(y) + np.exp(theta) * np.eye(x.shape[1])
    return _through_penalties(left, np.linalg.solve(left, x.T @ y / len(y)), theta)


def _solve_logistic(data, theta):
    x, y = data["x"], data["y"]
    w = np.zeros(x.shape[1])

    def slope(w):
        return -x.T @ (y / (1 + np.exp(y * (x @ w)))) / len(y) + np.exp(theta) * w

    while True:
        misfit = 1 / (1 + np.exp(y * (x @ w)))
        left = (x.T * (misfit * (1 - misfit))) @ x / len(y) + np.exp(theta) * np.eye(w.size)
        step = -np.linalg.solve(left, slope(w))
        # Halve the Newton step until it does not raise the gradient's norm, or until it no longer changes w. The
        # objective is strictly convex, so its Hessian is invertible and a short enough Newton step reduces this norm.
        # The outer loop therefore converges.
        while np.linalg.norm(slope(w + step)) > np.linalg.norm(slope(w)) and np.any(w + step != w):
            step = step / 2
        if np.linalg.norm(step) <= 4 * np.finfo(np.float64).eps * np.linalg.norm(w):
            return _through_penalties(left, w, theta)
        w = w + step
