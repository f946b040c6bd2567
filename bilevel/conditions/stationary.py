"""Conditions that are the gradient of an objective: Stationary and Proximal."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.conditions.protocol import (
    StrongConvexity,
    aux_of,
    check_signature,
    check_strong_convexity,
    gradient_of,
    no_scaling,
    scalar,
    without_aux,
)
from bilevel.types import Objective, PyTree

SAY_HAS_AUX = "for (value, aux) say has_aux=True"
NO_AUX = "return the value alone, because this condition takes no aux"


@dataclass(frozen=True)
class Stationary:
    """The condition ∇_w objective(w, θ, data) = 0, at an unconstrained minimum or any other stationary point.

    Args:
        objective: ``objective(w, theta, data) -> scalar``.
        positive_definite: whether the Hessian of the objective in w is known to be positive definite.
        strong_convexity: μ, a lower bound of that Hessian's smallest eigenvalue, where one is known: a number above
            0, or ``f(theta, data)``.
        has_aux: whether ``objective`` returns ``(value, aux)``, where aux is any pytree. Derivatives leave it out, and
            ``condition.aux(w, theta, data)`` returns it.

    Raises:
        ValueError: for a number μ that is not positive and finite, and, in use, for an objective with ``has_aux`` that
            does not return a pair.
        TypeError: for an objective that does not take three arguments, and, in use, for one that returns no scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> ridge = Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * theta * w**2)
        >>> float(ridge.residual(jnp.float32(1.0), jnp.float32(1.0), jnp.float32(2.0)))
        0.0
    """

    objective: Objective
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None
    has_aux: bool = False

    symmetric = True
    scaling = no_scaling

    def __post_init__(self) -> None:
        check_strong_convexity("Stationary", self.strong_convexity)
        check_signature("Stationary", "objective", self.objective, "w", "theta", "data")
        object.__setattr__(self, "objective", without_aux(self.objective, "objective", self.has_aux))

    def potential(self, w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
        """Return the value of the function whose gradient in w is the residual, a scalar."""
        return scalar(self.objective(w, theta, data), "objective", SAY_HAS_AUX)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return gradient_of(self.objective, w, theta, data, SAY_HAS_AUX)

    def aux(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return the second output of ``objective``; None without ``has_aux``."""
        return aux_of(self.objective, w, theta, data)


def identity_center(theta: PyTree, data: PyTree) -> PyTree:
    """Return θ, the centre of a proximal term that pulls w towards θ."""
    del data
    return theta


theta_itself = identity_center
"""The former name of :func:`identity_center`."""


@dataclass(frozen=True)
class Proximal:
    """The condition ∇_w objective + λ(w − c) = 0, at a minimum of objective(w, θ, data) + ½ λ‖w − c‖².

    The Jacobian of the condition is A = H + λI, with the Hessian H of the objective. The adjoint system Av = g is
    solved in the scaled form (I + H/λ)u = g/√λ with v = u/√λ. The eigenvalues of I + H/λ are close to one if H is
    small compared with λ. For one λ per parameter, the scaled operator is I + Λ^-½ H Λ^-½ with the diagonal matrix Λ.
    It is symmetric too.

    Args:
        objective: ``objective(w, theta, data) -> scalar``, without the proximal term.
        strength: λ, a positive float; or ``strength(theta, data)``, a scalar or a pytree like w with one
            λ per parameter, which may be learned.
        center: ``center(theta, data)``, a pytree like w; θ by default.
        positive_definite: whether H + λI is known to be positive definite, as it is for a convex objective.
        strong_convexity: μ of the objective and the proximal term together, where it is known (λ for a convex
            objective): a number above 0, or ``f(theta, data)``.

    Raises:
        ValueError: for a number λ or μ that is not positive and finite, and, in use, for a centre or a tree of
            strengths whose tree structure is not that of w.
        TypeError: for a function that does not take these arguments, and, in use, for an objective that returns no
            scalar.

    Source: Rajeswaran, Finn, Kakade, Levine (2019), equation 3.
    """

    objective: Objective
    strength: float | Callable[[PyTree, PyTree], PyTree]
    center: Callable[[PyTree, PyTree], PyTree] = identity_center
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    symmetric = True

    def __post_init__(self) -> None:
        check_strong_convexity("Proximal", self.strong_convexity)
        check_signature("Proximal", "objective", self.objective, "w", "theta", "data")
        check_signature("Proximal", "center", self.center, "theta", "data")
        check_signature("Proximal", "strength", self.strength if callable(self.strength) else None, "theta", "data")
        if not callable(self.strength) and not 0 < self.strength < float("inf"):
            raise ValueError(
                f"Proximal needs a finite strength λ above 0, got {self.strength}; without a proximal term, use "
                "Stationary"
            )

    def potential(self, w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
        """Return the value of the function whose gradient in w is the residual, a scalar."""
        difference = self._difference(w, theta, data)
        penalty = tree.vdot(difference, self._pull(difference, theta, data))
        value = scalar(self.objective(w, theta, data), "objective", NO_AUX)
        return value + 0.5 * penalty.astype(value.dtype)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        pull = self._pull(self._difference(w, theta, data), theta, data)
        return tree.add(gradient_of(self.objective, w, theta, data, NO_AUX), pull)

    def scaling(self, theta: PyTree, data: PyTree) -> PyTree:
        # An entry of a learned λ that is not positive leaves its unknowns unscaled, because λ^-½ does not exist.
        return jax.tree.map(
            lambda strength: jnp.where(strength > 0, strength, jnp.ones_like(strength)) ** -0.5,
            tree.arrays(self._strength(theta, data)),
        )

    def _pull(self, difference: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return λ times the difference w − c."""
        strength = self._strength(theta, data)
        expected, got = jax.tree.structure(difference), jax.tree.structure(strength)
        if got != expected and not jax.tree_util.all_leaves([strength]):
            raise ValueError(
                f"Proximal needs a strength that is a scalar or has the tree structure of w, {expected}, got {got}"
            )
        return tree.scale(strength, difference)

    def _difference(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return w − c."""
        center = self.center(theta, data)
        expected, got = jax.tree.structure(w), jax.tree.structure(center)
        if got != expected:
            raise ValueError(
                f"Proximal needs a centre with the tree structure of w, {expected}, got {got}: pass center, a function "
                "of (theta, data) that returns such a tree; by default the centre is theta"
            )
        return tree.subtract(w, tree.like(tree.arrays(center), w))

    def _strength(self, theta: PyTree, data: PyTree) -> PyTree:
        return self.strength(theta, data) if callable(self.strength) else self.strength
