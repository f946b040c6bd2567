"""Verification of a preset's meta-gradient at its real size, in float64, against independent computations.

From the parameters θ, a preset adapts to a task by an inner solver with a small budget, for example 16 steps. The
solver stops at parameters φ before it has reached the inner solution. Two questions are therefore answered separately.

1. Does the preset's CG iterate on the system (I + H/λ)g = v, whose solution is the meta-gradient g? Here λ is the
   preset's ``strength``, H the Hessian of the support loss at φ, and v the gradient of the query loss at φ. The
   preset's g is compared with the g of a CG solve to a relative residual of 1e-9. The residuals of both are computed
   with a Hessian-vector product that this module derives from the support loss alone.
2. Is the solution g of this system the derivative of the query loss at the inner solution? Here the inner problem is
   solved to an inner gradient of 1e-9. The implicit gradient g is compared with central differences, for which the
   inner problem is solved again at each θ. It is also compared with unrolled MAML, whose gradient converges to g as the
   number of steps grows. With ReLU, gradient descent steps across kinks of the objective and reaches no stationary
   point. This comparison therefore uses a smooth variant of the network, with the same sizes and the same task:
   softplus(10x)/10 in place of ReLU, means in place of maxima.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel as bl
from imaml.datasets import Dataset
from imaml.errors import InputError
from imaml.learning.algorithms import Learner
from imaml.learning.meta_gradient import meta_gradient
from imaml.learning.tasks import Task
from imaml.runs import data as run_data
from imaml.runs.results import TRUNCATED, Verification
from imaml.settings.preset import Preset

SOLVED = 1e-8
"""Relative residual at which a linear solve counts as exact, far below the tolerance ``DIFFERENCED`` of gradients."""
DIFFERENCED = 1e-4
"""Tolerance for |slope − difference quotient| relative to the gradient's norm; the quotient's error is added to it."""
STATIONARY = 1e-9
"""Norm of the inner gradient at which the inner problem counts as solved.

Differences over steps of 1e-3 in θ then have an error of about 1e-6.
"""
STAGES = 7  # number of messages of a verification
LONG = 1000
"""CG budget of a solve that counts as exact."""


def verify(
    preset: Preset,
    data: str | Path | None = None,
    *,
    dataset: str | Dataset | None = None,
    steps: Sequence[int] = (16, 64, 256, 1024),
    directions: int = 2,
    on_event: Callable[[str], None] = lambda message: None,
) -> Verification:
    """Verify the meta-gradient of one training task of a preset, at the initial θ.

    Args:
        preset: the settings; they are used at their real size.
        data: the folder of the dataset's files, for a dataset that is read from files.
        dataset: one's own data, as in :func:`imaml.train`.
        steps: numbers of steps of unrolled MAML, increasing.
        directions: number of directions in θ along which gradients are compared with differences and with unrolled
            MAML, at least 1. The first is the implicit gradient; the others are random.
        on_event: called with a message before each computation, such as ``"2 of 7: …"``.

    Raises:
        InputError: if the data cannot be used, or if the preset's algorithm is not implicit MAML as in the paper.
    """
    begin = time.monotonic()
    if preset.algorithm != "imaml" or preset.fidelity != "paper":
        raise InputError(f"verify compares with the paper's equations, but {preset.name} uses {preset.title}")
    stages = itertools.count(1)

    def announce(message):
        on_event(f"{next(stages)} of {STAGES}: {message}")

    announce(f"reading {run_data.name_of(preset, dataset)}")
    _, present, _ = run_data.choose(preset, data, dataset)
    classes = run_data.usable(preset, present, "train", on_event)
    with jax.enable_x64(True):
        source = jax.tree.map(jnp.asarray, classes.source)
        task = _as_double(preset.training_episode.sample(source, preset.keys.train))
        theta = _as_double(preset.functions.init(preset.keys.init))
        checks = list(check_system(preset.learner, theta, task, announce))
        smooth = replace(preset.learner, apply=preset.network.smooth_variant(preset.episode.outputs).apply)
        checks += check_solution(smooth, theta, task, steps, directions, announce)
        size = ravel_pytree(theta)[0].size
    return Verification(preset.name, size, tuple(checks), time.monotonic() - begin)


def _as_double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


# --- 1. The adjoint system at the preset's φ -----------------------------------------------------------------------


def check_system(
    learner: Learner, theta: dict, task: Task, on_event: Callable[[str], None] = lambda message: None
) -> tuple[bl.Check, bl.Check]:
    """Compare the learner's meta-gradient with the solution of (I + H/λ)g = v at the φ that its inner solver reaches.

    Args:
        learner: network, loss, λ, inner solver and method.
        theta: the parameters θ, in float64.
        task: one task, in float64.
        on_event: called with a message before each computation.

    Returns:
        Two checks. The first passes if a long CG solve reaches a relative residual of ``SOLVED``. The second passes if
        the residual that the learner reports for its own CG solve is the true one and at most 1. The text of the second
        also gives the relative error of the learner's gradient.
    """
    on_event("computing the meta-gradient at the preset's budget")
    batch = jax.tree.map(lambda array: array[None], task)
    out = jax.jit(meta_gradient(learner))(theta, batch)
    phi = jax.jit(learner.adapt)(theta, task).w
    on_event(f"solving the adjoint system at the preset's φ to a relative residual of {0.1 * SOLVED:g}")
    exact = _implicit(learner, phi, theta, task).gradient
    residual = partial(_system_residual, learner, phi, task)
    solved, truncated, reported = float(residual(exact)), float(residual(out.gradient)), float(out.linear_residual[0])
    system = bl.Check(
        "(I + H/λ)g = v",
        solved <= SOLVED,
        f"relative residual {solved:.1e}, by a Hessian-vector product that the method does not use",
        f"the residual should be below {SOLVED:g}: the system is indefinite or singular (increase strength), or the "
        "adjoint solve is wrong.",
        solved,
    )
    if not out.tasks:
        return system, bl.Check(
            TRUNCATED,
            False,
            f"relative residual {reported:.1%}, which is worse than that of the zero vector",
            "training leaves this task out, because CG has not come near the solution at the preset's budget: increase "
            "linear.max_steps or strength.",
        )
    # The two products round differently, so the reported and the recomputed residual agree only to a tolerance.
    agree = abs(truncated - reported) <= SOLVED + 1e-6 * truncated
    cg = bl.Check(
        TRUNCATED,
        bool(agree),
        f"relative residual {truncated:.1%} (reported: {reported:.1%}); relative error of the gradient "
        f"{_gap(out.gradient, exact):.1%}, cosine {_cosine(out.gradient, exact):.3f}",
        "the reported residual is not that of (I + H/λ)g = v: the method solves another system.",
        _gap(out.gradient, exact),
    )
    return system, cg


def _system_residual(learner, phi, task, gradient):
    """Return ‖v − g − Hg/λ‖ / ‖v‖, computed from the network and the loss without code of :mod:`bilevel`."""

    def loss(x, y):
        return lambda phi: learner.loss(learner.apply(phi, x), y)

    @jax.jit
    def residual(phi, task, gradient):
        v = jax.grad(loss(task.query_x, task.query_y))(phi)
        hessian_g = jax.jvp(jax.grad(loss(task.support_x, task.support_y)), (phi,), (gradient,))[1]
        rest = jax.tree.map(lambda v, g, hg: v - g - hg / learner.strength, v, gradient, hessian_g)
        return _norm(rest) / _norm(v)

    return residual(phi, task, gradient)


def _implicit(learner, phi, theta, task):
    """Return the hypergradient at φ. CG solves the adjoint system to a relative residual of 0.1 ``SOLVED``."""
    method = bl.Implicit(bl.CG(LONG, tol=0.1 * SOLVED))
    at_init = bl.value_and_hypergradient(learner.problem, lambda condition, init, *_: init, method, on_failure="ignore")
    return at_init(theta, phi, task)


# --- 2. The derivative of the inner solution -----------------------------------------------------------------------


def check_solution(
    learner: Learner, theta: dict, task: Task, steps: Sequence[int], directions: int, on_event: Callable[[str], None]
) -> tuple[bl.Check, ...]:
    """Compare the implicit gradient at a solved inner problem with central differences and with unrolled MAML.

    Args:
        learner: a learner with a smooth network and loss.
        theta: the parameters θ, in float64.
        task: one task, in float64.
        steps: numbers of steps of unrolled MAML, increasing.
        directions: number of directions in θ, at least 1: the implicit gradient, then random ones.
        on_event: called with a message before each computation.

    Returns:
        Three checks: the inner problem and the adjoint system are solved, the implicit gradient agrees with central
        differences, and the gradient of unrolled MAML converges to the implicit gradient.
    """
    flat, unravel = ravel_pytree(theta)
    on_event(f"adapting the smooth variant by {steps[-1]} steps of gradient descent")
    path = _Unrolled(learner, theta, task)
    end = path.run(jax.tree.map(jnp.zeros_like, theta), (steps[-1],))[-1]
    on_event("solving the inner problem of the smooth variant by Newton's method")
    solve = _newton(learner)
    solution = solve(theta, end.w, task)
    residual = float(solution.residual_norm)
    out = _implicit(learner, solution.w, theta, task)
    length, linear = float(_norm(out.gradient)), float(_system_residual(learner, solution.w, task, out.gradient))
    solved = bl.Check(
        "smooth solution",
        residual <= STATIONARY and linear <= SOLVED,
        f"‖F‖ = {residual:.1e}; relative residual of (I + H/λ)g = v {linear:.1e}",
        "the inner problem or the adjoint system was not solved, so the rows below are not meaningful.",
        residual,
    )
    chosen = np.random.default_rng(0).normal(size=(directions, flat.size))
    chosen[0] = ravel_pytree(out.gradient)[0]
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    chosen = [unravel(jnp.asarray(direction)) for direction in chosen]
    ours = np.array([float(_vdot(out.gradient, direction)) for direction in chosen])
    on_event("computing central differences of the re-solved smooth variant")
    differences = _check_differences(learner, solve, theta, solution.w, task, chosen, ours, length)
    on_event(f"unrolling MAML over {', '.join(map(str, steps))} steps")
    unrolled = np.array([[float(point.slope) for point in path.run(direction, steps)] for direction in chosen])
    gaps = np.abs(unrolled - ours[:, None]).max(axis=0) / length
    return solved, differences, _check_gaps(gaps, steps)


def _newton(learner):
    """Return a function (θ, start, task) → Solution: Newton-CG to an inner gradient of 0.1 ``STATIONARY``."""
    solver = bl.HessianFree(max_steps=60, cg_steps=200, tol=0.1 * STATIONARY)
    return jax.jit(lambda theta, w, task: bl.solve(solver, learner.problem.condition, w, theta, task))


def _check_differences(learner, solve, theta, w, task, directions, ours, length):
    """Compare slopes of the implicit gradient with central differences of the query loss at the re-solved φ.

    Richardson extrapolation from step sizes h and h/2 removes the error of order h². The difference between the two
    slopes is taken as a bound of the error that remains.
    """
    query = jax.jit(lambda phi: learner.problem.outer(phi, theta, task)[0])  # type: ignore[index]
    largest = 1e-4 * float(_norm(theta))
    theirs, uncertainty, residual = [], [], 0.0
    for direction in directions:
        slopes = []
        for h in (largest, largest / 2):
            ends = [solve(jax.tree.map(lambda t, d, s=s: t + s * d, theta, direction), w, task) for s in (h, -h)]
            slopes.append(float(query(ends[0].w) - query(ends[1].w)) / (2 * h))
            residual = max(residual, *(float(end.residual_norm) for end in ends))
        theirs.append((4 * slopes[1] - slopes[0]) / 3)
        uncertainty.append(abs(slopes[1] - slopes[0]))
    error, doubt = np.abs(np.array(theirs) - ours), np.array(uncertainty)
    ok = bool((error <= DIFFERENCED * length + doubt).all() and (doubt <= 10 * DIFFERENCED * length).all())
    found = f"relative deviation {error.max() / length:.1e}, error of the differences {doubt.max() / length:.1e}"
    return bl.Check(
        "finite differences",
        ok and residual <= STATIONARY,
        f"{found}; re-solved to ‖F‖ = {residual:.1e}",
        "the implicit gradient is not the derivative of the solution, or the inner problem was not re-solved.",
        float(error.max() / length),
    )


def _check_gaps(gaps, steps):
    """Check that unrolled MAML converges to the implicit gradient.

    The gap must shrink from each number of steps to the next, and by a factor of 10 in total. A gap below
    ``DIFFERENCED`` need not shrink further.
    """
    falls = all(late < early or late < DIFFERENCED for early, late in itertools.pairwise(gaps))
    ok = bool(falls and (gaps[-1] < 0.1 * gaps[0] or gaps[-1] < DIFFERENCED))
    shown = ", ".join(f"{gap:.1e} ({count})" for gap, count in zip(gaps, steps, strict=True))
    remedy = (
        "unrolled MAML does not converge to the implicit gradient: descent does not converge, or a gradient is wrong."
    )
    return bl.Check("unrolled MAML", ok, f"relative gap (after steps): {shown}", remedy, float(gaps[-1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Point:
    """State of unrolled MAML after some steps: φ, its tangent, and the slope of the query loss along the tangent."""

    w: Any
    tangent: Any
    slope: Any


class _Unrolled:
    """Gradient descent on the proximal objective from θ, differentiated in forward mode along one direction in θ.

    The slope of the query loss along the resulting tangent of φ is the directional derivative of unrolled MAML's loss.
    Forward mode stores no iterates, so the memory does not depend on the number of steps.
    """

    def __init__(self, learner: Learner, theta: dict, task: Task):
        self._theta, self._task = theta, task
        rate = 1 / _largest_curvature(learner, theta, task)
        if isinstance(learner.solver, bl.GradientDescent):
            rate = min(learner.solver.step_size, rate)
        step, problem = bl.GradientDescent(rate, max_steps=1), learner.problem

        @jax.jit
        def advance(w, tangent, direction, count, theta, task):
            def move(w, theta):
                return bl.solve(step, problem.condition, w, theta, task).w

            def body(_, carry):
                return jax.jvp(move, (carry[0], theta), (carry[1], direction))

            w, tangent = jax.lax.fori_loop(0, count, body, (w, tangent))
            query = partial(_query_value, problem, theta=theta, task=task)
            return _Point(w, tangent, jax.jvp(query, (w,), (tangent,))[1])

        self._advance = advance

    def run(self, direction: dict, steps: Sequence[int]) -> list[_Point]:
        """Return the state after each number of steps in ``steps``, which must increase."""
        points, w, tangent, done = [], self._theta, direction, 0
        for count in steps:
            points.append(self._advance(w, tangent, direction, count - done, self._theta, self._task))
            w, tangent, done = points[-1].w, points[-1].tangent, count
        return points


def _query_value(problem, phi, theta, task):
    return problem.outer(phi, theta, task)[0]


def _largest_curvature(learner, theta, task, products=20):
    """Return an estimate of the largest |eigenvalue| of the inner objective's Hessian at φ = θ.

    Power iteration approaches that eigenvalue from below; a fifth is added so that the estimate is not too small.
    """

    @jax.jit
    def iterate(theta, task):
        product = jax.linearize(lambda phi: learner.problem.condition.residual(phi, theta, task), theta)[1]

        def body(_, u):
            u = product(u)
            return jax.tree.map(lambda leaf: leaf / _norm(u), u)

        start = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype), theta)
        return _norm(product(jax.lax.fori_loop(0, products, body, start)))

    return 1.2 * float(iterate(theta, task))


# --- Arithmetic ----------------------------------------------------------------------------------------------------


def _vdot(a, b):
    return ravel_pytree(a)[0] @ ravel_pytree(b)[0]


def _norm(a):
    return jnp.linalg.norm(ravel_pytree(a)[0])


def _gap(one, other):
    return float(_norm(jax.tree.map(jnp.subtract, one, other)) / _norm(other))


def _cosine(one, other):
    return float(_vdot(one, other) / (_norm(one) * _norm(other)))
