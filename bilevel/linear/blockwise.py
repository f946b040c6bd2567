"""Block-diagonal systems, one block for each of many independent inner problems: Blockwise."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.linear import diagnosis
from bilevel.linear.dense import LU, Cholesky, backward_error
from bilevel.linear.system import denormalise, in_accumulation_dtype, normalise, square
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@dataclass(frozen=True)
class Blockwise:
    """A factorisation of each block of a block-diagonal operator.

    Such an operator belongs to m independent inner problems that are solved as one: each leaf of w has a leading axis
    of m problems, and the residual of a problem depends on no other problem. If each problem has n unknowns, the m
    blocks of n × n numbers are found by n products, with vectors that are the same in all blocks. :class:`LU` would
    take m·n products and store (m·n)² numbers.

    The status is the worst status of a block, and ``LinearInfo.rcond`` is the smallest one of a block. If the operator
    is not block-diagonal, x does not solve the whole system. The backward error of the whole system is then above
    √eps, and the status is BREAKDOWN.

    Args:
        linear: ``LU()`` or ``Cholesky()``, which factorises each block. It may have a ridge.

    Raises:
        TypeError: for another linear solver.
        ValueError: when called, for a tree whose leaves do not have a common leading axis, and for an operator that is
            not square.

    Example:
        Two problems of two unknowns:

        >>> blocks = jnp.array([[[2.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]]])
        >>> b = jnp.array([[4.0, 2.0], [3.0, 4.0]])
        >>> solve = jax.jit(lambda b: Blockwise(LU())(lambda v: jnp.einsum("mij,mj->mi", blocks, v), b))
        >>> x, info = solve(b)
        >>> x.round(4).tolist()
        [[1.0, 2.0], [3.0, 1.0]]
    """

    linear: LU | Cholesky

    def __post_init__(self) -> None:
        if not isinstance(self.linear, LU | Cholesky):
            raise TypeError(f"Blockwise factorises each block by LU() or Cholesky(), got {self.linear!r}")

    @property
    def needs_symmetry(self) -> bool:
        return self.linear.needs_symmetry

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        del init  # a factorisation needs no start
        if (count := tree.common_length(b)) is None:
            raise ValueError(
                "Blockwise needs a w whose leaves have one common leading axis of inner problems, got the shapes "
                f"{tree.shapes(b)}: use LU or Cholesky for a w without such an axis"
            )
        size, b_scaled, _ = normalise(b)
        wide_b = tree.widened(b_scaled)  # LAPACK factorises nothing narrower than float32
        wide = in_accumulation_dtype(square("Blockwise", matvec, 0.0, b), b)
        row, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], wide_b))
        flatten = jax.vmap(lambda row: ravel_pytree(row)[0])

        def column(unit: jax.Array) -> jax.Array:
            """Return the product of each block with the same vector, ``[m, n]``."""
            same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), unravel(unit))
            return flatten(wide(same))

        def solve(block: jax.Array, b: jax.Array) -> tuple[jax.Array, LinearInfo]:
            return self.linear(lambda v: jnp.matmul(block, v, precision=jax.lax.Precision.HIGHEST), b)

        blocks = jax.vmap(column, out_axes=2)(jnp.eye(row.size, dtype=row.dtype))
        found, infos = jax.vmap(solve)(blocks, flatten(wide_b))
        assert infos.rcond is not None, "LU and Cholesky estimate it"
        x = tree.like(jax.vmap(unravel)(found), b)
        info = diagnosis.report(square("Blockwise", matvec, self.linear.ridge, b), b_scaled, x, tol=None)
        norm = jnp.max(jnp.sum(jnp.abs(jax.lax.stop_gradient(blocks)), axis=1), initial=0)
        # LU or Cholesky has judged the solve of each block. If these solves succeeded, only entries of A outside of the
        # blocks make the backward error of the whole system large.
        coupled = backward_error(info.relative_residual, norm, info.solution, b_scaled) > tree.eps(b) ** 0.5
        status = jnp.max(infos.status)
        status = jnp.maximum(status, jnp.where(coupled, jnp.int32(Status.BREAKDOWN), status))
        status = jnp.where(info.status == int(Status.NONFINITE), info.status, status)
        return denormalise(size, x, replace(info, status=status, rcond=jnp.min(infos.rcond)))
