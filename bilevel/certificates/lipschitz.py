"""The Lipschitz constants that a certified error bound needs, and formulas for the constants of linear models."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.types import PyTree


class Ball(NamedTuple):
    """The ball of all w′ with ‖w′ − w‖ ≤ radius, which contains the solution. A constant must hold everywhere in it.

    Attributes:
        w: the centre, a pytree.
        radius: the radius, a scalar.
        v: the adjoint vector at the centre, a pytree like w.
    """

    w: PyTree
    radius: jax.Array
    v: PyTree


Constant = float | Callable[[Ball, PyTree, PyTree], jax.Array] | None
"""A number that holds everywhere, a function ``f(ball, theta, data)`` whose value holds on the ball, or None."""


@dataclass(frozen=True)
class Lipschitz:
    """Lipschitz constants, in w, of the derivatives of a problem with residual F. All norms are Euclidean.

    If a constant is None, :func:`certify` derives it from the problem's structure where possible: from an outer
    function or a residual that does not use θ, or from a :class:`Proximal` whose objective and strength do not use θ.
    Unless an argument below says otherwise, any other constant is probed at one point, which proves nothing.

    Args:
        outer_w: L_g, the constant of w ↦ ∂outer/∂w.
        outer_theta: L_h, the constant of w ↦ ∂outer/∂θ.
        jacobian: ρ, the constant of w ↦ A = ∂F/∂w in the operator norm; 0 for a quadratic inner objective. It is not
            needed if ``adjoint`` and a strong convexity are given.
        adjoint: ρ_v, the constant of w ↦ Aᵀv for the adjoint vector ``ball.v``. None takes ρ‖v‖ if ρ is declared.
        mixed: β, the constant of w ↦ B = ∂F/∂θ in the operator norm.
        mixed_norm: the largest ‖B‖ on the ball. None takes ‖B‖ at the centre plus β times the radius if A is
            factorised, and otherwise a probe of ‖B‖ at the centre.

    Raises:
        ValueError: for a number that is negative, infinite or NaN.

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

    def __post_init__(self) -> None:
        for name, value in self.items():
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ValueError(f"Lipschitz needs a finite {name} ≥ 0, got {value}; pass None if it is unknown")

    def items(self) -> list[tuple[str, Constant]]:
        """List the name and value of each constant that is not None."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, value) for name, value in pairs if value is not None]


@dataclass(frozen=True)
class LinearLoss:
    """Lipschitz constants, in w, of the derivatives of a linear model's loss, the mean over m rows xᵢ of φ(xᵢw).

    Args:
        curvature: the largest ‖∇²φ‖, in the Euclidean operator norm.
        third: the largest ‖∇³φ‖, in the same norm.
    """

    curvature: float
    third: float

    def gradient(self, x: jax.Array) -> jax.Array:
        """Compute the Lipschitz constant of the gradient, curvature·‖X‖²/m, for x of shape ``[m, features]``."""
        return self.curvature * _squared_norm(x, jnp.ones_like(x[:, 0])) / len(x)

    def hessian(self, x: jax.Array) -> jax.Array:
        """Compute the Lipschitz constant of the Hessian, third·‖Xᵀ diag(‖xᵢ‖) X‖/m, for x ``[m, features]``."""
        return self.third * _squared_norm(x, jnp.linalg.norm(x, axis=1)) / len(x)

    def hessian_times(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """Compute the Lipschitz constant of w ↦ (Hessian at w)·v, third·‖Xᵀ diag(‖xᵢv‖) X‖/m.

        It follows from |Σ ∇³φ[xᵢv, xᵢa, xᵢb]| ≤ third·Σ ‖xᵢv‖‖xᵢa‖‖xᵢb‖. With a = b the right-hand side is a quadratic
        form in a, whose matrix is third·Xᵀ diag(‖xᵢv‖) X.

        Args:
            x: the rows, ``[m, features]``.
            v: a vector like w, ``[features]`` or ``[features, classes]``.
        """
        return self.third * _squared_norm(x, jnp.linalg.norm((x @ v).reshape(len(x), -1), axis=1)) / len(x)


HALF_SQUARED = LinearLoss(curvature=1.0, third=0.0)
"""Half squared error, ½(xᵢw − yᵢ)²."""
LOGISTIC = LinearLoss(curvature=1 / 4, third=1 / (6 * 3**0.5))
"""Logistic loss log(1 + exp(−yᵢxᵢw)) with yᵢ = ±1: σ(1 − σ) ≤ ¼, and |σ(1 − σ)(1 − 2σ)| ≤ 1/(6√3)."""
SOFTMAX = LinearLoss(curvature=1 / 2, third=2**0.5 / (3 * 3**0.5))
"""Cross-entropy −log softmax(xᵢw) of the true class.

Along a unit vector, its second and third derivatives are, up to sign, the variance and the third central moment of a
random variable on an interval of length √2.
"""


def _squared_norm(x, weights):
    """Compute ‖Xᵀ diag(weights) X‖₂ for weights ≥ 0 from the smaller of the two Gram matrices."""
    rows = x * jnp.sqrt(weights)[:, None]
    gram = rows.T @ rows if x.shape[1] <= x.shape[0] else rows @ rows.T
    return jnp.linalg.eigvalsh(gram)[-1]
