"""Records that cross ``jit``, the status of a solve, and the protocol of a linear solver.

Every record is a frozen dataclass registered as a pytree. No constructor checks arrays, because JAX calls
constructors with tracers and placeholders when it unflattens a tree.
"""

import enum
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.notebook import html_table

PyTree = Any
Objective = Callable[[PyTree, PyTree, PyTree], jax.Array]
"""``objective(w, theta, data) -> scalar``."""
MatVec = Callable[[PyTree], PyTree]
"""A linear map from pytrees to pytrees of the same structure, unless stated otherwise."""


class Status(enum.IntEnum):
    """How a solve ended. A larger number is worse, so ``maximum`` merges two statuses.

    In the records a status is an int32 array of these values; ``Status(int(array))`` converts a concrete scalar. The
    numbers may change between versions: save the name.

    Example:
        >>> Status.worst(Status.CONVERGED, Status.MAX_STEPS)
        <Status.MAX_STEPS: 5>
        >>> Status.MAX_STEPS.ok
        False
    """

    CONVERGED = 0
    """The true residual meets the tolerance. For LU and Cholesky, the backward error is at most √eps instead, and rcond
    is at least √eps."""
    BUDGET_USED = 1
    """No tolerance was set. The solver stopped at the end of its budget or at the limit of rounding. The residual shows
    how accurate the result is."""
    ILL_CONDITIONED = 2
    """The backward error of a factorisation is at most √eps, but more than half of the digits of x may be lost."""
    STAGNATION = 3
    """The solver reached the limit of rounding, or its recursive residual met tol; the true residual is above tol."""
    STOPPED = 4
    """The solver stopped by a measure of its own before its budget ended, and the true residual is above tol."""
    MAX_STEPS = 5
    """The budget ended with a true residual above tol, or, without tol, with an answer no better than zero or init."""
    BREAKDOWN = 6
    """The iteration broke down or diverged, although the operator may be regular."""
    NONSYMMETRIC = 7
    """The condition is declared symmetric, but its Jacobian is not."""
    NEGATIVE_CURVATURE = 8
    """The operator is not positive definite: the inner solution is no minimum, or the regularisation λ is too small."""
    SINGULAR = 9
    """The operator is singular in this precision: its reciprocal condition number is below eps, or it maps a direction
    to zero."""
    NONFINITE = 10
    """A NaN or an infinity appeared."""

    @property
    def ok(self) -> bool:
        """True for CONVERGED, BUDGET_USED and ILL_CONDITIONED; the record says how accurate the result is."""
        return self <= Status.ILL_CONDITIONED

    @property
    def message(self) -> str:
        """The cause and, for a failure, the remedy."""
        return _MESSAGES[self]

    @staticmethod
    def worst(*statuses: "Status") -> "Status":
        """Return the most severe of several statuses."""
        return max(statuses)


_MESSAGES = {
    Status.CONVERGED: "the true residual meets the tolerance.",
    Status.BUDGET_USED: (
        "no tol was set, so the solver stopped at the end of its budget or at the limit of rounding: read the "
        "residual, or set tol, so that the status compares the residual with it."
    ),
    Status.ILL_CONDITIONED: (
        "the backward error is small, but the operator is ill-conditioned, so that few digits of the answer may be "
        "right: read rcond; use float64, or rescale the problem."
    ),
    Status.STAGNATION: (
        "rounding keeps the true residual above tol, and more steps will not lower it: use float64, a preconditioner, "
        "or a larger tol."
    ),
    Status.STOPPED: (
        "the solver stopped by an error measure of its own, but the true residual is above tol: set a smaller "
        "tolerance for that measure, which is tol for Jaxopt, and rtol and atol for Optimistix and Lineax."
    ),
    Status.MAX_STEPS: (
        "the true residual does not meet tol, or without tol the answer is no better than zero: allow more steps (for "
        "Nystrom a larger rank), precondition, or loosen tol; where more steps do not help, the precision is the "
        "limit, so use float64."
    ),
    Status.BREAKDOWN: (
        "the iteration broke down or diverged, although the operator may be regular: use LU or GMRES, a smaller step "
        "size, or a ridge."
    ),
    Status.NONSYMMETRIC: (
        "the condition is declared symmetric, but its Jacobian is not: check the residual function, or drop "
        "symmetric=True."
    ),
    Status.NEGATIVE_CURVATURE: (
        "the operator is not positive definite, because a direction of negative curvature was found: increase the "
        "regularisation (λ), solve the inner problem further, or use LU, which does not need positive definiteness."
    ),
    Status.SINGULAR: "the linear system is singular: add a ridge, or a strongly convex term to the inner problem.",
    Status.NONFINITE: "a NaN or an infinity appeared: check the data, the step sizes, and the inner solution.",
}


class _ShownAsTable:
    """A dataclass that a notebook shows as a table of its fields, together with those of the records in it."""

    def _repr_html_(self) -> str:
        return html_table(("field", "value"), _field_rows(self))


def _field_rows(record: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return the name and the value of each field that is not None. Nested records have dotted names."""
    rows = []
    for name in (field.name for field in fields(record)):
        value = getattr(record, name)
        if isinstance(value, _ShownAsTable):
            rows += _field_rows(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((f"{prefix}{name}", _status_text(value) if name == "status" else _text(value)))
    return rows


def _status_text(status: Any) -> str:
    """Return the name of a status, and its message if it is a failure; the array's type if it is traced or a batch."""
    if not _is_concrete(status) or np.ndim(status):
        return _text(status)
    found = Status(int(status))
    return found.name if found.ok else f"{found.name}: {found.message}"


def _text(tree: PyTree) -> str:
    """Return the numbers of small arrays, and the dtype and shape of large or traced ones, leaf by leaf."""
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    shown = "; ".join(f"{name}{': ' * bool(name)}{_leaf_text(leaf)}" for name, leaf in leaves[:_LEAVES])
    return shown + (f"; … {len(leaves)} leaves" if len(leaves) > _LEAVES else "")


_LEAVES, _ENTRIES = 8, 6
"""The most leaves of a tree, and the most entries of a leaf, whose numbers a table shows."""


def _is_concrete(leaf: Any) -> bool:
    """Return True for a number or an array with entries, not for a tracer or the description of an array."""
    return not isinstance(leaf, Tracer | jax.ShapeDtypeStruct)


def _leaf_text(leaf: Any) -> str:
    if not _is_concrete(leaf) or np.size(leaf) > _ENTRIES:
        return f"{leaf.dtype}{list(leaf.shape)}"
    return np.array2string(np.asarray(leaf), precision=4, separator=", ")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solution(_ShownAsTable):
    """The result of an inner solver.

    Attributes:
        w: the inner solution, a pytree like ``init``.
        residual_norm: ‖F(w, θ, data)‖₂, the absolute norm of the condition's residual F at ``w``; a scalar.
        steps: iterations taken, an int32 scalar; 0 for a solver that does not report them.
        status: a :class:`Status` as an int32 scalar.
        memory: from a solver that was resumed, the memory from which the next run goes on, such as the moments of
            :class:`Optax`; otherwise None.
    """

    w: PyTree
    residual_norm: jax.Array
    steps: jax.Array
    status: jax.Array
    memory: PyTree = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearInfo(_ShownAsTable):
    """The report on a linear solve Ax = b.

    Attributes:
        solution: x, a pytree like b.
        relative_residual: the true ‖b − Ax‖₂ / ‖b‖₂, computed with one more product after the solve; ‖b − Ax‖₂
            where b = 0. For ``Proximal``, the scaled system (D A D)u = D b is solved, and this is the residual of that
            system. It equals the residual of Ax = b if the strength λ is one number.
        iterations: iterations taken, an int32 scalar; None for a solver that does not iterate or does not count them.
        status: a :class:`Status` as an int32 scalar.
        rcond: an estimate of the reciprocal condition number 1/(‖A‖₁‖A⁻¹‖₁), computed by LU, by Cholesky, by Blockwise
            (the smallest one of a block), and by Lineax with a factorisation and without ``tol``; None from the other
            solvers. The estimate is rarely more than three times too large. The relative error of x is of the order of
            eps / rcond.
        least_curvature: the smallest ⟨p, Ap⟩ / ‖p‖² among the search directions p of ``CG(engine="watched")``; None
            from the other solvers.
    """

    solution: PyTree
    relative_residual: jax.Array
    iterations: jax.Array | None
    status: jax.Array
    least_curvature: jax.Array | None = None
    rcond: jax.Array | None = None

    @property
    def residual_norm(self) -> jax.Array:
        """Deprecated name of ``relative_residual``, removed in version 0.3."""
        message = "LinearInfo.residual_norm is deprecated and will be removed in version 0.3: use relative_residual"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.relative_residual


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypergradient(_ShownAsTable):
    """The outer value, its total derivative in θ, and the reports on both solves.

    Attributes:
        value: outer(w, θ), a scalar.
        gradient: d outer(w*(θ), θ)/dθ, as the chosen method computes it, a pytree like θ.
        aux: the second output of an outer function with ``has_aux=True``; otherwise None.
        inner: the inner :class:`Solution`.
        linear: the :class:`LinearInfo` of the adjoint system; None for a method that solves no system.
        warm_start: what the method can start from next time, as its argument ``linear_init``, where that is not the
            adjoint ``linear.solution``; otherwise None.
    """

    value: jax.Array
    gradient: PyTree
    aux: PyTree
    inner: Solution
    linear: LinearInfo | None
    warm_start: PyTree = None

    @property
    def status(self) -> jax.Array:
        """The worst inner or linear status, or NONFINITE if value or gradient is not finite; int32 for each task."""
        numbers = jnp.where(self.finite((self.value, self.gradient)), jnp.int32(0), jnp.int32(Status.NONFINITE))
        status = jnp.maximum(self.inner.status, numbers)
        return status if self.linear is None else jnp.maximum(status, self.linear.status)

    def finite(self, numbers: PyTree) -> jax.Array:
        """Return whether all entries of ``numbers``, a part of this record, are finite: a bool for each task."""
        tasks = jnp.shape(self.value)
        leaves = [jnp.isfinite(leaf).reshape(*tasks, -1).all(axis=-1) for leaf in jax.tree.leaves(numbers)]
        return functools.reduce(jnp.logical_and, leaves, jnp.ones(tasks, bool))


class LinearSolver(Protocol):
    """A solver of ``matvec(x) = b`` on pytrees. An iterative one starts from ``init`` if it is given."""

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]: ...
