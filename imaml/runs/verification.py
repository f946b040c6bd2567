"""Is a preset's meta-gradient right? At its real size, in float64, against what shares no step with it.

Two questions are kept apart, because the inner problem of a preset is not solved: sixteen steps are its budget.

1. At the φ that the preset reaches, is its gradient the solution of (I + H/λ)g = v, as far as its CG steps go? A
   long solve gives g; a Hessian-vector product written out here, on the support loss alone, judges both.
2. Is that system the derivative of the inner solution? The inner problem is solved to rounding and the implicit
   gradient compared with central differences of the re-solved problem, and with MAML unrolled over more and more
   steps, which nears it. A network with ReLU has no such solution (descent ends between two kinks), so these two
   are made on its twin: the same sizes and the same task, with softplus(10x)/10 for ReLU and means for maxima.
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
from imaml import datasets
from imaml.errors import InputError
from imaml.learning.algorithms import Learner, meta_gradient
from imaml.learning.tasks import Task
from imaml.settings.preset import Preset

SOLVED = 1e-8
"""The relative residual of a linear solve that counts as exact beside gradients compared to 1e-4."""
DIFFERENCED = 1e-4
"""What an implicit gradient may be off, beside the uncertainty of its differences: a part of its length."""
STATIONARY = 1e-9
"""‖F‖ at which the inner problem counts as solved: differences over 1e-3 then carry some 1e-6 of it."""
LONG = 1000
"""CG iterations for an exact solve."""


@dataclass(frozen=True)
class Verification:
    """What was compared, row by row.

    Attributes:
        preset: its name.
        parameters: how many the network has.
        checks: the rows, :class:`bilevel.Check`.
        seconds: how long it took.
    """

    preset: str
    parameters: int
    checks: tuple[bl.Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every comparison went well."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        title = f"{self.preset}: meta-gradient of one task, {self.parameters} parameters, float64"
        return (
            f"{title}\n{bl.ConditionReport(self.checks)}\n{'ok' if self.ok else 'NOT OK'}, {self.seconds:.0f} seconds"
        )


def verify(
    preset: Preset,
    data: str | Path | None = None,
    *,
    steps: Sequence[int] = (16, 64, 256, 1024),
    directions: int = 2,
    on_event: Callable[[str], None] = lambda message: None,
) -> Verification:
    """Check the meta-gradient of one training task of a preset, at initialisation.

    Args:
        preset: the settings, at their real size.
        data: the folder of the dataset's archives, for a dataset that is not embedded.
        steps: of unrolled MAML, increasing.
        directions: in θ, for differences and unrolled MAML: the gradient's own, and random ones.
        on_event: told in a phrase what comes next.

    Raises:
        InputError: for data that cannot be used, and a preset whose gradient is not the paper's.
    """
    begin = time.monotonic()
    if preset.algorithm != "imaml" or preset.fidelity != "paper":
        raise InputError(f"verify compares with the paper's equations, and {preset.name} is of {preset.title}")
    on_event(f"reading {preset.dataset}")
    dataset = datasets.load(preset.dataset, data)
    preset.training_episode.check(dataset.train, f"{dataset.name}'s training set")
    with jax.enable_x64(True):
        source = jax.tree.map(jnp.asarray, dataset.train.source)
        task = _as_double(preset.training_episode.sample(source, preset.keys.train))
        theta = _as_double(preset.functions.init(preset.keys.init))
        on_event("solving the adjoint system of the preset's own φ to rounding")
        checks = list(check_system(preset.learner, theta, task))
        twin = replace(preset.learner, apply=preset.network.smooth_variant(preset.episode.outputs).apply)
        checks += check_solution(twin, theta, task, steps, directions, on_event)
        size = ravel_pytree(theta)[0].size
    return Verification(preset.name, size, tuple(checks), time.monotonic() - begin)


def _as_double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


# --- 1. The system, at the preset's own φ --------------------------------------------------------------------------


def check_system(learner: Learner, theta: dict, task: Task) -> tuple[bl.Check, bl.Check]:
    """The learner's meta-gradient against (I + H/λ)g = v at the φ that it reaches."""
    batch = jax.tree.map(lambda array: array[None], task)
    out = jax.jit(meta_gradient(learner))(theta, batch)
    phi = jax.jit(learner.adapt)(theta, task).w
    exact = _implicit(learner, phi, theta, task).gradient
    residual = partial(_system_residual, learner, phi, task)
    solved, truncated, said = float(residual(exact)), float(residual(out.gradient)), float(out.linear_residual[0])
    system = bl.Check(
        "(I + H/λ)g = v",
        solved <= SOLVED,
        f"solved to a relative residual of {solved:.1e}, by a product of its own",
        f"the residual should be below {SOLVED:g}: the system is indefinite or singular (increase strength), or the "
        "adjoint solve is wrong.",
        solved,
    )
    # The preset says what its CG left over; ‖r‖ is recomputed here from another product, with its own rounding.
    honest = abs(truncated - said) <= SOLVED + 1e-6 * truncated
    cg = bl.Check(
        "CG at its budget",
        bool(honest),
        f"residual {truncated:.1%} (reported: {said:.1%}); gradient off by {_gap(out.gradient, exact):.1%}, "
        f"cosine {_cosine(out.gradient, exact):.3f}",
        "the reported residual is not that of (I + H/λ)g = v: the method solves another system.",
        _gap(out.gradient, exact),
    )
    return system, cg


def _system_residual(learner, phi, task, gradient):
    """‖v − g − Hg/λ‖ / ‖v‖, from the network and the loss alone."""

    def loss(x, y):
        return lambda phi: learner.loss(learner.apply(phi, x), y)

    @jax.jit
    def residual(phi, task, gradient):
        v = jax.grad(loss(task.query_x, task.query_y))(phi)
        hessian_g = jax.jvp(jax.grad(loss(task.support_x, task.support_y)), (phi,), (gradient,))[1]
        left = jax.tree.map(lambda v, g, hg: v - g - hg / learner.strength, v, gradient, hessian_g)
        return _norm(left) / _norm(v)

    return residual(phi, task, gradient)


def _implicit(learner, phi, theta, task):
    """The implicit gradient at φ, its system solved to rounding."""
    method = bl.Implicit(bl.CG(LONG, tol=0.1 * SOLVED))
    here = bl.value_and_hypergradient(learner.problem, lambda condition, init, *_: init, method, on_failure="ignore")
    return here(theta, phi, task)


# --- 2. The solution, and its derivative ---------------------------------------------------------------------------


def check_solution(
    learner: Learner, theta: dict, task: Task, steps: Sequence[int], directions: int, on_event: Callable[[str], None]
) -> tuple[bl.Check, ...]:
    """The implicit gradient at a solved inner problem against differences and unrolled MAML, along directions."""
    flat, unravel = ravel_pytree(theta)
    on_event("following gradient descent to the twin's solution")
    path = _Unrolled(learner, theta, task)
    end = path.run(jax.tree.map(jnp.zeros_like, theta), (steps[-1],))[-1]
    solve = _newton(learner)
    solution = solve(theta, end.w, task)
    residual = float(solution.residual_norm)
    out = _implicit(learner, solution.w, theta, task)
    length, left_over = float(_norm(out.gradient)), float(_system_residual(learner, solution.w, task, out.gradient))
    solved = bl.Check(
        "twin's solution",
        residual <= STATIONARY and left_over <= SOLVED,
        f"‖F‖ = {residual:.1e}; (I + H/λ)g = v to {left_over:.1e}",
        "the inner problem could not be solved, so that the rows below compare with no solution.",
        residual,
    )
    chosen = np.random.default_rng(0).normal(size=(directions, flat.size))
    chosen[0] = ravel_pytree(out.gradient)[0]
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    chosen = [unravel(jnp.asarray(direction)) for direction in chosen]
    ours = np.array([float(_vdot(out.gradient, direction)) for direction in chosen])
    on_event("differencing the re-solved twin")
    differences = _check_differences(learner, solve, theta, solution.w, task, chosen, ours, length)
    on_event(f"unrolling MAML over {', '.join(map(str, steps))} steps")
    unrolled = np.array([[float(point.slope) for point in path.run(direction, steps)] for direction in chosen])
    gaps = np.abs(unrolled - ours[:, None]).max(axis=0) / length
    return solved, differences, _check_gaps(gaps, steps)


def _newton(learner):
    """(θ, start, task) → Solution: Newton-CG until ‖F‖ is of rounding size."""
    solver = bl.HessianFree(max_steps=60, cg_steps=200, tol=0.1 * STATIONARY)
    return jax.jit(lambda theta, w, task: bl.solve(solver, learner.problem.condition, w, theta, task))


def _check_differences(learner, solve, theta, w, task, directions, ours, length):
    """Central differences at two step sizes, extrapolated, of the query loss at the re-solved φ."""
    query = jax.jit(lambda phi: learner.problem.outer(phi, theta, task)[0])  # type: ignore[index]
    largest = 1e-4 * float(_norm(theta))
    theirs, uncertainty, left_over = [], [], 0.0
    for direction in directions:
        slopes = []
        for h in (largest, largest / 2):
            ends = [solve(jax.tree.map(lambda t, d, s=s: t + s * d, theta, direction), w, task) for s in (h, -h)]
            slopes.append(float(query(ends[0].w) - query(ends[1].w)) / (2 * h))
            left_over = max(left_over, *(float(end.residual_norm) for end in ends))
        theirs.append((4 * slopes[1] - slopes[0]) / 3)
        uncertainty.append(abs(slopes[1] - slopes[0]))
    error, doubt = np.abs(np.array(theirs) - ours), np.array(uncertainty)
    ok = bool((error <= DIFFERENCED * length + doubt).all() and (doubt <= 10 * DIFFERENCED * length).all())
    found = f"off by {error.max() / length:.1e} of the gradient, themselves uncertain by {doubt.max() / length:.1e}"
    return bl.Check(
        "finite differences",
        ok and left_over <= STATIONARY,
        f"{found}; re-solved to ‖F‖ = {left_over:.1e}",
        "the implicit gradient is not the derivative of the solution, or the inner problem was not re-solved.",
        float(error.max() / length),
    )


def _check_gaps(gaps, steps):
    """The gap falls from each number of steps to the next, and tenfold in all; below rounding nothing need fall."""
    falls = all(late < early or late < DIFFERENCED for early, late in itertools.pairwise(gaps))
    ok = bool(falls and (gaps[-1] < 0.1 * gaps[0] or gaps[-1] < DIFFERENCED))
    shown = ", ".join(f"{gap:.1e} ({count})" for gap, count in zip(gaps, steps, strict=True))
    remedy = "unrolled MAML does not near the implicit gradient: the steps diverge or circle, or one of both is wrong."
    return bl.Check("unrolled MAML", ok, f"gap over steps: {shown}", remedy, float(gaps[-1]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Point:
    """φ after some steps from θ, its tangent, and the slope of the query loss along it."""

    w: Any
    tangent: Any
    slope: Any


class _Unrolled:
    """Gradient descent on the proximal objective from θ, with one tangent: MAML along a direction."""

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
        """Points after each of ``steps``."""
        points, w, tangent, done = [], self._theta, direction, 0
        for count in steps:
            points.append(self._advance(w, tangent, direction, count - done, self._theta, self._task))
            w, tangent, done = points[-1].w, points[-1].tangent, count
        return points


def _query_value(problem, phi, theta, task):
    return problem.outer(phi, theta, task)[0]


def _largest_curvature(learner, theta, task, products=20):
    """The largest |eigenvalue| of ∂F/∂φ at θ, from below, by power iteration; a fifth is added for the rest."""

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
