"""The family of the KKT conditions: a quadratic program with linear constraints, whose w includes the multipliers."""

import functools
from typing import Any

import numpy as np

from bilevel.conditions import KKT
from bilevel.problem import Problem
from bilevel.testing.cases import Case, arrange, flatten, outer
from bilevel.testing.families.building_blocks import Options, make_case
from bilevel.testing.families.program import draw_program, program
from bilevel.testing.families.suggested import suggest_newton


def kkt(inequality: bool = False, **options: Any) -> Case:
    """Draw ½⟨x, Qx⟩ − ⟨x, Bθ + c⟩ subject to ⟨e, x⟩ = ⟨u, θ⟩ + f; w is the triple (x, ν, μ) with both multipliers.

    Args:
        inequality: add two inequalities Kx ≤ k, the first active and the second inactive, so that μ = (μ₁, 0). Without
            them μ is None.
        options: see :class:`Options`.
    """
    chosen = Options(**options)
    rng, n = np.random.default_rng(chosen.seed), chosen.size
    theta, numbers = draw_program(rng, chosen)
    rows = np.linalg.qr(rng.normal(size=(n, 3)))[0].T  # e and K, at right angles
    x, equal, unequal, slack = rng.normal(size=n), rng.normal(), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
    numbers |= {"equality": rows[:1], "level": rows[:1] @ x - numbers["direction"] @ theta}
    pull = equal * rows[0]
    solution = [x, [equal]]
    if inequality:
        numbers |= {"inequality": rows[1:], "limit": rows[1:] @ x + [0.0, slack]}
        pull, solution = pull + unequal * rows[1], [*solution, [unequal, 0.0]]
    numbers["offset"] = numbers["matrix"] @ x + pull - numbers["slope"] @ theta
    # Newton's method finds this active set only from nearby. An inactive multiplier that
    # starts at 0 is exactly 0 after each Newton step, so it is not perturbed.
    solution = np.concatenate(solution)
    init = solution + 0.01 * rng.normal(size=solution.size) * (solution != 0)
    margin = min(unequal, slack) if inequality else np.inf
    return make_case(
        "kkt",
        chosen,
        _kkt_problem(chosen.w, chosen.theta, inequality),
        numbers,
        _solve_kkt,
        suggest_newton,
        theta,
        margin=margin,
        init=init,
        arrange_w=lambda flat: (arrange(flat[:n], chosen.w), flat[n : n + 1], flat[n + 1 :] if inequality else None),
        extra={"inequality": inequality},
    )


@functools.cache
def _kkt_problem(w_layout, theta_layout, inequality):
    del w_layout, theta_layout  # keys of the cache: each problem object is compiled for one pair of layouts

    def equality(x, theta, data):
        return data["equality"] @ flatten(x) - data["direction"] @ flatten(theta) - data["level"]

    def below(x, theta, data):
        return data["inequality"] @ flatten(x) - data["limit"]

    return Problem(KKT(program, equality, below if inequality else None), outer)


def _solve_kkt(data, theta):
    """Solve the KKT system with the active inequality as an equality. The inactive one has the multiplier zero."""
    inequality = "inequality" in data
    rows = np.vstack([data["equality"], data["inequality"][:1]]) if inequality else data["equality"]
    levels = data["direction"] @ theta + data["level"]
    slopes = [data["slope"], data["direction"][None]]
    if inequality:
        levels, slopes = np.append(levels, data["limit"][0]), [*slopes, np.zeros((1, theta.size))]
    left = np.block([[data["matrix"], rows.T], [rows, np.zeros((len(rows), len(rows)))]])
    right = np.append(data["slope"] @ theta + data["offset"], levels)
    inactive = int(inequality)
    w = np.append(np.linalg.solve(left, right), np.zeros(inactive))
    jacobian = np.vstack([np.linalg.solve(left, np.vstack(slopes)), np.zeros((inactive, theta.size))])
    return w, jacobian, left
