"""Search for the nearest kink: a jump of F or of a first derivative of F or outer, such as ReLU's at zero."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.verify.local_problem import LocalProblem, random_like
from bilevel.verify.precision import EPS

DISTANCES = tuple(10.0**-k for k in range(1, 9))
"""Distances from the point, relative to :func:`scale_of`, at which F and the derivatives are compared."""


def scale_of(local: LocalProblem) -> float:
    """Return 1 + ‖(w, θ)‖, the unit in which distances from the point are measured."""
    return 1 + float(jnp.linalg.norm(jnp.concatenate([local.w, local.theta])))


def nearest_kink(local: LocalProblem) -> float:
    """Return the smallest distance within which F, or a derivative of F or outer, jumps; infinite if none is found.

    Two random lines through (w, θ) are searched. The values at equal distances on both sides of the point are
    compared. For a smooth function their gap shrinks tenfold from one distance to the next; for a jump it does not.
    The result is relative to :func:`scale_of`.
    """
    closest = math.inf
    for seed in range(2):
        d, e = random_like(local.w, 20 + seed), random_like(local.theta, 30 + seed)
        size = float(jnp.linalg.norm(jnp.concatenate([d, e])))
        closest = min(closest, _nearest_kink_on_line(local, d / size, e / size))
    return closest


def _nearest_kink_on_line(local: LocalProblem, d: jax.Array, e: jax.Array) -> float:
    """Search the line (w, θ) + t·(d, e)."""

    def values(t):
        w, theta = local.w + t * d, local.theta + t * e
        parts = (local.residual(w, theta), local.jvp(w, theta, d, e), *local.outer_gradient(w, theta))
        return [np.asarray(part) for part in parts]

    scale = scale_of(local)
    gaps = []
    for distance in DISTANCES:
        ahead, behind = values(distance * scale), values(-distance * scale)
        gaps.append([np.linalg.norm(a - b) for a, b in zip(ahead, behind, strict=True)])
    rounding = [1e4 * EPS * (1 + np.linalg.norm(part)) for part in values(0.0)]
    closest = math.inf
    for larger, gap, distance in zip(gaps, gaps[1:], DISTANCES[1:], strict=False):
        if any(g > 0.5 * before and g > least for g, before, least in zip(gap, larger, rounding, strict=True)):
            closest = distance
    return closest
