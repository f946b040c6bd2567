"""The Nyström approximation as a linear solver: Nystrom."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.linear import diagnosis
from bilevel.linear.system import check_not_negative, denormalise, in_accumulation_dtype, normalise, square
from bilevel.types import LinearInfo, MatVec, PyTree


@dataclass(frozen=True)
class Nystrom:
    """The solution x = (ρI + H_r)⁻¹b with the rank-r Nyström approximation H_r of a positive semi-definite A.

    H_r = C W⁺ Cᵀ with C = AΩ and W = ΩᵀAΩ, where the r columns of Ω are an orthonormal basis of a random subspace. The
    inverse follows from Woodbury's identity. The r products are independent of each other and can run at the same time,
    while those of CG follow one another. At full rank the solution is exact for A + ρI.

    Args:
        rank: r, at most the number of unknowns.
        ridge: ρ > 0; the reported residual is ‖b − (A + ρI)x‖ / ‖b‖.
        tol: the status is CONVERGED if ‖b − (A + ρI)x‖ ≤ tol·‖b‖, else MAX_STEPS. With None it is BREAKDOWN if
            ‖x‖ is so large that x may have no correct digit, MAX_STEPS if ‖b − (A + ρI)x‖ ≥ ‖b‖, and BUDGET_USED
            otherwise.
        seed: the seed of the random Ω.

    Raises:
        ValueError: for a rank below one, a ridge that is not positive, or a negative tol, and, when called, for an
            operator that is not square.

    Source: Hataya and Yamada (2023), Nyström method for accurate and scalable implicit differentiation.

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = Nystrom(rank=2, ridge=1.0)(lambda v: jnp.array([1.0, 3.0]) * v, jnp.array([2.0, 2.0]))
        >>> [round(float(entry), 3) for entry in x]
        [1.0, 0.5]
    """

    rank: int
    ridge: float = 1e-2
    tol: float | None = None
    seed: int = 0

    needs_symmetry = True

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.ridge > 0:
            raise ValueError(f"Nystrom needs a rank of at least 1 and a ridge above 0, got {self.rank}, {self.ridge}")
        check_not_negative("Nystrom", tol=self.tol)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        del init  # the approximation needs no start
        size, b_scaled, _ = normalise(b)
        flat, unravel = ravel_pytree(tree.widened(b_scaled))
        wide = in_accumulation_dtype(square("Nystrom", matvec, 0.0, b), b)
        x, norm = flat, None
        if flat.size:  # without unknowns there is no random basis
            x, norm = self._woodbury(lambda v: ravel_pytree(wide(unravel(v)))[0], flat, tree.eps(b))
        x = tree.like(unravel(x), b)
        operator = square("Nystrom", matvec, self.ridge, b)
        info = diagnosis.report(operator, b_scaled, x, self.tol, norm=norm)
        return denormalise(size, x, info)

    def _woodbury(
        self, matvec: Callable[[jax.Array], jax.Array], b: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        """Return x, and the norm of the longest product with A, a lower bound of ‖A‖."""
        normal = jax.random.normal(jax.random.key(self.seed), (b.size, min(self.rank, b.size)), b.dtype)
        sketch, _ = jnp.linalg.qr(normal)
        columns = jax.vmap(matvec, in_axes=1, out_axes=1)(sketch)
        # W may be singular if A is, so eigenvalues of the size of rounding errors are left out.
        core = sketch.T @ columns
        values, vectors = jnp.linalg.eigh(0.5 * (core + core.T))
        # A sum of b.size terms is rounded in b's dtype, and each product is rounded in the leaves' dtype.
        rounding = max(10 * b.size * float(jnp.finfo(b.dtype).eps), 2 * eps)
        kept = values > rounding * jnp.max(jnp.abs(values))
        root = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, jnp.ones_like(values))), jnp.zeros_like(values))
        factor = columns @ (vectors * root[None, :])  # H_r = factor·factorᵀ
        inner = self.ridge * jnp.eye(factor.shape[1], dtype=b.dtype) + factor.T @ factor
        x = (b - factor @ jnp.linalg.solve(inner, factor.T @ b)) / self.ridge
        return x, jax.lax.stop_gradient(jnp.max(jnp.linalg.norm(columns, axis=0)))
