"""The reference by matrices: the implicit function theorem with A = ∂F/∂w written out, solved by numpy."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree
from bilevel.verify.flat import flatten
from bilevel.verify.precision import EPS, as_double, double_precision
from bilevel.verify.programs import kept
from bilevel.verify.references.directions import choose_directions
from bilevel.verify.references.newton import refine
from bilevel.verify.references.record import (
    Question,
    Reference,
    ReferenceUnavailable,
    flat_residual,
    inner_program,
    make_reference,
    outer_value,
    split_init,
)

MAX_UNKNOWNS = 1000
"""Largest number of unknowns for which A is written out: it then takes 8 MB in float64, and 1000 tangents at once."""


def dense(
    problem: Problem,
    solver: Callable | None,
    theta: PyTree,
    init: PyTree | Callable,
    data: PyTree,
    directions: np.ndarray | None = None,
    w: PyTree | None = None,
) -> Reference:
    """Return the implicit function theorem's derivative, h·d − g·A⁻¹(Bd), with A written out and solved by numpy.

    A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w, h = ∂outer/∂θ, and d is a direction in θ. A and Bd are computed in forward
    mode, column by column. The uncertainty is the rounding of the solve: 100·eps·κ(A) times the size of the terms that
    are added. It is infinite if A is singular.

    Args:
        problem, solver, theta, init, data, directions: as for :func:`finite_differences`.
        w: where the theorem is applied, a tree like ``init``. None means the solution that Newton's method finds near
            the solver's output, or this output if Newton's method fails or for more than 400 unknowns. With a given
            ``w``, ``solver`` and ``init`` are not used.

    Raises:
        ReferenceUnavailable: for more than 1000 unknowns.
        ValueError: if both ``solver`` and ``w`` are None.

    Example:
        The formula can also be evaluated at w = 2, which is not the solution:

        >>> from bilevel import Problem, Root
        >>> problem = Problem(Root(lambda w, theta, data: w**3 - theta), lambda w, theta, data: w)
        >>> round(float(dense(problem, None, 1.0, None, None, w=2.0).gradient), 6)  # 1 / 3w²
        0.083333
    """
    with double_precision():
        theta, data = as_double(theta), as_double(data)
        directions, labels = choose_directions(directions, flatten(theta, "theta"))
        question: Question = "the formula at this w"
        if w is None:
            if solver is None:
                raise ValueError("dense needs a solver, or the w at which the theorem is applied")
            function, start = split_init(init)
            w = inner_program(problem.condition, solver, function)(theta, start, data)
            solution = refine(problem.condition, w, theta, data)
            if solution is not None:
                w, question = solution, "the solution"
        w = as_double(w)
        parts = linearise(problem, w, theta, data, directions)
        v, kappa = solve_adjoint(parts.a, parts.g)
        slack = 100 * EPS * kappa * parts.size(v) if kappa < math.inf else np.full(len(directions), math.inf)
        return make_reference(
            "dense", question, problem, w, theta, data, directions, labels, parts.total(v), slack, kappa
        )


class Linearisation(NamedTuple):
    """The derivatives that enter the implicit function theorem at one point, as numpy arrays.

    Attributes:
        a: ∂F/∂w, ``[n, n]``.
        b: ∂F/∂θ along the directions, ``[n, m]``.
        g: ∂outer/∂w, ``[n]``.
        h: ∂outer/∂θ along the directions, ``[m]``.
    """

    a: np.ndarray
    b: np.ndarray
    g: np.ndarray
    h: np.ndarray

    def total(self, adjoint: np.ndarray) -> np.ndarray:
        """Return h − Bᵀ·adjoint along the directions, ``[m]``."""
        return self.h - adjoint @ self.b

    def size(self, adjoint: np.ndarray) -> np.ndarray:
        """Return the size of the terms that :meth:`total` adds, ``[m]``; their rounding is proportional to it."""
        return np.abs(self.h) + np.linalg.norm(adjoint) * np.linalg.norm(self.b, axis=0)


def linearise(problem: Problem, w: PyTree, theta: PyTree, data: PyTree, directions: np.ndarray) -> Linearisation:
    """Return A, Bd, g and h·d at ``w``, column by column from tangents, in float64.

    Raises:
        ReferenceUnavailable: for more than 1000 unknowns.
    """
    with double_precision():
        w, theta, data = as_double(w), as_double(theta), as_double(data)
        size = flatten(w).vector.size
        if size > MAX_UNKNOWNS:
            raise ReferenceUnavailable(f"A is {size} × {size}, and it is written out up to {MAX_UNKNOWNS} unknowns")
        parts = _derivatives(problem)(w, theta, data, jnp.asarray(directions))
        return Linearisation(*(np.asarray(part) for part in parts))


def solve_adjoint(a: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, float]:
    """Return A⁻ᵀg and the condition number of A.

    If A is singular, the condition number is infinite and the vector is the least-squares solution. If A or g is not
    finite, the condition number is infinite and the vector is NaN.
    """
    if not a.size:
        return g, 1.0
    if not (np.isfinite(a).all() and np.isfinite(g).all()):
        return np.full_like(g, math.nan), math.inf
    kappa = float(np.linalg.cond(a))
    if kappa * EPS < 1:
        return np.linalg.solve(a.T, g), kappa
    return np.linalg.lstsq(a.T, g)[0], math.inf


@kept
def _derivatives(problem):
    """Return the compiled function that returns A, B·directions, g and h·directions at w, all by tangents."""

    @jax.jit
    def derivatives(w, theta, data, directions):
        flat_w, flat_theta = flatten(w), flatten(theta)

        def residual(w, theta):
            return flat_residual(problem.condition, flat_w, flat_theta.rebuild(theta), data)(w)

        def outer(w, theta):
            return outer_value(problem)(flat_w.rebuild(w), flat_theta.rebuild(theta), data)

        point = flat_w.vector, flat_theta.vector

        def along(direction):
            tangent = jnp.zeros_like(point[0]), direction
            return tuple(jax.jvp(f, point, tangent)[1] for f in (residual, outer))

        b, h = jax.lax.map(along, directions)
        return jax.jacfwd(residual)(*point), b.T, jax.jacfwd(outer)(*point), h

    return derivatives
