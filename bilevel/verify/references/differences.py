"""The reference by finite differences: central differences of the outer value, extrapolated to step zero."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree
from bilevel.verify.flat import flatten
from bilevel.verify.precision import EPS, as_double, double_precision
from bilevel.verify.programs import kept
from bilevel.verify.references.directions import choose_directions
from bilevel.verify.references.newton import newton, refine
from bilevel.verify.references.record import (
    Question,
    Reference,
    ReferenceUnavailable,
    inner_program,
    joined_init,
    make_reference,
    outer_value,
    solve_inner,
    split_init,
)

SHRINK = 10**0.5
"""Ratio of one step size to the next smaller one."""
STEP_SIZES = 5
"""Number of step sizes at which the differences are extrapolated."""


def finite_differences(
    problem: Problem,
    solver: Callable,
    theta: PyTree,
    init: PyTree | Callable,
    data: PyTree,
    directions: np.ndarray | None = None,
    step: float | None = None,
    polish: bool | None = None,
) -> Reference:
    """Return central differences of G(θ) = outer(w*(θ), θ), extrapolated.

    With D(h) = (G(θ + hd) − G(θ − hd)) / 2h the extrapolation (4D(h/2) − D(h)) / 3 has the error O(h⁴). It is computed
    at five h, each smaller than the one before by the factor √10. The uncertainty of a value is its difference from the
    value at the next larger h, plus the rounding of G divided by h. The value with the smallest uncertainty is
    returned. If the left and the right slope do not approach each other as h shrinks, there is a kink, and half of the
    jump is added to the uncertainty.

    Args:
        problem: the condition and the outer function.
        solver: any inner solver that JAX can trace.
        theta: outer variables, any pytree; the derivative is taken there.
        init: the solver's start, a tree like w or ``init(theta, data)``.
        data: the third argument of the problem's functions.
        directions: unit vectors ``[m, entries of θ]``. None means each coordinate of a θ of at most 64 entries, and 8
            random directions in a larger one.
        step: the largest h. None means a tenth of the norm of those entries of θ that the direction moves, or 0.1
            if they are zero.
        polish: True finds the inner solution by Newton's method at each shifted θ, so that an inaccurate solver does
            no harm. False differences the solver's output. None means True if Newton's method converges, else False.
            For more than 400 unknowns, Newton's method is not run, and None means False.

    Raises:
        ReferenceUnavailable: with ``polish=True``, if Newton's method does not solve the condition, or for more than
            400 unknowns.

    Source: Richardson (1911); the choice among step sizes: Ridders (1982).

    Example:
        >>> from bilevel import GradientDescent, Problem, Stationary
        >>> problem = Problem(Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2), lambda w, theta, data: w)
        >>> found = finite_differences(problem, GradientDescent(0.5, 1), 3.0, 0.0, None)
        >>> round(float(found.gradient), 8), found.question
        (6.0, 'the solution')
    """
    with double_precision():
        theta, data = as_double(theta), as_double(data)
        function, start = split_init(init)
        point = flatten(theta, "theta")
        directions, labels = choose_directions(directions, point)
        w = inner_program(problem.condition, solver, function)(theta, start, data)
        solution = refine(problem.condition, w, theta, data) if polish in (None, True) else None
        if polish and solution is None:
            raise ReferenceUnavailable(
                "Newton's method does not solve the condition near the solver's output, or is not run for so many "
                "unknowns: pass polish=False"
            )
        base = w if solution is None else solution
        program = _values(problem, solver, function, solution is not None)
        values = partial(program, base=base, theta=theta, start=start, data=data)
        steps = [_largest_step(step, np.asarray(point.vector), d) for d in directions]
        derivatives, uncertainty = _extrapolate(values, point.vector, directions, np.array(steps))
        question: Question = "the solver's output" if solution is None else "the solution"
        return make_reference(
            "finite_differences", question, problem, base, theta, data, directions, labels, derivatives, uncertainty
        )


@kept
def _values(problem, solver, function, polish):
    """Return the compiled function that evaluates G at points ``[k, entries of θ]``.

    It returns G, ``[k]``, and an estimate of the error that the error of w causes in G, ``[k]``. With ``polish``,
    Newton's method finds w, and starts from ``base``. Otherwise the solver finds it.
    """
    outer = outer_value(problem)

    @jax.jit
    def values(points, base, theta, start, data):
        rebuild = flatten(theta).rebuild

        def value(vector):
            theta = rebuild(vector)
            if not polish:
                w = solve_inner(problem.condition, solver, theta, joined_init(function, start), data)
                return outer(w, theta, data), 0.0
            flat_base = flatten(base)
            flat, change = newton(problem.condition, flat_base, theta, data)
            last, before = (outer(flat_base.rebuild(v), theta, data) for v in (flat, flat - change))
            return last, jnp.abs(last - before)

        return jax.lax.map(value, points)

    return values


def _largest_step(step, theta, direction):
    """Return a tenth of the norm of the entries that move, so that a small entry of θ is moved by a small amount."""
    if step is not None:
        return step
    size = float(np.linalg.norm(theta[direction != 0]))
    return 0.1 * size if size > 0 else 0.1


def _extrapolate(values_at, point, directions, largest):
    """Return extrapolated central differences along ``directions``, and the uncertainty of each.

    ``values_at`` returns G and its uncertainty at several points. ``largest`` holds the largest step of each direction.
    """
    sizes = np.outer(largest, [scale / SHRINK**k for k in range(STEP_SIZES) for scale in (1.0, 0.5)])  # [m, 2·5]
    moves = np.stack([sizes, -sizes], -1)[..., None] * directions[:, None, None, :]
    points = jnp.concatenate([point[None], point[None] + jnp.asarray(moves.reshape(-1, point.size))])
    values, slack = (np.asarray(part) for part in values_at(points))
    center, values = values[0], values[1:].reshape(*sizes.shape, 2)
    slack = np.asarray(slack)[1:].reshape(*sizes.shape, 2).max(-1)
    slopes = (values[..., 0] - values[..., 1]) / (2 * sizes)
    rounding = (10 * EPS * np.abs(values).max(-1) + slack) / sizes
    extrapolated = (4 * slopes[:, 1::2] - slopes[:, 0::2]) / 3  # [m, 5]
    noise = rounding[:, 0::2] + 2 * rounding[:, 1::2]
    change = np.abs(np.diff(extrapolated, axis=1)) + noise[:, 1:]
    change = np.where(np.isfinite(change), change, np.inf)
    best, rows = change.argmin(axis=1), np.arange(len(directions))
    jump = _half_jump(center, values[:, 1::2], sizes[:, 1::2], noise)
    return extrapolated[rows, best + 1], change[rows, best] + jump


def _half_jump(center, values, sizes, noise):
    """Return half the jump between the left and the right slope, or zero if it shrinks with the step.

    The two slopes of a smooth function differ by O(h), so the gap shrinks tenfold while h does.
    """
    right, left = (values[..., 0] - center) / sizes, (center - values[..., 1]) / sizes
    jump = np.abs(right - left)
    last, first = jump[:, -1], jump[:, -3]  # their steps differ by a factor of ten
    return np.where((last > 0.5 * first) & (last > 10 * noise[:, -1]), last / 2, 0.0)
