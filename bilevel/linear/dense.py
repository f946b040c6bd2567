"""Dense factorisations: LU and Cholesky."""

from dataclasses import dataclass

from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.linear import diagnosis
from bilevel.linear.system import check_not_negative, denormalise, in_accumulation_dtype, normalise, with_ridge
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@dataclass(frozen=True)
class LU:
    """An LU factorisation, for any regular operator of up to some thousand unknowns: jaxopt's ``solve_lu``.

    The operator is written out as a matrix, which takes n products and n² numbers of memory for n unknowns. The status
    is SINGULAR if the relative residual is above √eps.

    Args:
        ridge: solve (A + ridge·I)x = b instead.

    Raises:
        ValueError: for a negative ridge.

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
        return _factorise("solve_lu", self.ridge, matvec, b, Status.SINGULAR)


@dataclass(frozen=True)
class Cholesky:
    """A Cholesky factorisation of a symmetric positive definite operator: jaxopt's ``solve_cholesky``.

    The factorisation takes half the arithmetic of that of :class:`LU`. It fails, with status NEGATIVE_CURVATURE, if the
    operator is not positive definite. So success proves definiteness up to rounding.

    Args:
        ridge: solve (A + ridge·I)x = b instead.

    Raises:
        ValueError: for a negative ridge.

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
        return _factorise("solve_cholesky", self.ridge, matvec, b, Status.NEGATIVE_CURVATURE)


def _factorise(name: str, ridge: float, matvec: MatVec, b: PyTree, breakdown: Status) -> tuple[PyTree, LinearInfo]:
    """Run one of jaxopt's dense solvers on the ravelled system, because these take neither pytrees nor scalars."""
    from bilevel._jaxopt import library  # imports jaxopt

    operator = with_ridge(matvec, ridge)
    size, b_unit, _ = normalise(b)
    flat, unravel = ravel_pytree(tree.widened(b_unit))  # LAPACK factorises nothing narrower than float32

    def flat_matvec(v):  # solve_cholesky makes its basis vectors in the default dtype, not in that of b
        return ravel_pytree(in_accumulation_dtype(operator, b)(unravel(v.astype(flat.dtype))))[0]

    x = tree.like(unravel(getattr(library, name)(flat_matvec, flat)), b)
    # A factorisation is backward stable: its residual is a few n·eps unless the matrix is singular in this precision.
    tol = tree.eps(b) ** 0.5
    info = diagnosis.report(operator, b_unit, x, tol, failure=Status.SINGULAR, breakdown=breakdown)
    return denormalise(size, info)
