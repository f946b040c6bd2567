"""Families whose residual is affine in w, A(θ)w − Bθ − c: a quadratic objective, a root, a fixed point."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.conditions import FixedPoint, Root, Stationary
from bilevel.problem import Problem
from bilevel.testing.cases import Case, arrange, flatten, outer
from bilevel.testing.families.building_blocks import (
    Options,
    contraction_complement,
    draw_direction,
    draw_theta,
    general_matrix,
    make_case,
    symmetric_matrix,
)
from bilevel.testing.families.suggested import suggest_descent, suggest_iteration, suggest_newton


def quadratic(**options: Any) -> Case:
    """Draw ½⟨w, A(θ)w⟩ − ⟨w, Bθ + c⟩ with A(θ) = A₀ + sin⟨u, θ⟩·A₁ symmetric; its minimum is w = A⁻¹(Bθ + c)."""
    return _affine("quadratic", Options(**options), symmetric_matrix, suggest_descent)


def root(**options: Any) -> Case:
    """Draw A(θ)w − Bθ − c = 0 with A(θ) = A₀ + sin⟨u, θ⟩·A₁, which is not symmetric."""
    return _affine("root", Options(**options), general_matrix, suggest_newton)


def fixed_point(**options: Any) -> Case:
    """Draw w = M(θ)w + Bθ + c with a contraction M(θ) = M₀ − sin⟨u, θ⟩·A₁, which is not symmetric; A = I − M."""
    return _affine("fixed_point", Options(**options), contraction_complement, suggest_iteration)


def _affine(family, options, make_matrix, suggest_solver):
    rng, n, m = np.random.default_rng(options.seed), options.size, options.outer_size
    numbers = {
        "matrix": make_matrix(rng, n, options.condition),
        # The norm of this matrix is at most 1/(3κ), so the smallest singular value of A(θ) stays above ½/κ.
        "tilt": make_matrix(rng, n, 1.0 + rng.uniform()) / (4 * options.condition),
        "slope": rng.normal(size=(n, m)),
        "direction": draw_direction(rng, m),
    }
    theta = draw_theta(rng, m)
    left = numbers["matrix"] + np.sin(numbers["direction"] @ theta) * numbers["tilt"]
    numbers["offset"] = left @ rng.normal(size=n) - numbers["slope"] @ theta  # makes a standard normal w the solution
    problem = _affine_problem(family, options.w, options.theta)
    return make_case(family, options, problem, numbers, _solve_affine, suggest_solver, theta)


@functools.cache
def _affine_problem(family, w_layout, theta_layout):
    del theta_layout  # a key of the cache: each problem object is compiled for one pair of layouts

    def residual(w, theta, data):
        flat, outer_flat = flatten(w), flatten(theta)
        left = data["matrix"] + jnp.sin(data["direction"] @ outer_flat) * data["tilt"]
        return arrange(left @ flat - data["slope"] @ outer_flat - data["offset"], w_layout)

    def mapping(w, theta, data):
        return jax.tree.map(jnp.subtract, w, residual(w, theta, data))

    def objective(w, theta, data):
        # With r = Bθ + c, ½⟨w, Aw⟩ − ⟨w, r⟩ = ½⟨w, (Aw − r) − r⟩, where Aw − r is the residual.
        flat, outer_flat = flatten(w), flatten(theta)
        right = data["slope"] @ outer_flat + data["offset"]
        return 0.5 * flat @ (flatten(residual(w, theta, data)) - right)

    conditions = {"quadratic": Stationary(objective), "root": Root(residual), "fixed_point": FixedPoint(mapping)}
    return Problem(conditions[family], outer)


def _solve_affine(data, theta):
    angle = data["direction"] @ theta
    left = data["matrix"] + np.sin(angle) * data["tilt"]
    w = np.linalg.solve(left, data["slope"] @ theta + data["offset"])
    through_matrix = np.outer(np.cos(angle) * data["tilt"] @ w, data["direction"])
    return w, np.linalg.solve(left, data["slope"] - through_matrix), left
