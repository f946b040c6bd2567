"""The status of a linear solve, from the computed x: one product Ax gives the true residual and ⟨x, Ax⟩."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear.system import Recursion
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SolveDiagnostics:
    """The facts about a solve of Ax = b that follow from the computed solution x alone.

    Attributes:
        relative_residual: the true ‖b − Ax‖ / ‖b‖, or ‖b − Ax‖ where b = 0; infinite where x is not finite.
        status: NONFINITE where A or b is not finite, the argument ``breakdown`` of :func:`diagnose` where only x is not
            finite, and CONVERGED otherwise.
        not_definite: whether ⟨x, Ax⟩ ≤ 0 up to rounding for this x ≠ 0, so that A is not positive definite.
        growth: ‖x‖ / ‖b‖, or ‖x‖ where b = 0.
    """

    relative_residual: jax.Array
    status: jax.Array
    not_definite: jax.Array
    growth: jax.Array


def diagnose(matvec: MatVec, b: PyTree, x: PyTree, breakdown: Status = Status.BREAKDOWN) -> SolveDiagnostics:
    """Return the :class:`SolveDiagnostics` of a computed x, at the cost of one product.

    Args:
        matvec: A.
        b: the right-hand side.
        x: the computed solution.
        breakdown: the status of an x that is not finite although A and b are finite.
    """
    length, size = tree.norm(x), tree.norm(b)
    finite = jnp.isfinite(length)
    # Multiply A by zero if x is not finite: the product is then NaN only if A itself has a NaN.
    x = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), x)
    product = matvec(x)
    residual = tree.distance(b, product) / tree.safe_divisor(size)
    status = jnp.where(finite, jnp.int32(Status.CONVERGED), jnp.int32(breakdown))
    status = jnp.where(jnp.isfinite(residual), status, jnp.int32(Status.NONFINITE))
    residual = jnp.where(finite, residual, jnp.full_like(residual, jnp.inf))
    # ⟨x, Ax⟩ may overflow where x and Ax do not, so x is taken with norm 1.
    direction = tree.scale(1 / jnp.where((length > 0) & finite, length, jnp.ones_like(length)), x)
    rounding = rounding_of_curvature(jnp.ones_like(length), tree.norm(product))
    not_definite = finite & (length > 0) & (tree.vdot(direction, product) <= rounding)
    return SolveDiagnostics(residual, status, not_definite, length / tree.safe_divisor(size))


def relative_residual(b: PyTree, residual: PyTree) -> jax.Array:
    """Return ‖residual‖ / ‖b‖, and ‖residual‖ where b = 0."""
    return tree.norm(residual) / tree.safe_divisor(tree.norm(b))


def rounding_of_curvature(length: jax.Array, product_length: jax.Array) -> jax.Array:
    """Return √eps·‖p‖‖Ap‖: the sign of a smaller ⟨p, Ap⟩ is rounding noise.

    A positive definite A with condition number κ has ⟨p, Ap⟩ ≥ 2√κ/(κ + 1)·‖p‖‖Ap‖ (Kantorovich's inequality). This is
    above the threshold for every κ below 1/eps.
    """
    return jnp.sqrt(jnp.finfo(product_length.dtype).eps) * length * product_length


def outgrown(residual: jax.Array, stretch: jax.Array, eps: float) -> jax.Array:
    """Return whether ‖x‖ is so large that x may have no correct digit.

    Args:
        residual: ‖b − Ax‖ / ‖b‖.
        stretch: ‖A‖‖x‖ / ‖b‖, at most the condition number of A where Ax = b.
        eps: the machine epsilon.

    A stretch above 1/√eps alone does not make the result True, because an ill-conditioned A can cause it. The result
    is True if the residual or the rounding error eps·stretch is also above 0.1.
    """
    return (stretch > eps**-0.5) & ((residual > 0.1) | (eps * stretch > 0.1))


def start_residual(matvec: MatVec, b: PyTree, init: PyTree) -> jax.Array:
    """Return the relative residual of a start, at the cost of one product."""
    return jax.lax.stop_gradient(relative_residual(b, tree.subtract(b, matvec(init))))


def judge(
    residual: jax.Array,
    tol: float | None,
    failure: Status | jax.Array = Status.MAX_STEPS,
    start: jax.Array | float = 1.0,
) -> jax.Array:
    """Return the status of a residual.

    With ``tol``, it is CONVERGED for a relative residual of at most ``tol``, else ``failure``. Without ``tol``, it is
    BUDGET_USED for a relative residual below 1, else MAX_STEPS: x = 0 has the residual 1, so an x with a residual of
    1 or more is no better than zero. ``start`` is the relative residual of the point where the solve began. It may be
    above 1 near the end of an outer loop with warm starts. The status of a residual below ``start`` is then BUDGET_USED
    too.
    """
    if tol is None:
        return jnp.where(residual < jnp.maximum(start, 1), jnp.int32(Status.BUDGET_USED), jnp.int32(Status.MAX_STEPS))
    return jnp.where(residual <= tol, jnp.int32(Status.CONVERGED), jnp.asarray(failure, jnp.int32))


def report(
    matvec: MatVec,
    b: PyTree,
    x: PyTree,
    tol: float | None,
    *,
    iterations: int | jax.Array | None = None,
    norm: jax.Array | None = None,
    init: PyTree | None = None,
    failure: Status | jax.Array = Status.MAX_STEPS,
    breakdown: Status = Status.BREAKDOWN,
    needs_definite: bool = False,
) -> LinearInfo:
    """Return the :class:`LinearInfo` of a computed x. It carries no derivative.

    Args:
        matvec: A.
        b: the right-hand side.
        x: the computed solution.
        tol: the tolerance for the relative residual, or None; see :func:`judge`.
        iterations: the iterations taken, where they are known.
        norm: a lower bound of ‖A‖ from the solver's products. If it is given and ``tol`` is None, an x for which
            :func:`outgrown` is True has the status BREAKDOWN.
        init: where the solver started; None for zero. Without ``tol``, the residual of this start is computed too, at
            the cost of one product. With ``needs_definite``, this is done only if the relative residual of x is 1 or
            more.
        failure: the status of a residual above ``tol``.
        breakdown: the status of an x that is not finite although A and b are finite.
        needs_definite: whether the algorithm requires a positive definite A. If ⟨x, Ax⟩ ≤ 0 up to rounding, the status
            is then NEGATIVE_CURVATURE.
    """
    b, x, init = jax.lax.stop_gradient((b, x, init))
    if needs_definite:
        matvec = _in_a_branch(matvec, (tree.norm(b) == 0) & (tree.norm(x) == 0))
    found = diagnose(matvec, b, x, breakdown)
    start = jnp.ones_like(found.relative_residual)
    if tol is None and init is not None and needs_definite:
        no_better_than_zero = found.relative_residual >= 1
        needed = tree.in_any_task(no_better_than_zero)
        start = jax.lax.cond(needed, lambda: start_residual(matvec, b, init), lambda: start)
    elif tol is None and init is not None:  # not in a branch, for the reason that `_in_a_branch` gives
        start = start_residual(matvec, b, init)
    status = judge(found.relative_residual, tol, failure, start)
    if norm is not None and tol is None:
        grown = outgrown(found.relative_residual, norm * found.growth, tree.eps(b))
        status = jnp.where(grown, jnp.int32(Status.BREAKDOWN), status)
    if needs_definite:
        status = jnp.where(found.not_definite, jnp.int32(Status.NEGATIVE_CURVATURE), status)
    status = jnp.where(found.status > 0, found.status, status)
    count = None if iterations is None else jnp.asarray(iterations, jnp.int32)
    return LinearInfo(x, found.relative_residual, count, status)


def report_recursion(
    matvec: MatVec,
    b: PyTree,
    x: PyTree,
    tol: float | None,
    max_steps: int,
    seen: Recursion,
    init: PyTree | None = None,
    needs_definite: bool = False,
) -> LinearInfo:
    """Return the :class:`LinearInfo` of a computed x, from x and from the record of the recursion that computed it.

    If the relative residual is above √eps and above ``tol``, the status is at least SINGULAR after a null vector and at
    least BREAKDOWN after a breakdown. If the recursion ended before ``max_steps`` and the residual is above ``tol``,
    the status is at least STAGNATION.
    """
    seen = jax.lax.stop_gradient(seen)
    early = jnp.where(seen.iterations < max_steps, jnp.int32(Status.STAGNATION), jnp.int32(Status.MAX_STEPS))
    breakdown = Status.NEGATIVE_CURVATURE if needs_definite else Status.BREAKDOWN
    info = report(
        matvec, b, x, tol, iterations=seen.iterations, norm=seen.norm, init=init, failure=early, breakdown=breakdown,
        needs_definite=needs_definite,
    )  # fmt: skip
    cause = jnp.where(seen.broke, jnp.int32(Status.BREAKDOWN), jnp.int32(0))
    cause = jnp.where(seen.null, jnp.int32(Status.SINGULAR), cause)
    unmet = info.relative_residual > max(tol or 0.0, tree.eps(b) ** 0.5)
    return replace(info, status=jnp.where(unmet, jnp.maximum(info.status, cause), info.status))


def _in_a_branch(matvec: MatVec, trivial: jax.Array) -> MatVec:
    """Return ``matvec`` in a branch of a cond that JAX skips if ``trivial`` is True, that is, if b = 0 and x = 0.

    Under ``jax.vmap``, the branch is taken unless all tasks are trivial.

    XLA allocates the buffers of a branch apart from those of the solve. That lowers the memory of a few-shot
    meta-gradient by 5 %. Only solvers of symmetric systems use such a branch, because JAX 0.12 cannot batch a branch
    that contains a ``custom_jvp``. Some projections contain one, but a condition with a projection is not symmetric.
    """
    needed = tree.in_any_task(~trivial)
    return lambda x: jax.lax.cond(needed, matvec, lambda x: jax.tree.map(jnp.zeros_like, x), x)
