"""Conditions of constrained and of non-smooth minima: Projected and ProximalGradient."""

from collections.abc import Callable
from dataclasses import dataclass

from bilevel import tree
from bilevel.conditions.forward_mode import differentiable_forwards
from bilevel.conditions.protocol import (
    Residual,
    StrongConvexity,
    check_signature,
    check_strong_convexity,
    gradient_of,
    like_w,
    no_scaling,
)
from bilevel.conditions.stationary import NO_AUX
from bilevel.types import Objective, PyTree


@dataclass(frozen=True)
class Projected:
    """The condition w = P(w − η∇_w objective) of a minimum over a convex set, with the projection P onto the set.

    The objective and the set may depend on θ. The projection has a kink where a constraint becomes active. At a
    solution on a kink, the derivative is the one that JAX takes there. For a projection of :func:`jaxopt_projection`
    it is that of one side, and for ``jnp.maximum`` it is the mean of both sides.

    Args:
        objective: ``objective(w, theta, data) -> scalar``.
        projection: ``projection(w, theta, data)`` onto the set; :func:`jaxopt_projection` makes one.
        step_size: η > 0. The solution does not depend on it. For a convex objective, fixed-point iteration
            converges for η below 2 / (largest eigenvalue of the Hessian).
        positive_definite: as for :class:`FixedPoint`.
        strong_convexity: as for :class:`FixedPoint`.

    Raises:
        ValueError: for a step size or a number μ (the strong convexity) that is not positive and finite. On each
            evaluation, if ``projection`` returns a tree with another structure than w, or shapes that do not broadcast
            to those of w.
        TypeError: for a function that does not take these arguments. On each evaluation, if ``objective`` returns no
            scalar.

    Source: Blondel et al. (2022), Efficient and modular implicit differentiation, section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> positive = lambda w, theta, data: jnp.maximum(w, theta)
        >>> condition = Projected(lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2), positive)
        >>> [float(r) for r in condition.residual(jnp.array([0.0, 2.0]), jnp.float32(0.0), jnp.array([-1.0, 2.0]))]
        [0.0, 0.0]
    """

    objective: Objective
    projection: Residual
    step_size: float = 1.0
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    symmetric = False
    scaling = no_scaling

    def __post_init__(self) -> None:
        check_step_size("Projected", self.step_size)
        check_strong_convexity("Projected", self.strong_convexity)
        check_signature("Projected", "objective", self.objective, "w", "theta", "data")
        check_signature("Projected", "projection", self.projection, "w", "theta", "data")

    def mapping(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return P(w − η∇objective), whose fixed point is the solution."""
        moved = differentiable_forwards(self.projection, descend(self, w, theta, data), theta, data)
        return like_w(moved, w, "projection", same_shapes=False)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return tree.subtract(w, self.mapping(w, theta, data))


@dataclass(frozen=True)
class ProximalGradient:
    """The condition w = prox_ηr(w − η∇_w objective) of a minimum of objective + r, with the proximal operator of r.

    For many r, such as ‖w‖₁, the proximal operator has a kink where an entry becomes zero. At a solution on a kink, the
    derivative is the one that JAX takes there. For an operator of :func:`jaxopt_prox` it is that of one side, and for
    ``jnp.maximum`` it is the mean of both sides.

    Args:
        objective: ``objective(w, theta, data) -> scalar``, the smooth part.
        prox: ``prox(w, theta, data, step_size)`` = argmin_u ½‖u − w‖² + η·r(u, θ); :func:`jaxopt_prox` makes one.
        step_size: η > 0. The solution does not depend on it. For a convex objective, fixed-point iteration
            converges for η below 2 / (largest eigenvalue of the Hessian).
        positive_definite: as for :class:`FixedPoint`.
        strong_convexity: as for :class:`FixedPoint`.

    Raises:
        ValueError: for a step size or a number μ (the strong convexity) that is not positive and finite. On each
            evaluation, if ``prox`` returns a tree with another structure than w, or shapes that do not broadcast to
            those of w.
        TypeError: for a function that does not take these arguments. On each evaluation, if ``objective`` returns no
            scalar.

    Source: Bertrand et al. (2020), Implicit differentiation of Lasso-type models.

    Example:
        >>> import jax.numpy as jnp
        >>> shrink = lambda w, theta, data, step_size: jnp.sign(w) * jnp.maximum(jnp.abs(w) - step_size * theta, 0.0)
        >>> condition = ProximalGradient(lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2), shrink)
        >>> [float(r) for r in condition.residual(jnp.array([0.0, 2.0]), jnp.float32(1.0), jnp.array([0.5, 3.0]))]
        [0.0, 0.0]
    """

    objective: Objective
    prox: Callable[[PyTree, PyTree, PyTree, float], PyTree]
    step_size: float = 1.0
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    symmetric = False
    scaling = no_scaling

    def __post_init__(self) -> None:
        check_step_size("ProximalGradient", self.step_size)
        check_strong_convexity("ProximalGradient", self.strong_convexity)
        check_signature("ProximalGradient", "objective", self.objective, "w", "theta", "data")
        check_signature("ProximalGradient", "prox", self.prox, "w", "theta", "data", "step_size")

    def mapping(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return prox(w − η∇objective), whose fixed point is the solution."""

        def prox(w, theta, data):
            return self.prox(w, theta, data, self.step_size)

        moved = differentiable_forwards(prox, descend(self, w, theta, data), theta, data)
        return like_w(moved, w, "prox", same_shapes=False)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return tree.subtract(w, self.mapping(w, theta, data))


def check_step_size(name: str, step_size: float) -> None:
    """Raise ValueError for a step size that is not positive and finite."""
    if not 0 < step_size < float("inf"):
        raise ValueError(f"{name} needs a finite step_size above 0, got {step_size}")


def descend(condition: Projected | ProximalGradient, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
    """Return w − η∇_w objective: one step of gradient descent."""
    gradient = gradient_of(condition.objective, w, theta, data, NO_AUX)
    return tree.subtract(w, tree.scale(condition.step_size, gradient))
