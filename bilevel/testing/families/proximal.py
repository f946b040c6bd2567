"""The family of implicit MAML: a quadratic loss with a proximal term that pulls the parameters to θ."""

import functools
from typing import Any

import numpy as np

from bilevel.conditions import Proximal
from bilevel.problem import Problem
from bilevel.testing.cases import Case, arrange, flatten, outer
from bilevel.testing.families.building_blocks import Options, make_case, symmetric_matrix
from bilevel.testing.families.suggested import suggest_descent


def imaml(strength: str = "one", **options: Any) -> Case:
    """Draw the implicit MAML problem with inner objective ½⟨w − t, H(w − t)⟩ + ½λ‖w − θ‖².

    The adjoint system of its hypergradient is (I + H/λ)v = ∂outer/∂w.

    Args:
        strength: ``"one"`` for a single number λ, or ``"each"`` for one λ per parameter. θ is laid out like w.
        options: see :class:`Options`.
    """
    if strength not in ("one", "each"):
        raise ValueError(f'strength must be "one", a single λ, or "each", one λ per parameter, got {strength!r}')
    chosen = Options(**({"theta": options.get("w", "flat")} | options))
    if chosen.theta != chosen.w:
        raise ValueError(f"in imaml, theta has the layout of w, got {chosen}")
    rng, n = np.random.default_rng(chosen.seed), chosen.size
    strengths = np.full(n, 1 / chosen.condition)
    if strength == "each":
        strengths *= rng.uniform(0.5, 2.0, n)
    numbers = {
        "hessian": symmetric_matrix(rng, n, chosen.condition),
        "target": rng.normal(size=n),
        "strength": arrange(strengths, chosen.w) if strength == "each" else strengths[0],
    }
    problem = _imaml_problem(chosen.w)
    return make_case("imaml", chosen, problem, numbers, _solve_imaml, suggest_descent, n, extra={"strength": strength})


@functools.cache
def _imaml_problem(layout):
    del layout  # a key of the cache: each problem object is compiled for one layout

    def objective(w, theta, data):
        away = flatten(w) - data["target"]
        return 0.5 * away @ data["hessian"] @ away

    return Problem(Proximal(objective, strength=lambda theta, data: data["strength"], positive_definite=True), outer)


def _solve_imaml(data, theta):
    pull = flatten(data["strength"], np) * np.ones(theta.size)
    left = data["hessian"] + np.diag(pull)
    w = np.linalg.solve(left, data["hessian"] @ data["target"] + pull * theta)
    return w, np.linalg.solve(left, np.diag(pull)), left
