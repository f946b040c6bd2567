"""What holds at the inner solution: a condition is a residual F(w, θ, data) that vanishes there.

Everything else follows from the residual: the inner solver drives it to zero, and the implicit function
theorem differentiates it, dw*/dθ = −(∂F/∂w)⁻¹ ∂F/∂θ. A condition also says what it knows of its own
structure, so that a solver that cannot work on it is refused before anything runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import Objective, PyTree


class Condition(Protocol):
    """What solvers and methods ask of a condition."""

    symmetric: bool
    """Whether ∂F/∂w is symmetric everywhere: F is then the gradient in w of some function."""

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """F(w, θ, data), a pytree like w."""
        ...

    def scaling(self, theta: PyTree, data: PyTree) -> PyTree | None:
        """D, a scalar or a pytree like w: the adjoint system is solved as (D A D)u = D g, v = D u."""
        ...


@dataclass(frozen=True)
class Stationary:
    """∇_w objective(w, θ, data) = 0: an unconstrained minimum, or any other stationary point.

    Args:
        objective: ``objective(w, theta, data) -> scalar``.

    Example:
        >>> import jax.numpy as jnp
        >>> ridge = Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * theta * w**2)
        >>> float(ridge.residual(jnp.float32(1.0), jnp.float32(1.0), jnp.float32(2.0)))
        0.0
    """

    objective: Objective

    symmetric = True

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return jax.grad(self.objective)(w, theta, data)

    def scaling(self, theta: PyTree, data: PyTree) -> None:
        return None


def theta_itself(theta: PyTree, data: PyTree) -> PyTree:
    """The centre of a proximal term that pulls w towards θ."""
    del data
    return theta


@dataclass(frozen=True)
class Proximal:
    """∇_w objective + λ(w − c) = 0: the minimum of objective(w, θ, data) + ½ λ‖w − c‖².

    With A = H + λI its adjoint system Av = g is solved in the scaled form (I + H/λ)u = g, whose
    eigenvalues gather at one where H is small against λ.

    Args:
        objective: ``objective(w, theta, data) -> scalar``, without the proximal term.
        strength: λ, a positive float; or ``strength(theta, data)``, a scalar or a pytree like w with one
            λ per parameter, which may be learned.
        center: ``center(theta, data)``, a pytree like w; θ itself by default.

    Raises:
        ValueError: for a λ that is not positive and finite, where it is a number.

    Source: Rajeswaran, Finn, Kakade, Levine (2019), equation 3; for a λ per parameter the scaling is
    symmetric, (I + Λ^-½ H Λ^-½).
    """

    objective: Objective
    strength: float | Callable[[PyTree, PyTree], PyTree]
    center: Callable[[PyTree, PyTree], PyTree] = theta_itself

    symmetric = True

    def __post_init__(self):
        if not callable(self.strength) and not 0 < self.strength < float("inf"):
            raise ValueError(
                f"Proximal needs a strength λ above 0, got {self.strength}; for none at all use Stationary(objective)"
            )

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        pull = tree.scale(self._strength(theta, data), tree.subtract(w, self.center(theta, data)))
        return tree.add(jax.grad(self.objective)(w, theta, data), pull)

    def scaling(self, theta: PyTree, data: PyTree) -> PyTree:
        # Where a learned λ is not positive the system is left as it is, and its status tells.
        return jax.tree.map(
            lambda strength: jnp.where(strength > 0, strength, jnp.ones_like(strength)) ** -0.5,
            jax.tree.map(jnp.asarray, self._strength(theta, data)),
        )

    def _strength(self, theta, data):
        return self.strength(theta, data) if callable(self.strength) else self.strength


@dataclass(frozen=True)
class Problem:
    """An outer function at the solution of an inner condition: min over θ of outer(w*(θ), θ, data).

    Args:
        condition: what holds at w*.
        outer: ``outer(w, theta, data) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        has_aux: whether ``outer`` returns something beside its value.
    """

    condition: Condition
    outer: Callable[[PyTree, PyTree, PyTree], object]
    has_aux: bool = False
