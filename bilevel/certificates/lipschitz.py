"""Constants that bound how fast a problem's derivatives change: what a certificate needs to be a proof."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.types import PyTree


class Ball(NamedTuple):
    """Where a constant has to hold: the w′ with ‖w′ − w‖ ≤ radius, among which w* is proved to be.

    Attributes:
        w: the centre, a pytree.
        radius: a scalar.
        v: the adjoint vector at the centre, a pytree like w.
    """

    w: PyTree
    radius: jax.Array
    v: PyTree


Constant = float | Callable[[Ball, PyTree, PyTree], jax.Array] | None
"""A number that holds everywhere, ``f(ball, theta, data)`` that holds on a ball, or None: not known."""


@dataclass(frozen=True)
class Lipschitz:
    """Lipschitz constants in w of a problem's derivatives, with F its residual; all norms are Euclidean.

    What is None is taken from the problem's structure where that tells it (an outer function or a residual that
    does not use θ, a :class:`Proximal` with θ as its centre), else probed at one point, which proves nothing.

    Args:
        outer_w: L_g, of w ↦ ∂outer/∂w.
        outer_theta: L_h, of w ↦ ∂outer/∂θ.
        jacobian: ρ, of w ↦ A = ∂F/∂w in the operator norm; 0 for a quadratic inner objective.
        adjoint: ρ_v, of w ↦ Aᵀv for the ``ball.v`` at hand; None for ρ‖v‖.
        mixed: β, of w ↦ B = ∂F/∂θ in the operator norm.
        mixed_norm: the largest ‖B‖ on the ball; None for ‖B‖ at the centre, computed, and β times the radius.

    Raises:
        ValueError: for a number below zero, infinite, or not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.eye(3)
        >>> constants = Lipschitz(
        ...     outer_w=lambda ball, theta, data: LOGISTIC.gradient(data),
        ...     adjoint=lambda ball, theta, data: LOGISTIC.hessian_times(data, ball.v),
        ... )
        >>> round(float(constants.outer_w(None, None, x)), 4)  # ‖X‖² / 4m
        0.0833
    """

    outer_w: Constant = None
    outer_theta: Constant = None
    jacobian: Constant = None
    adjoint: Constant = None
    mixed: Constant = None
    mixed_norm: Constant = None

    def __post_init__(self):
        for name, value in self.items():
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ValueError(f"Lipschitz needs {name} of at least 0 and finite, got {value}; None where not known")

    def items(self) -> list[tuple[str, Constant]]:
        """Name and value of each constant that is given."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, value) for name, value in pairs if value is not None]


@dataclass(frozen=True)
class LinearLoss:
    """The mean over m rows of φ(xᵢw), with |φ″| ≤ curvature and |φ‴| ≤ third in Euclidean operator norms.

    Args:
        curvature: the largest ‖∇²φ‖.
        third: the largest ‖∇³φ‖.
    """

    curvature: float
    third: float

    def gradient(self, x: jax.Array) -> jax.Array:
        """The Lipschitz constant of the gradient, curvature·‖X‖²/m. x: ``[m, features]``."""
        return self.curvature * _squared_norm(x, jnp.ones_like(x[:, 0])) / len(x)

    def hessian(self, x: jax.Array) -> jax.Array:
        """The Lipschitz constant of the Hessian, third·‖Xᵀ diag(‖xᵢ‖) X‖/m. x: ``[m, features]``."""
        return self.third * _squared_norm(x, jnp.linalg.norm(x, axis=1)) / len(x)

    def hessian_times(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """The Lipschitz constant of w ↦ ∇²v, third·‖Xᵀ diag(‖xᵢv‖) X‖/m. v: ``[features]`` or ``[features, classes]``.

        By Hölder |Σ ∇³φ[xᵢv, xᵢa, xᵢb]| ≤ third·Σ ‖xᵢv‖‖xᵢa‖‖xᵢb‖, a quadratic form for a = b.
        """
        return self.third * _squared_norm(x, jnp.linalg.norm((x @ v).reshape(len(x), -1), axis=1)) / len(x)


HALF_SQUARED = LinearLoss(curvature=1.0, third=0.0)
"""½(xᵢw − yᵢ)²."""
LOGISTIC = LinearLoss(curvature=1 / 4, third=1 / (6 * 3**0.5))
"""log(1 + exp(−yᵢxᵢw)), yᵢ = ±1: σ(1 − σ) ≤ ¼, and |σ(1 − σ)(1 − 2σ)| ≤ 1/(6√3)."""
SOFTMAX = LinearLoss(curvature=1 / 2, third=2**0.5 / (3 * 3**0.5))
"""−log softmax(xᵢw) of a class: variance and third central moment of a variable on an interval of length √2."""


def _squared_norm(x, weights):
    """‖Xᵀ diag(weights) X‖₂ for weights ≥ 0, from the smaller of the two Gram matrices."""
    rows = x * jnp.sqrt(weights)[:, None]
    gram = rows.T @ rows if x.shape[1] <= x.shape[0] else rows @ rows.T
    return jnp.linalg.eigvalsh(gram)[-1]
