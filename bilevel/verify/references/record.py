"""The record that every reference returns, and the evaluation of a problem that they share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.conditions import Condition
from bilevel.problem import Problem
from bilevel.start import evaluate, is_function
from bilevel.types import PyTree, Solution
from bilevel.verify.flat import Flat, flatten
from bilevel.verify.precision import as_double
from bilevel.verify.programs import kept
from bilevel.verify.references.directions import are_coordinates

Question = Literal["the solution", "the formula at this w", "the solver's output"]
"""The differentiated quantity: the exact solution, the solver's output, or the theorem's formula at a given w."""


class ReferenceUnavailable(ValueError):
    """A reference cannot be computed for this problem; the message says why."""


@dataclass(frozen=True)
class Reference:
    """Derivatives in θ along some directions, each with its own uncertainty.

    Attributes:
        name: ``finite_differences``, ``unrolled`` or ``dense``.
        question: the quantity that is differentiated.
        directions: unit vectors in the flattened inexact leaves of θ, ``[m, entries of θ]``.
        labels: the name of each direction: ``theta['a'][0]``, or ``direction 3``.
        derivatives: the derivative along each direction, ``[m]``.
        uncertainty: a bound on the error of each derivative, ``[m]``; infinite where no bound is known.
        gradient: a tree like θ, zero at integer leaves; None unless the directions are the coordinates.
        w: the inner solution at which the derivatives were taken, a tree in float64.
        residual_norm: ‖F(w, θ)‖₂ at ``w``, absolute.
        condition_number: κ(A) for ``dense``; None for the others.
    """

    name: str
    question: Question
    directions: np.ndarray
    labels: tuple[str, ...]
    derivatives: np.ndarray
    uncertainty: np.ndarray
    gradient: PyTree | None
    w: PyTree
    residual_norm: float
    condition_number: float | None = None


def make_reference(
    name: str,
    question: Question,
    problem: Problem,
    w: PyTree,
    theta: PyTree,
    data: PyTree,
    directions: np.ndarray,
    labels: tuple[str, ...],
    derivatives: np.ndarray,
    uncertainty: np.ndarray,
    condition_number: float | None = None,
) -> Reference:
    """Assemble a :class:`Reference`: add the residual at ``w`` and, for coordinates, the gradient as a tree."""
    residual = residual_program(problem.condition)(w, theta, data)
    gradient = None
    if are_coordinates(directions):
        zeros = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0 * leaf, theta)
        gradient = jax.tree.map(np.asarray, flatten(zeros).rebuild(jnp.asarray(derivatives)))
    return Reference(
        name,
        question,
        directions,
        labels,
        np.asarray(derivatives),
        np.asarray(uncertainty),
        gradient,
        jax.tree.map(np.asarray, w),
        float(np.linalg.norm(residual)),
        condition_number,
    )


@kept
def residual_program(condition: Condition) -> Callable[..., jax.Array]:
    """Return the compiled ``(w, theta, data) → F``, a flat vector."""
    return jax.jit(lambda w, theta, data: flatten(condition.residual(w, theta, data)).vector)


@kept
def inner_program(condition: Condition, solver: Callable, function: Callable | None) -> Callable[..., PyTree]:
    """Return the compiled ``(theta, start, data) → w``. For ``function`` and ``start`` see :func:`split_init`."""

    def solve(theta, start, data):
        return solve_inner(condition, solver, theta, joined_init(function, start), data)

    return jax.jit(solve)


def split_init(init: PyTree | Callable) -> tuple[Callable[..., PyTree] | None, PyTree]:
    """Return the start function, or None, and the start point in float64, or None.

    A program is compiled for the function. The point is an argument of the program.
    """
    return (init, None) if is_function(init) else (None, init_in_double(init))


def joined_init(function: Callable | None, start: PyTree) -> PyTree | Callable:
    """Return ``start``, or the start function with results in float64."""
    return start if function is None else init_in_double(function)


def solve_inner(condition: Condition, solver: Callable, theta: PyTree, init: PyTree | Callable, data: PyTree) -> PyTree:
    """Run the solver from ``init`` or ``init(theta, data)``; return w in float64.

    A solver may return w itself or a :class:`~bilevel.Solution`.
    """
    found = solver(condition, evaluate(init, theta, data), theta, data)
    return as_double(found.w if isinstance(found, Solution) else found)


def init_in_double(init: PyTree | Callable) -> PyTree | Callable:
    """Cast ``init`` to float64; if it is a function, cast what it returns."""
    if is_function(init):
        return lambda theta, data: as_double(evaluate(init, theta, data))
    return as_double(evaluate(init, None, None))


def outer_value(problem: Problem) -> Callable[..., Any]:
    """Return the problem's outer function without its ``aux``."""
    if not problem.has_aux:
        return problem.outer
    return lambda w, theta, data: problem.outer(w, theta, data)[0]  # type: ignore[index]


def flat_residual(condition: Condition, w: Flat, theta: PyTree, data: PyTree) -> Callable[[jax.Array], jax.Array]:
    """Return F(·, θ) on flat vectors, whose entries are those of ``w``."""
    return lambda vector: flatten(condition.residual(w.rebuild(vector), theta, data)).vector
