"""Generalised minimal residuals with restarts: the recursion of ``GMRES``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear.system import Recursion, limit_of_rounding, start_of
from bilevel.types import MatVec


class _Cycle(NamedTuple):
    """The Arnoldi basis of a cycle, and the QR factorisation of its Hessenberg matrix by Givens rotations.

    ``rotated`` is the right-hand side of the least-squares problem after the rotations, and ``used`` is the number of
    columns that the Hessenberg matrix has so far.
    """

    basis: jax.Array
    triangle: jax.Array
    rotations: jax.Array
    rotated: jax.Array
    used: jax.Array
    iterations: jax.Array
    norm: jax.Array
    null: jax.Array
    going: jax.Array


class _State(NamedTuple):
    x: jax.Array
    r: jax.Array
    iterations: jax.Array
    norm: jax.Array
    null: jax.Array
    stalled: jax.Array
    going: jax.Array


def gmres(
    matvec: MatVec,
    b: jax.Array,
    init: jax.Array | None,
    max_steps: int,
    tol: float,
    eps: float,
    preconditioner: MatVec,
    restart: int = 20,
) -> Recursion:
    """Solve Ax = b for a vector b, by the smallest residual over a Krylov space of AM⁻¹.

    The Hessenberg matrix is reduced by Givens rotations as it grows. The least-squares problem with this matrix then
    has at most the condition number of AM⁻¹, not the square of it, and the residual is known after each product. The
    recursion stops at ‖b − Ax‖ ≤ tol·‖b‖, and at a residual of at most eps·(‖b‖ + ‖A‖‖x‖), the size of the rounding
    errors in b − Ax. It also stops if the next product lies in the span of the earlier
    products, because A is then singular, and after a cycle that does not lower the residual.

    Source: Saad and Schultz (1986); Saad (2003), sections 6.5 and 9.3.2.
    """
    size, most = tree.norm(b), min(restart, max_steps, b.size)

    def extend(target, cycle: _Cycle) -> _Cycle:
        k = cycle.used
        direction = preconditioner(cycle.basis[k])
        w = matvec(direction)
        length = tree.norm(direction)
        norm = jnp.maximum(cycle.norm, tree.norm(w) / tree.safe_divisor(length))
        rounding = 10 * eps * norm * length  # a vector shorter than this is rounding noise of the product
        column = jnp.zeros_like(cycle.rotated)
        for _ in range(2):  # the second pass removes the rounding errors of the first along the basis
            part = _dot(cycle.basis, w)
            w, column = w - _dot(part, cycle.basis), column + part
        rest = tree.norm(w)
        ended = rest <= rounding  # the Krylov space is invariant
        rest = jnp.where(ended, jnp.zeros_like(rest), rest)
        column = jax.lax.fori_loop(
            jnp.int32(0), k, lambda i, c: _rotate(c, i, cycle.rotations[i]), column.at[k + 1].set(rest)
        )
        pivot = tree.norm(jax.lax.dynamic_slice(column, (k,), (2,)))
        null = pivot <= rounding
        rotation = jax.lax.dynamic_slice(column, (k,), (2,)) / tree.safe_divisor(pivot)
        rotated = jnp.where(null, cycle.rotated, _rotate(cycle.rotated, k, rotation))
        triangle = jnp.where(null, cycle.triangle, cycle.triangle.at[:, k].set(_rotate(column, k, rotation)[:-1]))
        used, iterations = jnp.where(null, k, k + 1), cycle.iterations + 1
        left = jnp.where(null, jnp.zeros_like(target), jnp.abs(rotated[k + 1]))
        going = ~null & ~ended & (used < most) & (iterations < max_steps) & (left > target)
        return _Cycle(
            cycle.basis.at[k + 1].set(w / tree.safe_divisor(rest)), triangle, cycle.rotations.at[k].set(rotation),
            rotated, used, iterations, norm, null, going,
        )  # fmt: skip

    def advance(state: _State) -> _State:
        before = tree.norm(state.r)
        target = jnp.maximum(tol * size, limit_of_rounding(eps, size, state.norm, state.x))
        basis = jnp.zeros((most + 1, b.size), b.dtype).at[0].set(state.r / tree.safe_divisor(before))
        rotated = jnp.zeros(most + 1, b.dtype).at[0].set(before)
        no_rotations, no = jnp.zeros((most, 2), b.dtype), jnp.zeros_like(state.null)
        cycle = _Cycle(
            basis, jnp.eye(most, dtype=b.dtype), no_rotations, rotated,
            jnp.zeros_like(state.iterations), state.iterations, state.norm, no, ~no,
        )  # fmt: skip
        cycle = tree.match_varying_axes(cycle)[0]
        cycle = jax.lax.while_loop(lambda cycle: cycle.going, lambda cycle: extend(target, cycle), cycle)
        right = jnp.where(
            jnp.arange(most, dtype=jnp.int32) < cycle.used, cycle.rotated[:-1], jnp.zeros_like(cycle.rotated[:-1])
        )
        weights = jax.scipy.linalg.solve_triangular(cycle.triangle, right)
        x = state.x + preconditioner(_dot(weights, cycle.basis[:-1]))
        r = b - matvec(x)
        after = tree.norm(r)
        improved = after < before
        x, r = jnp.where(improved, x, state.x), jnp.where(improved, r, state.r)
        above = jnp.minimum(after, before) > jnp.maximum(tol * size, limit_of_rounding(eps, size, cycle.norm, x))
        going = improved & ~cycle.null & above & (cycle.iterations < max_steps)
        return _State(x, r, cycle.iterations, cycle.norm, cycle.null, above & ~improved, going)

    x, r = start_of(matvec, b, init)
    no, zero = jnp.zeros((), bool), jnp.zeros_like(size)
    start = _State(x, r, jnp.int32(0), zero, no, no, tree.norm(r) > max(tol, eps) * size)
    state = jax.lax.while_loop(lambda state: state.going, advance, tree.match_varying_axes(start)[0])
    return Recursion(state.x, state.iterations, state.norm, null=state.null, broke=state.stalled)


def _rotate(column, i, rotation):
    """Apply a Givens rotation (cosine, sine) to the entries i and i + 1 of a vector."""
    first, second = column[i], column[i + 1]
    cosine, sine = rotation
    return column.at[i].set(cosine * first + sine * second).at[i + 1].set(cosine * second - sine * first)


def _dot(a, b):
    """Multiply in full precision: the TF32 products that a GPU takes for float32 keep three digits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
