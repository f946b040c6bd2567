"""Records that cross ``jit``, and how a solve ended.

Every record is a frozen dataclass registered as a pytree: data and nothing else. No constructor checks
an array, because JAX calls it with tracers and placeholders when it unflattens.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

PyTree = Any
Objective = Callable[[PyTree, PyTree, PyTree], jax.Array]
"""``objective(w, theta, data) -> scalar``."""
MatVec = Callable[[PyTree], PyTree]
"""A linear map from a pytree to one of the same structure."""


class Status(enum.IntEnum):
    """How a solve ended, the worse the larger, so that ``maximum`` merges two.

    Under a trace a status is an int32 array of one of these values; ``Status(int(array))`` names it.

    Example:
        >>> Status.worst(Status.CONVERGED, Status.MAX_STEPS)
        <Status.MAX_STEPS: 3>
        >>> Status.MAX_STEPS.ok
        False
    """

    CONVERGED = 0
    """The tolerance was met, by the true residual."""
    BUDGET_USED = 1
    """No tolerance was asked for: the budget was spent, and the residual tells what that reached."""
    STAGNATION = 2
    """The solver stopped by its own recursion, yet the true residual is above the tolerance."""
    MAX_STEPS = 3
    """A tolerance was asked for and not met within the budget."""
    NONSYMMETRIC = 4
    """A condition declared symmetric is not."""
    NEGATIVE_CURVATURE = 5
    """A direction of negative curvature: what was found is no minimum, or λ is too small."""
    SINGULAR = 6
    """The linear system has no unique solution."""
    NONFINITE = 7
    """A NaN or an infinity appeared."""

    @property
    def ok(self) -> bool:
        """Whether no failure was found; after BUDGET_USED the residual tells how far the budget went."""
        return self <= Status.BUDGET_USED

    @property
    def message(self) -> str:
        """One sentence: the cause and the remedy."""
        return _MESSAGES[self]

    @staticmethod
    def worst(*statuses: "Status") -> "Status":
        """The most severe of several."""
        return max(statuses)


_MESSAGES = {
    Status.CONVERGED: "the tolerance was met, by the true residual.",
    Status.BUDGET_USED: "the budget was spent as asked; look at residual_norm, or set tol to have it judged.",
    Status.STAGNATION: (
        "the solver stopped by its own recursion and the true residual does not meet tol: this precision reaches no "
        "further; use float64, a preconditioner, or a larger tol."
    ),
    Status.MAX_STEPS: "tol was not met within the budget: allow more steps, precondition, or loosen tol.",
    Status.NONSYMMETRIC: "the condition is declared symmetric and is not: check the residual, or declare a Root.",
    Status.NEGATIVE_CURVATURE: (
        "a direction of negative curvature was met, so the operator is not positive definite: increase the "
        "regularisation (λ), solve the inner problem further, or use LU, which needs no definiteness."
    ),
    Status.SINGULAR: "the linear system is singular: add a ridge or a strongly convex term to the inner problem.",
    Status.NONFINITE: "a NaN or an infinity appeared: check the data, the step sizes, and the inner solution.",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solution:
    """What an inner solver returns.

    Attributes:
        w: the inner solution, a pytree like ``init``.
        residual_norm: ‖F(w, θ)‖₂ of the condition, recomputed at ``w``; a scalar.
        steps: iterations taken, an int32 scalar.
        status: a :class:`Status` as an int32 scalar.
    """

    w: PyTree
    residual_norm: jax.Array
    steps: jax.Array
    status: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearInfo:
    """What is known of a linear solve Ax = b.

    Attributes:
        solution: x, a pytree like b.
        residual_norm: the true ‖b − Ax‖₂ / ‖b‖₂, from one product of its own; 0 where b = 0. For ``Proximal`` it is
            that of the scaled system (D A D)u = D b, which is the same number where λ is one for all parameters.
        iterations: the iterations the solver was allowed; it took all of them where no ``tol`` was set.
        status: a :class:`Status` as an int32 scalar.
    """

    solution: PyTree
    residual_norm: jax.Array
    iterations: jax.Array
    status: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypergradient:
    """The outer value and its total derivative in θ, with what is known of both solves.

    Attributes:
        value: outer(w, θ), a scalar.
        gradient: d outer(w*(θ), θ)/dθ, a pytree like θ.
        aux: what the outer function returned beside its value, or None.
        inner: the inner :class:`Solution`.
        linear: the adjoint system's :class:`LinearInfo`; None for a method that solves no system.
    """

    value: jax.Array
    gradient: PyTree
    aux: PyTree
    inner: Solution
    linear: LinearInfo | None

    @property
    def status(self) -> jax.Array:
        """The worst of the inner and the linear status and of NONFINITE numbers, int32, a scalar for each task."""
        numbers = jnp.where(self.finite((self.value, self.gradient)), jnp.int32(0), jnp.int32(Status.NONFINITE))
        status = jnp.maximum(self.inner.status, numbers)
        return status if self.linear is None else jnp.maximum(status, self.linear.status)

    def finite(self, numbers: PyTree) -> jax.Array:
        """Whether all entries of a part of this record are finite, a bool for each task."""
        tasks = jnp.shape(self.value)
        leaves = [jnp.isfinite(leaf).reshape(*tasks, -1).all(axis=-1) for leaf in jax.tree.leaves(numbers)]
        return functools.reduce(jnp.logical_and, leaves, jnp.ones(tasks, bool))


class LinearSolver(Protocol):
    """Solves ``matvec(x) = b`` on pytrees, from ``init`` where one is given."""

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]: ...
