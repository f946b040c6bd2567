"""The status of a linear solve, from the computed x: one product Ax gives the true residual and ⟨x, Ax⟩."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SolveDiagnostics:
    """The findings about a solve of Ax = b that its computed solution x allows.

    Attributes:
        relative_residual: the true ‖b − Ax‖ / ‖b‖, or ‖b − Ax‖ where b = 0; infinite where x is not finite.
        status: NONFINITE where A or b is not finite, the solver's ``breakdown`` where x alone is not, and CONVERGED
            otherwise.
        not_definite: whether x disproves that A is positive definite.
    """

    relative_residual: jax.Array
    status: jax.Array
    not_definite: jax.Array


def diagnose(matvec: MatVec, b: PyTree, x: PyTree, breakdown: Status = Status.NONFINITE) -> SolveDiagnostics:
    """Return the :class:`SolveDiagnostics` of a computed x, at the cost of one product.

    Args:
        matvec: A.
        b: the right-hand side.
        x: the computed solution.
        breakdown: the status of an x that is not finite although A and b are.
    """
    length = tree.norm(x)
    finite = jnp.isfinite(length)
    # Multiply A by zero if x is not finite: the product is then NaN only if A itself has a NaN.
    x = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), x)
    product = matvec(x)
    residual = relative_residual(b, tree.subtract(b, product))
    status = jnp.where(finite, jnp.int32(Status.CONVERGED), jnp.int32(breakdown))
    status = jnp.where(jnp.isfinite(residual), status, jnp.int32(Status.NONFINITE))
    residual = jnp.where(finite, residual, jnp.full_like(residual, jnp.inf))
    no_curvature = tree.vdot(x, product) <= rounding_of_curvature(length, tree.norm(product))
    return SolveDiagnostics(residual, status, finite & no_curvature & (length > 0))


def relative_residual(b: PyTree, residual: PyTree) -> jax.Array:
    """Return ‖residual‖ / ‖b‖, and ‖residual‖ where b = 0."""
    size = tree.norm(b)
    return tree.norm(residual) / jnp.where(size > 0, size, jnp.ones_like(size))


def rounding_of_curvature(length: jax.Array, product_length: jax.Array) -> jax.Array:
    """Return √eps·‖p‖‖Ap‖: the sign of a smaller ⟨p, Ap⟩ is rounding noise.

    A positive definite A with condition number κ has ⟨p, Ap⟩ ≥ 2√κ/(κ + 1)·‖p‖‖Ap‖ (Kantorovich's inequality). This is
    above the threshold for every κ below 1/eps.
    """
    return jnp.sqrt(jnp.finfo(product_length.dtype).eps) * length * product_length


def judge(residual: jax.Array, tol: float | None, failure: Status | jax.Array = Status.MAX_STEPS) -> jax.Array:
    """Return the status of a residual: BUDGET_USED without ``tol``, else CONVERGED at or below it, else ``failure``."""
    if tol is None:
        return jnp.int32(Status.BUDGET_USED)
    return jnp.where(residual <= tol, jnp.int32(Status.CONVERGED), jnp.asarray(failure, jnp.int32))


def report(
    matvec: MatVec,
    b: PyTree,
    x: PyTree,
    tol: float | None,
    *,
    iterations: int | jax.Array | None = None,
    failure: Status | jax.Array = Status.MAX_STEPS,
    breakdown: Status = Status.NONFINITE,
    needs_definite: bool = False,
) -> LinearInfo:
    """Return the :class:`LinearInfo` of a computed x. It carries no derivative.

    Args:
        matvec: A.
        b: the right-hand side.
        x: the computed solution.
        tol: the tolerance for the relative residual; None for the status BUDGET_USED.
        iterations: the iterations taken, where they are known.
        failure: the status of a residual above ``tol``.
        breakdown: the status of an x that is not finite although A and b are.
        needs_definite: whether the algorithm requires a positive definite A. For an x that disproves definiteness the
            status is then NEGATIVE_CURVATURE.
    """
    b, x = jax.lax.stop_gradient((b, x))
    if needs_definite:
        matvec = _in_a_branch(matvec, (tree.norm(b) == 0) & (tree.norm(x) == 0))
    found = diagnose(matvec, b, x, breakdown)
    status = judge(found.relative_residual, tol, failure)
    if needs_definite:
        status = jnp.where(found.not_definite, jnp.int32(Status.NEGATIVE_CURVATURE), status)
    status = jnp.where(found.status > 0, found.status, status)
    count = None if iterations is None else jnp.asarray(iterations, jnp.int32)
    return LinearInfo(x, found.relative_residual, count, status)


def _in_a_branch(matvec: MatVec, trivial: jax.Array) -> MatVec:
    """Return ``matvec`` in the branch of a cond that is taken unless ``trivial``, which says that b = 0 and x = 0.

    XLA allocates the buffers of a branch apart from those of the solve. That lowers the memory of a few-shot
    meta-gradient by 5 %. Only solvers of symmetric systems use it, because JAX 0.12 cannot batch a branch that contains
    a ``custom_jvp``, as some projections do, and those systems are not symmetric.
    """
    return lambda x: jax.lax.cond(trivial, lambda x: jax.tree.map(jnp.zeros_like, x), matvec, x)
