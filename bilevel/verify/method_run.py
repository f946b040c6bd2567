"""One run of a method, and the implicit function theorem at the w that the method used.

The theorem's terms are evaluated at the method's own w. An inaccurate w, an unfinished linear solve and a wrong formula
then show as different errors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.problem import Problem
from bilevel.start import evaluate, is_function
from bilevel.types import Hypergradient, LinearInfo, PyTree
from bilevel.verify.flat import flatten, gradient_vector, vector_of
from bilevel.verify.precision import as_double, double_precision, eps_of
from bilevel.verify.programs import kept
from bilevel.verify.references import (
    Linearisation,
    ReferenceUnavailable,
    init_in_double,
    inner_program,
    linearise,
    outer_value,
    residual_program,
    solve_adjoint,
)


def method_program(problem: Problem, solver: Callable, method: Callable, init: PyTree | Callable) -> Callable:
    """Return ``(theta, start, data) → method(…)``, to be jitted; see :func:`method_arguments`.

    ``start`` is used unless ``init`` is a function. θ, the start and the data are arguments, not captured constants, so
    that XLA cannot compute with them at compile time.
    """
    if is_function(init):
        return lambda theta, start, data: method(problem, solver, theta, init, data)
    return lambda theta, start, data: method(problem, solver, theta, start, data)


def method_arguments(theta: PyTree, init: PyTree | Callable, data: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """Return the arguments ``(theta, start, data)`` of :func:`method_program` as arrays; ``start`` may be None."""
    start = None if is_function(init) else init
    return tree.arrays(theta, "theta"), tree.arrays(start, "init"), tree.arrays(data, "data")


def start_function(init: PyTree | Callable) -> Callable[..., PyTree] | None:
    """Return ``init`` if it is a function, and None if it is a point.

    A program is compiled for the function. The point is an argument of the program.
    """
    return init if is_function(init) else None


def run_method(
    problem: Problem, solver: Callable, method: Callable, theta: PyTree, init: PyTree | Callable, data: PyTree
) -> Any:
    """Run the method, compiled once for each method, solver, problem and shape."""
    compiled = _compiled(problem, solver, method, start_function(init))
    return compiled(*method_arguments(theta, init, data))


@kept
def _compiled(problem, solver, method, init):
    return jax.jit(method_program(problem, solver, method, init))


@dataclass(frozen=True)
class TheoremAtW:
    """The implicit function theorem at the method's w, with the method's report on its linear solve.

    Attributes:
        parts: A = ∂F/∂w, g = ∂outer/∂w, and Bd and h·d, which are ∂F/∂θ and ∂outer/∂θ along the directions.
        adjoint: A⁻ᵀg.
        constant_diagonal: the diagonal part of A that contains no derivative of the user's function. It is D⁻² for a
            condition with a scaling D. For ``Proximal``, D = λ^-½, so D⁻² = λ (1 for an entry of λ that is not
            positive). It is 1 for a condition with a mapping and without a scaling, and None for any other condition.
        reported: the adjoint that the method reports, flat; None for a method that solves no linear system.
        residual: the true relative residual of ``reported``, ‖D(g − Aᵀ reported)‖ / ‖Dg‖, with D = I for a condition
            without a scaling; None without ``reported``.
    """

    parts: Linearisation
    adjoint: np.ndarray
    constant_diagonal: np.ndarray | None
    reported: np.ndarray | None
    residual: float | None

    @property
    def derivatives(self) -> np.ndarray:
        """The derivatives that an exact implicit method returns at this w: h·d − adjoint·Bd, ``[m]``."""
        return self.parts.total(self.adjoint)


@dataclass(frozen=True)
class MethodRun:
    """The arguments of a method, its result, and the directions in θ along which the result is judged.

    A method may return a :class:`~bilevel.Hypergradient` or the bare gradient.
    """

    problem: Problem
    solver: Callable
    theta: PyTree
    init: Any
    data: PyTree
    out: Hypergradient | PyTree
    directions: np.ndarray

    @cached_property
    def derivatives(self) -> np.ndarray:
        """The method's derivatives along the directions, ``[m]``."""
        gradient = self.out.gradient if isinstance(self.out, Hypergradient) else self.out
        return self.directions @ gradient_vector(gradient, self.theta)

    @cached_property
    def w(self) -> PyTree:
        """The inner solution that the method reports, or the solver's if the method returned the bare gradient."""
        return self.out.inner.w if isinstance(self.out, Hypergradient) else self.solver_output()

    @property
    def linear(self) -> LinearInfo | None:
        """The report of the method's linear solve, if there is one."""
        return self.out.linear if isinstance(self.out, Hypergradient) else None

    @property
    def eps(self) -> float:
        """The machine epsilon of the narrowest float dtype in θ."""
        return eps_of(self.theta)

    @cached_property
    def theorem(self) -> TheoremAtW | None:
        """The theorem at ``w``; None if A or g is not finite, A is singular, or w has more than 1000 unknowns."""
        found = self._linearise(self.w)
        if found is None:
            return None
        parts, adjoint = found
        diagonal = self._constant_diagonal()
        if self.linear is None:
            return TheoremAtW(parts, adjoint, diagonal, None, None)
        reported = vector_of(self.linear.solution)
        scaling = np.ones_like(adjoint) if diagonal is None else diagonal**-0.5
        size = np.linalg.norm(scaling * parts.g)
        residual = float(np.linalg.norm(scaling * (parts.g - parts.a.T @ reported)) / size) if size > 0 else 0.0
        return TheoremAtW(parts, adjoint, diagonal, reported, residual)

    def reported_residual_is_true(self) -> bool:
        """Return True if the true linear residual is at most twice the reported one, plus rounding."""
        if self.theorem is None or self.theorem.residual is None or self.linear is None:
            return False
        return self.theorem.residual <= 2 * float(self.linear.relative_residual) + 100 * self.eps

    def theorem_derivatives(self, w: PyTree) -> np.ndarray | None:
        """Return the theorem's derivatives at another ``w``; None where :attr:`theorem` would be None."""
        found = self._linearise(w)
        return None if found is None else found[0].total(found[1])

    def direct_derivatives(self, w: PyTree) -> np.ndarray:
        """Return h·d, the derivatives of outer in θ at fixed ``w``, ``[m]``."""
        with double_precision():
            w, theta, data = (as_double(part) for part in (w, self.theta, self.data))
            return self.directions @ np.asarray(_direct_gradient(self.problem)(w, theta, data))

    def residual_norm(self) -> float:
        """Return ‖F‖ at ``w``, in float64."""
        with double_precision():
            w, theta, data = (as_double(part) for part in (self.w, self.theta, self.data))
            return float(np.linalg.norm(residual_program(self.problem.condition)(w, theta, data)))

    def solver_output(self, solver: Callable | None = None) -> PyTree:
        """Return the w of the solver, or of another ``solver``, run in float64."""
        solver = solver or self.solver
        with double_precision():
            theta, data, start = (as_double(part) for part in (self.theta, self.data, self.start()))
            return inner_program(self.problem.condition, solver, None)(theta, start, data)

    def start(self) -> PyTree:
        """Return the point where the solver starts, in float64."""
        with double_precision():
            theta, data, init = as_double(self.theta), as_double(self.data), init_in_double(self.init)
            return evaluate(init, theta, data)

    def _linearise(self, w) -> tuple[Linearisation, np.ndarray] | None:
        """Return A, Bd, g and h·d with A⁻ᵀg at ``w``; None if A or g is not finite, or A is singular or too large."""
        try:
            parts = linearise(self.problem, w, self.theta, self.data, self.directions)
        except ReferenceUnavailable:
            return None
        adjoint, kappa = solve_adjoint(parts.a, parts.g)
        return (parts, adjoint) if kappa < np.inf else None

    def _constant_diagonal(self) -> np.ndarray | None:
        condition = self.problem.condition
        with double_precision():
            w, theta, data = (as_double(part) for part in (self.w, self.theta, self.data))
            scaling = condition.scaling(theta, data)
            if scaling is None:
                return np.ones(flatten(w).vector.size) if hasattr(condition, "mapping") else None
            return vector_of(tree.scale(scaling, jax.tree.map(jnp.ones_like, w))) ** -2.0


@kept
def _direct_gradient(problem):
    """Return the compiled ``(w, theta, data) → ∂outer/∂θ``, a flat vector."""

    @jax.jit
    def gradient(w, theta, data):
        flat = flatten(theta)
        return jax.grad(lambda vector: outer_value(problem)(w, flat.rebuild(vector), data))(flat.vector)

    return gradient
