"""Dense factorisations: LU and Cholesky."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import spectrum, tree
from bilevel.linear import diagnosis
from bilevel.linear.system import (
    check_not_negative,
    denormalise,
    in_accumulation_dtype,
    normalise,
    square,
)
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@dataclass(frozen=True)
class LU:
    """An LU factorisation, for any regular operator of up to some thousand unknowns.

    The operator is written out as a matrix, which takes n products and n² numbers of memory for n unknowns. The status
    follows from the backward error ‖b − Ax‖ / (‖A‖‖x‖ + ‖b‖) and from an estimate of the reciprocal condition number,
    ``LinearInfo.rcond``, which takes four solves with the factors. The status is SINGULAR for an rcond below eps,
    ILL_CONDITIONED for one below √eps, and BREAKDOWN for a backward error above √eps. Where the terms of a product Ax
    cancel, as in x − Mx with M ≈ I, the residual of x may be rounding noise although x is accurate. A backward
    error above √eps then gives ILL_CONDITIONED in place of BREAKDOWN, on two conditions: the backward error with the
    written-out matrix is at most √eps, and the relative residual is below 1.

    Args:
        ridge: solve (A + ridge·I)x = b instead.

    Raises:
        ValueError: for a negative ridge, and, when called, for an operator that is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 5.0], [0.0, 1.0]])
        >>> x, info = LU()(lambda v: matrix @ v, jnp.array([6.0, 1.0]))
        >>> [round(float(entry), 5) for entry in x]
        [1.0, 1.0]
    """

    ridge: float = 0.0

    needs_symmetry = False

    def __post_init__(self) -> None:
        check_not_negative("LU", ridge=self.ridge)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        del init  # a factorisation needs no start
        return _factorise("LU", lu, self.ridge, matvec, b, Status.SINGULAR)


@dataclass(frozen=True)
class Cholesky:
    """A Cholesky factorisation of a symmetric positive definite operator.

    The factorisation takes half as many operations as that of :class:`LU`, and the status is computed in the same way.
    If the operator is not positive definite, the factorisation fails with the status NEGATIVE_CURVATURE. So a
    factorisation that does not fail proves that the operator is positive definite, up to rounding.

    Args:
        ridge: solve (A + ridge·I)x = b instead.

    Raises:
        ValueError: for a negative ridge, and, when called, for an operator that is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = Cholesky()(lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 2.0]))
        >>> [round(float(entry), 5) for entry in x]
        [1.0, 0.5]
    """

    ridge: float = 0.0

    needs_symmetry = True

    def __post_init__(self) -> None:
        check_not_negative("Cholesky", ridge=self.ridge)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        del init  # a factorisation needs no start
        return _factorise("Cholesky", _cholesky, self.ridge, matvec, b, Status.NEGATIVE_CURVATURE)


def _factorise(
    name: str,
    factorise: Callable[[jax.Array], tuple[MatVec, MatVec]],
    ridge: float,
    matvec: MatVec,
    b: PyTree,
    breakdown: Status,
) -> tuple[PyTree, LinearInfo]:
    """Solve the ravelled system with the functions v ↦ A⁻¹v and v ↦ A⁻ᵀv that ``factorise`` makes of the matrix."""
    operator = square(name, matvec, ridge, b)
    size, b_scaled, _ = normalise(b)
    flat, unravel = ravel_pytree(tree.widened(b_scaled))  # LAPACK factorises nothing narrower than float32
    if not flat.size:  # there is no matrix to factorise
        info = diagnosis.report(operator, b_scaled, b_scaled, tol=0.0)
        return denormalise(size, b_scaled, replace(info, rcond=jnp.ones((), flat.dtype)))
    wide = in_accumulation_dtype(operator, b)
    matrix = spectrum.matrix(lambda v: ravel_pytree(wide(unravel(v)))[0], flat)
    solve, solve_transposed = factorise(matrix)
    solution = solve(flat)
    x = tree.like(unravel(solution), b)
    info = report_direct(operator, b_scaled, x, matrix, solution, solve, solve_transposed, breakdown)
    return denormalise(size, x, info)


def report_direct(
    operator: MatVec,
    b: PyTree,
    x: PyTree,
    matrix: jax.Array,
    solution: jax.Array,
    solve: MatVec,
    solve_transposed: MatVec,
    breakdown: Status,
    needs_regular: bool = True,
) -> LinearInfo:
    """Return the :class:`LinearInfo` of a direct solve, judged by its backward error and the condition number.

    Args:
        operator: A.
        b: the right-hand side.
        x: the computed solution.
        matrix: A as a matrix.
        solution: x as a vector in the dtype of the matrix.
        solve: the function v ↦ A⁻¹v of a factorisation, for the estimate of the condition number.
        solve_transposed: v ↦ A⁻ᵀv.
        breakdown: the status of an x that is not finite although A and b are finite.
        needs_regular: whether the algorithm requires a regular A. If so, the status for a singular A is SINGULAR.
    """
    matrix, solution = jax.lax.stop_gradient((matrix, solution))
    norm = jnp.max(jnp.sum(jnp.abs(matrix), axis=0), initial=0)
    rcond = jax.lax.stop_gradient(1 / tree.safe_divisor(norm * _norm_of_inverse(solve, solve_transposed, solution)))
    rcond = jnp.where((norm > 0) & jnp.isfinite(rcond), rcond, jnp.zeros_like(rcond))
    info = diagnosis.report(operator, b, x, tol=None, breakdown=breakdown)
    backward = backward_error(info.relative_residual, norm, solution, b)
    eps = tree.eps(b)
    status = jnp.where(rcond < eps**0.5, jnp.int32(Status.ILL_CONDITIONED), jnp.int32(Status.CONVERGED))
    # The terms of a product such as x − Mx may cancel, so that its rounding errors exceed √eps‖A‖‖x‖ although the
    # matrix is exact. Then x is accepted, as ILL_CONDITIONED, if its backward error with the matrix is at most √eps and
    # its relative residual with the product is below 1.
    flat = jnp.concatenate([jnp.ravel(leaf).astype(matrix.dtype) for leaf in jax.tree.leaves(b)])
    of_matrix = backward_error(diagnosis.relative_residual(flat, flat - matrix @ solution), norm, solution, b)
    cancels = (of_matrix <= eps**0.5) & (info.relative_residual < 1)
    of_product = jnp.where(cancels, jnp.int32(Status.ILL_CONDITIONED), jnp.int32(Status.BREAKDOWN))
    status = jnp.where(backward <= eps**0.5, status, of_product)
    if needs_regular:
        status = jnp.where((rcond < eps) & jnp.isfinite(tree.norm(solution)), jnp.int32(Status.SINGULAR), status)
    status = jnp.where(info.status >= int(breakdown), info.status, status)
    return replace(info, status=status, rcond=rcond)


def backward_error(relative_residual: jax.Array, norm: jax.Array, x: PyTree, b: PyTree) -> jax.Array:
    """Return ‖b − Ax‖ / (‖A‖‖x‖ + ‖b‖) from the relative residual ‖b − Ax‖ / ‖b‖ and ‖A‖, which is ``norm``."""
    # Numerator and denominator are divided by ‖b‖. Up to rounding and the choice of norms, ‖A‖‖x‖ / ‖b‖ lies between 1
    # and the condition number, so that it neither under- nor overflows.
    growth = tree.norm(x) / tree.safe_divisor(tree.norm(b))
    return relative_residual / (1 + norm * growth)


def _norm_of_inverse(solve: MatVec, solve_transposed: MatVec, like: jax.Array) -> jax.Array:
    """Estimate ‖A⁻¹‖₁ from below by three solves with A and one with Aᵀ.

    Source: Hager (1984); Higham (1988), algorithm 4.1 with one iteration and its alternating vector.
    """
    n = like.size
    alternating = jnp.asarray((-1.0) ** np.arange(n) * np.linspace(1, 2, n), like.dtype)
    first = solve(jnp.full_like(like, 1 / n))
    slope = jnp.abs(solve_transposed(jnp.sign(first)))
    column = solve((jnp.arange(n) == jnp.argmax(slope)).astype(like.dtype))
    found = [jnp.sum(jnp.abs(first)), jnp.sum(jnp.abs(column)), 2 * jnp.sum(jnp.abs(solve(alternating))) / (3 * n)]
    return jnp.max(jnp.stack(found))


def lu(matrix: jax.Array) -> tuple[MatVec, MatVec]:
    """Return v ↦ A⁻¹v and v ↦ A⁻ᵀv by an LU factorisation of a matrix."""
    if matrix.size == 1:  # a division, because LAPACK would factorise the matrices of a vmapped batch one by one

        def divide(v: jax.Array) -> jax.Array:
            return v / matrix[0]

        return divide, divide
    factors = jax.scipy.linalg.lu_factor(matrix)
    return (
        lambda v: jax.scipy.linalg.lu_solve(factors, v),
        lambda v: jax.scipy.linalg.lu_solve(factors, v, trans=1),
    )


def _cholesky(matrix: jax.Array) -> tuple[MatVec, MatVec]:
    factor = jax.scipy.linalg.cho_factor(matrix)

    def solve(v: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve(factor, v)

    return solve, solve
