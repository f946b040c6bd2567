"""The protocol of a condition, and what all conditions share."""

from collections.abc import Callable
from typing import Protocol, TypeGuard

import jax

from bilevel.types import PyTree

Residual = Callable[[PyTree, PyTree, PyTree], PyTree]
"""``residual(w, theta, data)``, a pytree like w."""
StrongConvexity = float | Callable[[PyTree, PyTree], jax.Array] | None
"""μ > 0 with ⟨u, (∂F/∂w)u⟩ ≥ μ‖u‖² at all w that a solver may reach: a number, ``f(theta, data)``, or None."""


class Condition(Protocol):
    """The interface of a condition that solvers and methods use."""

    @property
    def symmetric(self) -> bool:
        """True if ∂F/∂w is symmetric everywhere, so that F is the gradient in w of some function."""
        ...

    @property
    def positive_definite(self) -> bool:
        """True if the user declares ⟨u, (∂F/∂w)u⟩ > 0 for all u ≠ 0; False where that is unknown."""
        ...

    @property
    def strong_convexity(self) -> StrongConvexity:
        """The strong convexity μ that the user declares; None where it is unknown."""
        ...

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return F(w, θ, data), a pytree like w."""
        ...

    def scaling(self, theta: PyTree, data: PyTree) -> PyTree | None:
        """Return D, a scalar or a pytree like w, or None for no scaling.

        The adjoint system Av = g is solved as (D A D)u = D g with v = D u.
        """
        ...


class GradientCondition(Condition, Protocol):
    """A condition whose residual is the gradient of an objective, so that ∂F/∂w is symmetric by construction."""

    def potential(self, w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
        """Return the value of the function whose gradient in w is the residual, a scalar."""
        ...


def is_gradient(condition: Condition) -> TypeGuard[GradientCondition]:
    """Return whether the residual is the gradient of an objective."""
    return hasattr(condition, "potential")


def no_scaling(self: object, theta: PyTree, data: PyTree) -> None:
    """Return None: the adjoint system of this condition is solved without scaling."""
    del self, theta, data


def check_strong_convexity(name: str, strong_convexity: StrongConvexity) -> None:
    """Raise ValueError for a μ that is a number and not positive and finite."""
    if strong_convexity is not None and not callable(strong_convexity) and not 0 < strong_convexity < float("inf"):
        raise ValueError(
            f"{name} needs a strong_convexity above 0, got {strong_convexity}; leave it None where none is known"
        )
