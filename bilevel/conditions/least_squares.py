"""The condition of a least-squares fit: LeastSquares."""

from dataclasses import dataclass
from typing import Any, Literal

import jax

from bilevel import tree
from bilevel.conditions.protocol import (
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
class LeastSquares:
    """The condition Jᵀr = 0 of a minimum of ½‖r(w, θ, data)‖² over w, with J = ∂r/∂w.

    There may be more residuals than unknowns, or fewer. The Jacobian of the condition is the Hessian
    JᵀJ + Σᵢ rᵢ∇²rᵢ.

    Args:
        residuals: ``residuals(w, theta, data)``, any pytree of floating-point arrays: r. Every leaf counts, also those
            of the second entry of a tuple. For ``(residuals, aux)`` pass ``has_aux=True``.
        operator: the matrix of the adjoint system. ``"exact"`` is the Hessian, with which the hypergradient is exact.
            ``"gauss_newton"`` is JᵀJ, which is never indefinite. A product with it takes one product with J and one
            with Jᵀ, and no second derivative. The hypergradient is then exact if r = 0 at the solution or r is affine
            in w. Otherwise the relative error of the adjoint is at most ‖(JᵀJ)⁻¹Σᵢ rᵢ∇²rᵢ‖.
        positive_definite: whether the matrix of the adjoint system is known to be positive definite.
        strong_convexity: μ, a lower bound of the Hessian's smallest eigenvalue, where one is known: a number above 0,
            or ``f(theta, data)``.
        has_aux: whether ``residuals`` returns ``(value, aux)``, where aux is any pytree. Derivatives leave it out, and
            ``condition.aux(w, theta, data)`` returns it.

    Raises:
        ValueError: for another operator, for a number μ that is not positive and finite, and, in use, for residuals
            with ``has_aux`` that do not return a pair.
        TypeError: for residuals that are not a function of three arguments, and, in use, for a leaf that is not
            floating point.

    Source: Nocedal and Wright (2006), section 10.1.

    Example:
        >>> import jax.numpy as jnp
        >>> points = jnp.array([0.0, 1.0, 2.0])
        >>> fit = LeastSquares(lambda w, theta, data: w[0] + w[1] * points - data)  # a line through three points
        >>> [float(f) for f in fit.residual(jnp.array([1.0, 2.0]), None, jnp.array([1.0, 3.0, 5.0]))]
        [0.0, 0.0]
    """

    residuals: Residual
    operator: Literal["exact", "gauss_newton"] = "exact"
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None
    has_aux: bool = False

    symmetric = True
    scaling = no_scaling

    def __post_init__(self) -> None:
        if self.operator not in ("exact", "gauss_newton"):
            raise ValueError(f'LeastSquares needs the operator "exact" or "gauss_newton", got {self.operator!r}')
        check_strong_convexity("LeastSquares", self.strong_convexity)
        check_signature("LeastSquares", "residuals", self.residuals, "w", "theta", "data")
        object.__setattr__(self, "residuals", without_aux(self.residuals, "residuals", self.has_aux))

    def potential(self, w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
        """Return ½‖r‖², whose gradient in w is the residual."""
        r = _floating(self.residuals(w, theta, data))
        return 0.5 * tree.vdot(r, r)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return Jᵀr, a pytree like w."""
        r, pull_back = jax.vjp(lambda w: _floating(self.residuals(w, theta, data)), w)
        return pull_back(r)[0]

    def aux(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return the second output of ``residuals``; None without ``has_aux``."""
        return aux_of(self.residuals, w, theta, data)

    def adjoint_residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """Return Jᵀr. Its derivative in w is a product with the matrix that ``operator`` names."""
        if self.operator == "exact":
            return self.residual(w, theta, data)
        # The rule below gives JᵀJu in place of the derivative of Jᵀr along u. If JAX differentiates again, it takes the
        # derivative of this product, so second derivatives are those of the approximate first derivative.
        # A custom_jvp may not close over a tracer, so what the function captures becomes an argument.
        residuals, captured = jax.closure_convert(self.residuals, w, theta, data)

        def product(w: PyTree, *others: PyTree) -> PyTree:
            r, pull_back = jax.vjp(lambda w: _floating(residuals(w, *others)), w)
            return pull_back(r)[0]

        call = jax.custom_jvp(product)

        @call.defjvp
        def push_forward(primals: Any, tangents: Any) -> Any:
            w, *others = primals
            values = lambda w: _floating(residuals(w, *others))  # noqa: E731
            along_w = jax.vjp(values, w)[1](jax.jvp(values, (w,), tangents[:1])[1])[0]
            out, along_others = jax.jvp(lambda *others: product(w, *others), tuple(others), tangents[1:])
            return out, tree.add(along_w, along_others)

        return call(w, theta, data, *captured)


def _floating(r: PyTree) -> PyTree:
    """Return the residuals as arrays, or raise TypeError for a leaf that is not floating point."""
    r = tree.arrays(r, "residuals")
    for path, leaf in jax.tree_util.tree_leaves_with_path(r):
        if not tree.is_floating(leaf):
            raise TypeError(
                f"LeastSquares needs floating-point residuals, got {leaf.dtype} at "
                f"residuals{jax.tree_util.keystr(path)}: convert it by astype(float), or if the function returns "
                "(residuals, aux), pass has_aux=True"
            )
    return r
