"""Rates that the user left out, chosen from estimates of the curvature at the start."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.linear import NormalCG
from bilevel.problem import Problem
from bilevel.spectrum import operator_norm, ritz_values
from bilevel.stochastic.rates import RATES, Power
from bilevel.stochastic.samples import PASS, Samples, even_batch
from bilevel.theorem import solve_linear
from bilevel.types import PyTree

BATCHES = 8
"""The number of inner batches whose curvature is estimated. The inner rate follows from the largest estimate."""
RESPONSE_STEPS = 20
"""Steps of each linear solve: for the Newton step of w, and for the response of w to θ."""
OUTER_STEPS = 6
"""Lanczos steps for the outer curvature, of two linear solves each. The chosen rate has a margin of a factor 2."""
WORK = 2**26
"""Limit for the number of entries of w times the number of samples, in the estimates of ``lowest`` and ``outer``."""
FEWEST = 256
"""The estimates of ``lowest`` and ``outer`` may use this number of samples even if ``WORK`` allows fewer."""


@dataclass(frozen=True)
class Curvature:
    """Estimates at the start of a run.

    Attributes:
        batch: the largest norm ‖∂F/∂w‖₂ among some inner batches.
        lowest: the smallest eigenvalue of the symmetric part of ∂F/∂w, on some inner samples. The estimate is a Ritz
            value, so it is too large where ∂F/∂w is ill-conditioned.
        outer: the largest absolute eigenvalue of the Hessian, at d = 0, of d ↦ outer(w + Rd, θ + d). Here w is the
            point after one Newton step, and Rd is the linear response of w to the change d of θ.
    """

    batch: float
    lowest: float
    outer: float


def choose_rates(algorithm: Any, problem: Problem, theta: PyTree, w: PyTree, inner: PyTree, outer: PyTree) -> Any:
    """Return the algorithm with a rate in place of each None.

    With L = ``batch``, μ = ``lowest`` and L_h = ``outer`` of :class:`Curvature`:

    - the inner rate is ρ₀ = 1/(2L), or 1/(3L) for a variance-reduced algorithm
    - the rate of the adjoint is the inner rate
    - the outer rate is c/(2L_h). Here c is the product of ρ₀, μ and the number of steps of w in one step of θ, and is
      clipped to [0.01, 1]. θ is then slow enough for w and the adjoint to follow.

    A variance-reduced algorithm keeps these rates. For any other algorithm they are the rates of the first step, and
    fall with its ``exponents``.

    Args:
        algorithm: an algorithm of this package, or one of your own.
        problem: as for :func:`minimize`.
        theta: θ, a pytree of arrays.
        w: the inner variables, a pytree of arrays.
        inner: the inner samples, a pytree of arrays with one leading axis of samples.
        outer: the outer samples, as for ``inner``.

    Returns:
        The algorithm, with the same rates if none of them was None.

    Raises:
        ValueError: if the estimate of L or of L_h is zero or not finite.
    """
    if getattr(algorithm, "linear_rate", 0) is None and algorithm.inner_rate is not None:
        algorithm = replace(algorithm, linear_rate=algorithm.inner_rate)
    missing = [name for name in RATES if getattr(algorithm, name, 0) is None]
    if not missing:
        return algorithm
    found = estimate(problem, theta, w, inner, outer, algorithm.inner_batch)
    inner_exponent, outer_exponent = getattr(algorithm, "exponents", (0.5, 0.5))
    rate = 1 / ((2 if inner_exponent else 3) * found.batch)
    follow = min(max(getattr(algorithm, "inner_steps", 1) * rate * found.lowest, 0.01), 1.0)
    outer_rate = follow / (2 * found.outer)
    chosen = {
        "inner_rate": _falling(rate, inner_exponent),
        "linear_rate": _falling(rate, inner_exponent),
        "outer_rate": _falling(outer_rate, outer_exponent),
    }
    return replace(algorithm, **{name: chosen[name] for name in missing})


def estimate(problem: Problem, theta: PyTree, w: PyTree, inner: PyTree, outer: PyTree, inner_batch: int) -> Curvature:
    """Return the curvatures near (w, θ), from at most 8 inner batches, 4096 inner samples and 4096 outer samples.

    If w has more than 16,384 entries, the limits of 4096 are lower, but at least 256.

    Raises:
        ValueError: if ``batch`` or ``outer`` is zero or not finite.
    """
    numbers = jax.device_get(_estimate(theta, w, inner, outer, problem, inner_batch))
    found = Curvature(*(float(number) for number in numbers))
    if not (0 < found.batch < float("inf") and 0 < found.outer < float("inf")):
        raise ValueError(
            f"the rates cannot be estimated, because the curvatures at the start are {found}: give every rate that the "
            "algorithm has (inner_rate, linear_rate, outer_rate), or another start"
        )
    return found


@partial(jax.jit, static_argnames=("problem", "inner_batch"))
def _estimate(theta, w, inner, outer, problem, inner_batch):
    condition = problem.condition
    sizes = [jax.tree.leaves(samples)[0].shape[0] for samples in (inner, outer)]
    unknowns = sum(leaf.size for leaf in jax.tree.leaves(w))
    most = max(FEWEST, min(PASS, WORK // max(unknowns, 1)))
    inner_part, outer_part = (_part(samples, size, most) for samples, size in zip((inner, outer), sizes, strict=True))
    samples = Samples(inner, sizes[0], even_batch(sizes[0], inner_batch))
    full = sizes[0] // samples.batch

    def norm_on(number):
        return samples.on_batch(lambda batch: operator_norm(_matvec(condition, w, theta, batch), w), number)

    count = min(BATCHES, full)
    norms = jax.lax.map(norm_on, jnp.arange(count, dtype=jnp.int32) * (full // count))
    matvec = _matvec(condition, w, theta, inner_part)
    transpose = jax.linear_transpose(matvec, w)
    lowest = ritz_values(lambda u: tree.scale(0.5, tree.add(matvec(u), transpose(u)[0])), w)[0]
    # The response of w to θ is often zero at w = 0, so it is taken near the inner solution, after one Newton step.
    residual = condition.residual(w, theta, inner_part)
    w = tree.subtract(w, solve_linear(NormalCG(RESPONSE_STEPS), matvec, residual, symmetric=False)[0])
    matvec_there = _matvec(condition, w, theta, inner_part)
    floats, join = tree.partition_inexact(theta)

    def response(tangent):
        moved = jax.jvp(lambda floats: condition.residual(w, join(floats), inner_part), (floats,), (tangent,))[1]
        return solve_linear(NormalCG(RESPONSE_STEPS), matvec_there, tree.scale(-1.0, moved), symmetric=False)[0]

    def outer_value(w, floats):
        value = problem.outer(w, join(floats), outer_part)
        return value[0] if problem.has_aux else value

    # With J = [R; I], the Hessian of d ↦ outer(w + Rd, θ + d) is Jᵀ(∇²outer)J: one solve for R and one for Rᵀ.
    pull_back = jax.linear_transpose(response, floats)

    def hessian(tangent):
        gradient = jax.grad(outer_value, (0, 1))
        through_w, through_theta = jax.jvp(gradient, (w, floats), (response(tangent), tangent))[1]
        return tree.add(pull_back(through_w)[0], through_theta)

    ritz = ritz_values(hessian, floats, OUTER_STEPS)
    return jnp.max(norms), lowest, jnp.max(jnp.abs(ritz))


def _matvec(condition: Condition, w: PyTree, theta: PyTree, data: PyTree):
    return jax.linearize(lambda w: condition.residual(w, theta, data), w)[1]


def _part(samples, size, most):
    """Return at most ``most`` samples, at equal distances."""
    return samples if size <= most else jax.tree.map(lambda leaf: leaf[:: -(-size // most)], samples)


def _falling(rate, exponent):
    return Power(rate, exponent) if exponent else rate
