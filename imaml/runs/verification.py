"""Verification of a preset's meta-gradient at its real size, in float64, against independent computations.

From the parameters θ, a preset adapts to a task by an inner solver with a small budget, for example 16 steps. The
solver stops at parameters φ before it has reached the inner solution. Two questions are therefore answered separately.

1. Does the preset's CG iterate on the system (I + H/λ)g = v, whose solution is the meta-gradient g? Here λ is the
   preset's ``strength``, H the Hessian of the support loss at φ, and v the gradient of the query loss at φ. The
   preset's g is compared with the g of a CG solve to a relative residual of 1e-9. The residuals of both are computed
   with a Hessian-vector product that :mod:`imaml.runs.task_derivatives` derives from the support loss alone.
2. Is the solution g of this system the derivative of the query loss at the inner solution? Here the inner problem is
   solved to an inner gradient of 1e-9. The implicit gradient g is compared with central differences, for which the
   inner problem is solved again at each θ. It is also compared with unrolled MAML, whose gradient converges to g as the
   number of steps grows. With ReLU, gradient descent steps across kinks of the objective and reaches no stationary
   point. Both comparisons therefore use a smooth variant of the network, with the same sizes and the same task:
   softplus(10x)/10 in place of ReLU, means in place of maxima.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel as bl
from imaml.datasets import Dataset
from imaml.errors import InputError
from imaml.learning.algorithms import Learner, constant_step_size
from imaml.learning.meta_gradient import meta_gradient
from imaml.learning.tasks import Task
from imaml.runs import data as run_data
from imaml.runs.results import TRUNCATED, BudgetCheck, Verification
from imaml.runs.task_derivatives import TaskDerivatives, conjugate_gradients, flat
from imaml.settings.preset import Preset

SOLVED = 1e-8
"""Relative residual at which a linear solve counts as exact, far below the tolerance ``DIFFERENCED`` of gradients."""
DIFFERENCED = 1e-4
"""Tolerance for |slope − difference quotient| relative to the gradient's norm; the quotient's error is added to it."""
STATIONARY = 1e-9
"""Norm of the inner gradient at which the inner problem counts as solved.

Differences over steps of about 1e-3 in θ then have an error of about 1e-6.
"""
STAGES = 7  # number of messages of a verification
LONG = 1000
"""CG budget of a solve that counts as exact."""
MORE, NEAR = 32, 0.1
"""To explain the error of the truncated gradient, CG runs with budgets of up to ``MORE`` times the preset's, until the
relative error of the gradient is below ``NEAR``."""
QUICK = {"xla_backend_optimization_level": 0}
"""Options to compile a program that runs once: all optimisations would take longer than they save."""


def verify(
    preset: Preset,
    data: str | Path | None = None,
    *,
    dataset: str | Dataset | None = None,
    steps: Sequence[int] = (16, 64, 256, 1024),
    directions: int = 2,
    on_event: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Verify the meta-gradient of one training task of a preset, at the initial θ.

    Args:
        preset: the settings; they are used at their real size.
        data: the folder of the dataset's files, for a dataset that is read from files.
        dataset: one's own data, as in :func:`imaml.train`.
        steps: numbers of steps of unrolled MAML, increasing.
        directions: number of directions in θ along which gradients are compared with differences and with unrolled
            MAML, at least 1. The first is the implicit gradient; the others are random.
        on_event: called with a message before each computation, such as ``"2 of 7: …"``, and if classes have too few
            images and are left out.
        on_progress: called with two numbers: the parts of the present computation that are done, and all its parts.

    Raises:
        InputError: if the data cannot be used, if the preset's algorithm is not implicit MAML as in the paper, or if
            its network has no method ``smooth_variant(outputs)``, as a network of your own may lack.
    """
    begin = time.monotonic()
    if preset.algorithm != "imaml" or preset.fidelity != "paper":
        raise InputError(
            f"verify compares with the paper's equations, but {preset.name} uses {preset.title}: choose a preset with "
            "the algorithm imaml and the fidelity paper"
        )
    if not hasattr(preset.network, "smooth_variant"):
        raise InputError(
            f"verify needs a network without kinks, but {type(preset.network).__name__} has no method smooth_variant: "
            "add one that takes the number of outputs and returns the same imaml.Network with a smooth activation"
        )
    stages = itertools.count(1)

    def announce(message):
        on_event(f"{next(stages)} of {STAGES}: {message}")

    announce(f"reading {run_data.name_of(preset, dataset)}")
    _, present, _ = run_data.choose(preset, data, dataset)
    classes = run_data.usable(preset, present, "train", on_event)
    with jax.enable_x64(True):
        source = jax.tree.map(jnp.asarray, classes.source)
        task = _as_double(jax.jit(preset.training_episode.sample)(source, preset.keys.train))
        theta = _as_double(jax.jit(preset.functions.init)(preset.keys.init))
        checks = list(check_system(preset.learner, theta, task, announce))
        smooth = replace(preset.learner, apply=preset.network.smooth_variant(preset.episode.outputs).apply)
        checks += check_solution(smooth, theta, task, steps, directions, announce, on_progress)
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
        the residual that the learner reports for its own CG solve is the true one and at most 1. Unless the residual is
        above 1, the second is a :class:`.BudgetCheck`, whose text also gives the relative error of the learner's
        gradient.
    """
    on_event("computing the meta-gradient at the preset's budget")
    batch = jax.tree.map(lambda array: array[None], task)
    with _compiler() as compiling:
        budget = compiling(meta_gradient(learner), theta, batch, **QUICK)
        adapt = compiling(learner.adapt, theta, task, **QUICK)
        implicit = compiling(_implicit(learner), theta, theta, task, **QUICK)
    out, phi = budget(theta, batch), adapt(theta, task).w
    on_event(f"solving the adjoint system at the preset's φ to a relative residual of {0.1 * SOLVED:g}")
    exact, ours = flat(implicit(theta, phi, task).gradient), flat(out.gradient)
    derivatives, at = TaskDerivatives(learner, theta, task), flat(phi)
    solved, truncated = derivatives.residual(at, exact), derivatives.residual(at, ours)
    reported = float(out.linear_residual[0])
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
    distance, cosine = _distance(ours, exact), float(ours @ exact / (_norm(ours) * _norm(exact)))
    start, solver, method = flat(theta), learner.solver, learner.method
    at_start = _norm(derivatives.inner(start, start, start)[0])
    cg = BudgetCheck(
        TRUNCATED,
        bool(agree),
        f"relative residual {truncated:.1%} (reported: {reported:.1%}); relative error of the gradient "
        f"{distance:.1%}, cosine {cosine:.3f}",
        "the reported residual is not that of (I + H/λ)g = v: the method solves another system.",
        distance,
        residual=truncated,
        cosine=cosine,
        inner_steps=solver.max_steps,  # type: ignore[attr-defined]  # the solvers of a preset have a budget
        inner_residual=float(out.inner_residual[0]) / at_start,
        **_longer(derivatives, at, exact, method.linear.max_steps),  # type: ignore[attr-defined]
    )
    return system, cg


def _longer(derivatives, phi, exact, steps):
    """Run CG for twice, four times, … the steps, and return the fields ``longer`` and ``indefinite`` of the check.

    The longest budget is ``MORE`` times the steps, or the first one that leaves a relative error below ``NEAR``.
    """
    v, found, least = derivatives.query(phi)[1], [], 0.0
    path = conjugate_gradients(lambda u: derivatives.inner(phi, phi, u)[1] / derivatives.strength, v)
    for count, (x, residual, curvature) in enumerate(path, start=1):
        least = min(least, curvature)
        if count == 2 ** (len(found) + 1) * steps:
            found.append((count, residual / _norm(v), _distance(x, exact)))
            if found[-1][2] < NEAR or 2 * count > MORE * steps:
                break
    return {"longer": tuple(found), "indefinite": least < 0}


def _implicit(learner):
    """Return a function (θ, φ, task) → the hypergradient at φ.

    CG solves the adjoint system to a relative residual of 0.1 ``SOLVED``.
    """
    method = bl.Implicit(bl.CG(LONG, tol=0.1 * SOLVED))
    return bl.value_and_hypergradient(learner.problem, lambda condition, init, *_: init, method, on_failure="ignore")


@contextmanager
def _compiler():
    """Yield a function ``(function, *arguments, **options) → program`` that compiles on another thread.

    Calling a program waits until it is compiled. Up to one compilation per core runs at the same time.
    """
    threads = ThreadPoolExecutor(os.cpu_count())

    def compiling(function, *arguments, **options):
        program = threads.submit(jax.jit(function).lower(*arguments).compile, options)
        return lambda *arguments: program.result()(*arguments)

    yield compiling
    threads.shutdown(wait=False)


# --- 2. The derivative of the inner solution -----------------------------------------------------------------------


def check_solution(
    learner: Learner,
    theta: dict,
    task: Task,
    steps: Sequence[int],
    directions: int,
    on_event: Callable[[str], None],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[bl.Check, ...]:
    """Compare the implicit gradient at a solved inner problem with central differences and with unrolled MAML.

    Args:
        learner: a learner with a smooth network and loss.
        theta: the parameters θ, in float64.
        task: one task, in float64.
        steps: numbers of steps of unrolled MAML, increasing.
        directions: number of directions in θ, at least 1: the implicit gradient, then random ones.
        on_event: called with a message before each computation.
        on_progress: called with two numbers: the parts of the present computation that are done, and all its parts.

    Returns:
        Three checks: the inner problem and the adjoint system are solved, the implicit gradient agrees with central
        differences, and the gradient of unrolled MAML converges to the implicit gradient.
    """
    unravel, start = ravel_pytree(theta)[1], flat(theta)
    derivatives = TaskDerivatives(learner, theta, task)

    def at_rest(direction):
        """Return the state of the unrolled descent before its first step."""
        zero = np.zeros_like(start)
        return (start, zero), (direction, zero)

    on_event(f"unrolling MAML of the smooth variant over {', '.join(map(str, steps))} steps")
    with _compiler() as compiling:
        unrolled = compiling(derivatives.unrolled, at_rest(start), start, 1.0, 1.0, 1, start, task)
        newton = compiling(_newton(learner), theta, theta, task)
        implicit = compiling(_implicit(learner), theta, theta, task, **QUICK)
    rate = 1 / _largest_curvature(derivatives, start)
    if isinstance(learner.solver, bl.GradientDescent):
        rate = min(constant_step_size(learner.solver), rate)
    # If the support loss is convex, no eigenvalue of the inner objective's Hessian is below λ. If λ is the
    # smallest eigenvalue, descent at this rate converges fastest with the momentum (1 − √(rate·λ))². After many steps,
    # each step then multiplies the error by about 1 − √(rate·λ).
    momentum = max(0.0, 1 - math.sqrt(rate * derivatives.strength)) ** 2

    def slopes(direction, number):
        """Return φ after ``steps[-1]`` steps, and MAML's slope along a direction after each number in ``steps``."""
        state, done, found = at_rest(direction), 0, []
        for count in steps:
            state = unrolled(state, direction, rate, momentum, count - done, start, task)
            (phi, _), (tangent, _) = state
            found.append(float(derivatives.query(phi)[1] @ tangent))
            done = count
            on_progress(number * steps[-1] + done, directions * steps[-1])
        return phi, found

    # The random directions do not depend on the solution. Unroll along them first: the last φ is where Newton starts.
    chosen = np.random.default_rng(0).normal(size=(directions, start.size))
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    paths = [slopes(direction, number) for number, direction in enumerate(chosen[1:])]
    end, _ = paths[-1] if paths else slopes(start, 0)
    on_event("solving the inner problem of the smooth variant by Newton's method")

    def solve(theta, phi):
        solution = newton(unravel(jnp.asarray(theta)), unravel(jnp.asarray(phi)), task)
        return flat(solution.w), float(solution.residual_norm)

    phi, residual = solve(start, end)
    gradient = flat(implicit(theta, unravel(jnp.asarray(phi)), task).gradient)
    length, linear = _norm(gradient), derivatives.residual(phi, gradient)
    solved = bl.Check(
        "smooth solution",
        residual <= STATIONARY and linear <= SOLVED,
        f"‖F‖ = {residual:.1e}; relative residual of (I + H/λ)g = v {linear:.1e}",
        "the inner problem or the adjoint system was not solved, so the rows below are not meaningful.",
        residual,
    )
    chosen[0] = gradient / length
    ours = chosen @ gradient
    on_event("computing central differences of the re-solved smooth variant")
    differences = _check_differences(derivatives, solve, start, phi, chosen, ours, length, on_progress)
    on_event("unrolling MAML along the implicit gradient")
    theirs = np.array([slopes(chosen[0], directions - 1)[1], *(found for _, found in paths)])
    gaps = np.abs(theirs - ours[:, None]).max(axis=0) / length
    return solved, differences, _check_gaps(gaps, steps)


def _newton(learner):
    """Return a function (θ, start, task) → Solution: Newton-CG to an inner gradient of 0.1 ``STATIONARY``."""
    solver = bl.HessianFree(max_steps=60, cg_steps=200, tol=0.1 * STATIONARY)
    return lambda theta, phi, task: bl.solve(solver, learner.problem.condition, phi, theta, task)


def _check_differences(derivatives, solve, theta, phi, directions, ours, length, on_progress):
    """Compare slopes of the implicit gradient with central differences of the query loss at the re-solved φ.

    Richardson extrapolation from step sizes h and h/2 removes the error of order h². The difference between the two
    slopes is taken as a bound of the error that remains.
    """
    largest = 1e-4 * _norm(theta)
    theirs, uncertainty, residuals = [], [], []
    for number, direction in enumerate(directions):
        slopes = []
        for half, h in enumerate((largest, largest / 2)):
            ends = [solve(theta + s * direction, phi) for s in (h, -h)]
            above, below = (derivatives.query(end)[0] for end, _ in ends)
            slopes.append((above - below) / (2 * h))
            residuals += [residual for _, residual in ends]
            on_progress(2 * number + half + 1, 2 * len(directions))
        theirs.append((4 * slopes[1] - slopes[0]) / 3)
        uncertainty.append(abs(slopes[1] - slopes[0]))
    error, doubt, residual = np.abs(np.array(theirs) - ours), np.array(uncertainty), max(residuals)
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

    The last gap must be the smallest, and below a tenth of the first. A gap below ``DIFFERENCED`` counts as zero. In
    the first steps, the gap of descent with momentum may rise.
    """
    last = gaps[-1]
    ok = bool(last < DIFFERENCED or (last < 0.1 * gaps[0] and last <= gaps.min()))
    shown = ", ".join(f"{gap:.1e} ({count})" for gap, count in zip(gaps, steps, strict=True))
    remedy = (
        "unrolled MAML does not converge to the implicit gradient: descent does not converge, or a gradient is wrong."
    )
    return bl.Check("unrolled MAML", ok, f"relative gap (after steps): {shown}", remedy, float(gaps[-1]))


def _largest_curvature(derivatives, theta, products=20):
    """Return an estimate of the largest |eigenvalue| of the inner objective's Hessian at φ = θ.

    Power iteration approaches that eigenvalue from below; a fifth is added so that the estimate is not too small.
    """
    u = np.random.default_rng(0).normal(size=theta.size)
    for _ in range(products):
        u = derivatives.inner(theta, theta, u / _norm(u))[1]
    return 1.2 * _norm(u)


def _norm(vector):
    return float(np.linalg.norm(vector))


def _distance(one, other):
    """Return ‖one − other‖ / ‖other‖."""
    return _norm(one - other) / _norm(other)
