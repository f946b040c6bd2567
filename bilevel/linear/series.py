"""The truncated Neumann series as a linear solver: Neumann."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel._deprecation import renamed_field
from bilevel.linear import diagnosis
from bilevel.linear.system import check_not_negative, denormalise, normalise, square
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@renamed_field("terms", "max_steps")
@dataclass(frozen=True)
class Neumann:
    """The truncated series x = α Σ_{k<K} (I − αA)^k b, for an operator with ‖I − αA‖ < 1.

    For the adjoint system, the gradient that follows from x equals that of backpropagation through K steps of gradient
    descent with step size α, all taken at the inner solution. With ``init``, x is the result of K steps
    x ← x + α(b − Ax) from there.

    Args:
        max_steps: K, the number of terms. Each term takes one product, except for the first one without ``init``.
            Without ``init``, the error is (I − αA)^K times the exact solution.
        step_size: α, below 2 / (largest eigenvalue of A); 1 suits a fixed-point condition.
        tol: the status is CONVERGED if ‖b − Ax‖ ≤ tol·‖b‖, else MAX_STEPS; with None it is BUDGET_USED. If
            ‖b − Ax‖ ≥ ‖b‖, the status is BREAKDOWN, because a convergent series lowers the residual. With None, it is
            BREAKDOWN only if ‖b − Ax‖ is also at least the residual of ``init``. With None, an ‖x‖ so large that x may
            have no correct digit has the status BREAKDOWN too. All terms are summed in every case.
        ridge: solve (A + ridge·I)x = b instead.

    Raises:
        ValueError: for fewer than one term, a step size that is not positive, or a negative tol or ridge, and, when
            called, for an operator that is not square.

    Source: Lorraine, Vicol, Duvenaud (2020), algorithm 3.

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = Neumann(max_steps=3)(lambda v: 0.5 * v, jnp.float32(1.0))
        >>> float(x)  # 1 + ½ + ¼
        1.75
    """

    max_steps: int = 20
    step_size: float = 1.0
    tol: float | None = None
    ridge: float = 0.0

    needs_symmetry = False

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not self.step_size > 0:
            raise ValueError(
                f"Neumann needs max_steps of at least 1 and a step_size above 0, got {self.max_steps} and "
                f"{self.step_size}"
            )
        check_not_negative("Neumann", tol=self.tol, ridge=self.ridge)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        operator = square("Neumann", matvec, self.ridge, b, init)
        size, b_scaled, init_scaled = normalise(b, init)

        def advance(_, state):
            x, norm = state
            product = operator(x)
            norm = jnp.maximum(norm, jax.lax.stop_gradient(tree.norm(product) / tree.safe_divisor(tree.norm(x))))
            return tree.add(x, tree.scale(self.step_size, tree.subtract(b_scaled, product))), norm

        norm = jnp.zeros_like(size)
        state = (tree.scale(self.step_size, b_scaled), norm) if init is None else advance(0, (init_scaled, norm))
        x, norm = jax.lax.fori_loop(1, self.max_steps, advance, tree.match_varying_axes(*state))
        info = diagnosis.report(operator, b_scaled, x, self.tol, iterations=self.max_steps, norm=norm, init=init_scaled)
        # Each term of a convergent series lowers the residual, whatever the number of terms.
        diverged = info.status == int(Status.MAX_STEPS) if self.tol is None else info.relative_residual >= 1
        diverged = diverged & (info.status != int(Status.NONFINITE))
        info = replace(info, status=jnp.where(diverged, jnp.int32(Status.BREAKDOWN), info.status))
        return denormalise(size, x, info)
