"""Families with a projection or a prox: a quadratic program on a box, on a simplex, and with an ℓ₁ penalty."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel._jaxopt.operators import jaxopt_projection
from bilevel.conditions import Projected, ProximalGradient
from bilevel.problem import Problem
from bilevel.testing.cases import Case, arrange, flatten, outer
from bilevel.testing.families.building_blocks import Options, make_case
from bilevel.testing.families.program import draw_program, program
from bilevel.testing.families.suggested import suggest_iteration


def box(**options: Any) -> Case:
    """Draw ½⟨w, Qw⟩ − ⟨w, Bθ + c⟩ on −ρ ≤ w ≤ ρ with ρ = exp⟨u, θ⟩: one entry is at each bound, the others are free."""
    chosen = Options(**options)
    rng, n = np.random.default_rng(chosen.seed), chosen.size
    theta, numbers = draw_program(rng, chosen)
    side = rng.permutation(np.array([-1.0, 1.0] + [0.0] * (n - 2)))
    radius = np.exp(numbers["direction"] @ theta)
    w = np.where(side == 0, rng.uniform(-0.5, 0.5, n), side) * radius
    pressure = rng.uniform(0.5, 1.5, n) * side  # the negative gradient at a bound points out of the box
    numbers["offset"] = numbers["matrix"] @ w + pressure - numbers["slope"] @ theta
    problem = _projected_problem(chosen.w, chosen.theta, _project_on_box)
    margin = min(np.min(np.abs(pressure[side != 0])), np.min(radius - np.abs(w[side == 0])))
    return make_case("box", chosen, problem, numbers, _solve_box(side), suggest_iteration, theta, margin=margin)


def simplex(**options: Any) -> Case:
    """Draw ½⟨w, Qw⟩ − ⟨w, Bθ + c⟩ on w ≥ 0, Σw = exp⟨u, θ⟩: one entry of the solution is zero, the others are not."""
    chosen = Options(**options)
    rng, n = np.random.default_rng(chosen.seed), chosen.size
    theta, numbers = draw_program(rng, chosen)
    inside = rng.permutation(n) > 0
    weights = rng.uniform(0.5, 1.5, n) * inside
    w = np.exp(numbers["direction"] @ theta) * weights / np.sum(weights)
    pressure = np.where(inside, 0.0, rng.uniform(0.5, 1.5, n))
    numbers["offset"] = numbers["matrix"] @ w + rng.normal() - pressure - numbers["slope"] @ theta
    problem = _projected_problem(chosen.w, chosen.theta, _project_on_simplex)
    margin = min(np.min(w[inside]), np.min(pressure[~inside]))
    solve = _solve_simplex(inside)
    return make_case("simplex", chosen, problem, numbers, solve, suggest_iteration, theta, margin=margin)


def lasso(**options: Any) -> Case:
    """Draw ½⟨w, Qw⟩ − ⟨w, Bθ + c⟩ + λ‖w‖₁ with λ = exp⟨u, θ⟩: one entry of the solution is zero, the others are not."""
    chosen = Options(**options)
    rng, n = np.random.default_rng(chosen.seed), chosen.size
    theta, numbers = draw_program(rng, chosen)
    sign = rng.choice([-1.0, 1.0], n) * (rng.permutation(n) > 0)
    strength = np.exp(numbers["direction"] @ theta)
    w = rng.uniform(0.5, 1.5, n) * sign
    subgradient = np.where(sign == 0, rng.uniform(-0.5, 0.5, n), sign)
    numbers["offset"] = numbers["matrix"] @ w + strength * subgradient - numbers["slope"] @ theta
    problem = _lasso_problem(chosen.w, chosen.theta)
    margin = min(np.min(np.abs(w[sign != 0])), strength * np.min(1 - np.abs(subgradient[sign == 0])))
    return make_case("lasso", chosen, problem, numbers, _solve_lasso(sign), suggest_iteration, theta, margin=margin)


# --- Problems ------------------------------------------------------------------------------------------------------


def _exponential(theta, data):
    return jnp.exp(data["direction"] @ flatten(theta))


@functools.cache
def _projected_problem(w_layout, theta_layout, project):
    del theta_layout  # a key of the cache: each problem object is compiled for one pair of layouts

    def projection(w, theta, data):
        return arrange(project(flatten(w), theta, data), w_layout)

    return Problem(Projected(program, projection), outer)


def _project_on_box(flat, theta, data):
    radius = _exponential(theta, data)
    return jnp.clip(flat, -radius, radius)


def _project_on_simplex(flat, theta, data):
    return jaxopt_projection("projection_simplex", params=_exponential)(flat, theta, data)


@functools.cache
def _lasso_problem(w_layout, theta_layout):
    del theta_layout  # a key of the cache, as above

    def shrink(w, theta, data, step_size):
        flat = flatten(w)
        size = jnp.maximum(jnp.abs(flat) - step_size * _exponential(theta, data), 0.0)
        return arrange(jnp.sign(flat) * size, w_layout)

    return Problem(ProximalGradient(program, shrink), outer)


# --- Closed forms, for the active set that was drawn -----------------------------------------------------------------


def _solve_box(side):
    def closed_form(data, theta):
        radius = np.exp(data["direction"] @ theta)
        active = side != 0
        left = np.where(active[:, None], np.eye(side.size), data["matrix"])
        right = np.where(active, side * radius, data["slope"] @ theta + data["offset"])
        slopes = np.where(active[:, None], np.outer(side * radius, data["direction"]), data["slope"])
        return np.linalg.solve(left, right), np.linalg.solve(left, slopes), left

    return closed_form


def _solve_simplex(inside):
    def closed_form(data, theta):
        total = np.exp(data["direction"] @ theta)
        one = np.ones((np.sum(inside), 1))
        left = np.block([[data["matrix"][np.ix_(inside, inside)], one], [one.T, np.zeros((1, 1))]])
        right = np.append((data["slope"] @ theta + data["offset"])[inside], total)
        slopes = np.vstack([data["slope"][inside], total * data["direction"]])
        return *_padded(left, right, slopes, inside), left

    return closed_form


def _solve_lasso(sign):
    def closed_form(data, theta):
        inside, strength = sign != 0, np.exp(data["direction"] @ theta)
        left = data["matrix"][np.ix_(inside, inside)]
        right = data["slope"] @ theta + data["offset"] - strength * sign
        slopes = data["slope"] - np.outer(strength * sign, data["direction"])
        return *_padded(left, right[inside], slopes[inside], inside), left

    return closed_form


def _padded(left, right, slopes, inside):
    """Solve for the nonzero entries and their derivative, drop any multiplier, and fill the other entries with zero."""
    w, jacobian = np.zeros(inside.size), np.zeros((inside.size, slopes.shape[1]))
    kept = np.sum(inside)
    w[inside], jacobian[inside] = np.linalg.solve(left, right)[:kept], np.linalg.solve(left, slopes)[:kept]
    return w, jacobian
