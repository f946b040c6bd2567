"""Conditions with a general Jacobian: Root and FixedPoint."""

from dataclasses import dataclass

from bilevel import tree
from bilevel.conditions.protocol import (
    LikeW,
    Residual,
    StrongConvexity,
    aux_of,
    check_signature,
    check_strong_convexity,
    no_scaling,
    without_aux,
)
from bilevel.types import PyTree


@dataclass(frozen=True)
class Root:
    """The condition residual(w, θ, data) = 0: any system of as many equations as unknowns, with A = ∂residual/∂w.

    Args:
        residual: ``residual(w, theta, data)``, a pytree like w.
        symmetric: whether A is known to be symmetric everywhere, so that CG can be used.
        positive_definite: whether ⟨u, Au⟩ > 0 is known to hold for all u ≠ 0.
        strong_convexity: μ with ⟨u, Au⟩ ≥ μ‖u‖², where it is known: a number above 0, or ``f(theta, data)``.
        has_aux: whether ``residual`` returns ``(value, aux)``, where aux is any pytree. Derivatives leave it out, and
            ``condition.aux(w, theta, data)`` returns it.

    Raises:
        ValueError: on construction, if ``strong_convexity`` is a number that is not both positive and finite. On each
            evaluation, if ``residual`` returns a tree with another structure or other shapes than w, or no pair with
            ``has_aux``.
        TypeError: for a residual that does not take three arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> root = Root(lambda w, theta, data: w**3 - theta)
        >>> float(root.residual(jnp.float32(2.0), jnp.float32(8.0), None))
        0.0
    """

    residual: Residual
    symmetric: bool = False
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None
    has_aux: bool = False

    scaling = no_scaling

    def __post_init__(self) -> None:
        check_strong_convexity("Root", self.strong_convexity)
        if not isinstance(self.residual, LikeW):
            check_signature("Root", "residual", self.residual, "w", "theta", "data")
            object.__setattr__(
                self, "residual", LikeW(without_aux(self.residual, "residual", self.has_aux), "residual")
            )

    def aux(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return the second output of ``residual``; None without ``has_aux``."""
        return aux_of(self.residual, w, theta, data)


@dataclass(frozen=True)
class FixedPoint:
    """The condition w = mapping(w, θ, data), with residual w − mapping and A = I − ∂mapping/∂w.

    Args:
        mapping: ``mapping(w, theta, data)``, a pytree like w.
        symmetric: whether ∂mapping/∂w is known to be symmetric everywhere, so that CG can be used.
        positive_definite: whether ⟨u, Au⟩ > 0 is known to hold for all u ≠ 0, as it does for a contraction in ‖·‖₂.
        strong_convexity: μ with ⟨u, Au⟩ ≥ μ‖u‖², where it is known, a number above 0 or ``f(theta, data)``: 1 − c for a
            mapping with Lipschitz constant c < 1.
        has_aux: whether ``mapping`` returns ``(value, aux)``, where aux is any pytree. Derivatives leave it out, and
            ``condition.aux(w, theta, data)`` returns it.

    Raises:
        ValueError: on construction, if ``strong_convexity`` is a number that is not both positive and finite. On each
            evaluation, if ``mapping`` returns a tree with another structure than w, shapes that do not broadcast to
            those of w, or no pair with ``has_aux``.
        TypeError: for a mapping that does not take three arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> half = FixedPoint(lambda w, theta, data: 0.5 * w + theta)
        >>> float(half.residual(jnp.float32(2.0), jnp.float32(1.0), None))
        0.0
    """

    mapping: Residual
    symmetric: bool = False
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None
    has_aux: bool = False

    scaling = no_scaling

    def __post_init__(self) -> None:
        check_strong_convexity("FixedPoint", self.strong_convexity)
        if not isinstance(self.mapping, LikeW):
            check_signature("FixedPoint", "mapping", self.mapping, "w", "theta", "data")
            # A mapping may return smaller shapes, such as that of a number, which are broadcast to those of w.
            object.__setattr__(
                self, "mapping", LikeW(without_aux(self.mapping, "mapping", self.has_aux), "mapping", same_shapes=False)
            )

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return tree.subtract(w, self.mapping(w, theta, data))

    def aux(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return the second output of ``mapping``; None without ``has_aux``."""
        return aux_of(self.mapping, w, theta, data)
