"""Eigenvalues, singular values and norms of a linear map A that is known only through its products u ↦ Au.

There are two ways to estimate them. A small map is written out as a matrix and factorised (:func:`matrix`,
:func:`dense_spectrum`), which bounds both ends of the spectrum up to rounding. A large map is probed by Lanczos'
recursion (:func:`ritz_values`, :func:`probed_spectrum`, :func:`operator_norm`). The Ritz values of a symmetric map lie
between its smallest and its largest eigenvalue. The smallest Ritz value over-estimates the smallest eigenvalue, and the
largest one under-estimates the largest eigenvalue. A probe can therefore disprove a bound on the spectrum, but never
prove one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.types import MatVec, PyTree

RITZ_STEPS = 12
"""Default number of Lanczos steps, each of one product. They usually give the largest eigenvalue to a few per cent."""


class Spectrum(NamedTuple):
    """Estimates of the ends of the spectrum of a linear map A from a space to itself.

    Attributes:
        norm: a bound of ‖A‖₂. From a matrix the Frobenius norm, an upper bound; from a probe a lower bound.
        smallest: a bound of the smallest singular value. From a matrix a lower bound; from a probe an upper bound.
        lowest: an upper bound of min ⟨u, Au⟩ / ‖u‖². From a matrix it equals this minimum up to rounding.
    """

    norm: jax.Array
    smallest: jax.Array
    lowest: jax.Array


def matrix(linear: MatVec, like: PyTree) -> jax.Array:
    """Write out the matrix of a linear map on pytrees like ``like``, at the cost of one product a column."""
    flat, unravel = ravel_pytree(like)
    columns = jax.vmap(lambda u: ravel_pytree(linear(unravel(u)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T


def dense_spectrum(dense: jax.Array) -> Spectrum:
    """Compute the :class:`Spectrum` of a square matrix from its singular values and eigenvalues.

    Each of the three is moved by n·eps·‖A‖ for the rounding error of the factorisation, so that it stays a bound. Here
    n is the number of rows and ‖A‖ the Frobenius norm.
    """
    norm = jnp.linalg.norm(dense)
    slack = dense.shape[0] * jnp.finfo(dense.dtype).eps * norm
    smallest = jnp.maximum(jnp.linalg.svd(dense, compute_uv=False)[-1] - slack, jnp.zeros_like(norm))
    lowest = jnp.linalg.eigvalsh(0.5 * (dense + dense.T))[0] + slack
    return Spectrum(norm + slack, smallest, lowest)


def probed_spectrum(linear: MatVec, transpose: MatVec, like: PyTree) -> Spectrum:
    """Estimate the :class:`Spectrum` of a map from Ritz values of AᵀA and of its symmetric part ½(A + Aᵀ).

    Args:
        linear: u ↦ Au.
        transpose: u ↦ Aᵀu.
        like: a pytree of the shapes and dtypes of u.
    """
    squares = ritz_values(lambda u: transpose(linear(u)), like)
    symmetric_part = ritz_values(lambda u: tree.scale(0.5, tree.add(linear(u), transpose(u))), like)
    roots = jnp.sqrt(jnp.maximum(squares, jnp.zeros_like(squares)))
    rounding = 10 * jnp.finfo(symmetric_part.dtype).eps * roots[-1]
    return Spectrum(roots[-1], roots[0], symmetric_part[0] + rounding)


def operator_norm(linear: MatVec, like: PyTree) -> jax.Array:
    """Estimate ‖A‖₂ from below by the root of the largest Ritz value of AᵀA.

    Args:
        linear: u ↦ Au, possibly to another space; ``jax.linear_transpose`` derives its transpose.
        like: a pytree of the shapes and dtypes of u.
    """
    transpose = jax.linear_transpose(linear, like)
    largest = ritz_values(lambda u: transpose(linear(u))[0], like)[-1]
    return jnp.sqrt(jnp.maximum(largest, jnp.zeros_like(largest)))


def ritz_values(matvec: MatVec, like: PyTree, steps: int = RITZ_STEPS, start: PyTree | None = None) -> jax.Array:
    """Compute the Ritz values of a symmetric linear map by Lanczos' recursion with full reorthogonalisation.

    They are the eigenvalues of QᵀAQ, where the columns of Q are an orthonormal basis of the Krylov space
    span{s, As, A²s, …} of the start s. The extreme ones converge first. With as many steps as the map has distinct
    eigenvalues they are exact, provided that s has a component in every eigenspace.

    The recursion costs one product a step and holds a basis of ``steps`` vectors. It can be jitted and vmapped. If the
    Krylov space has fewer dimensions than steps, the remaining entries repeat the Rayleigh quotient ⟨s, As⟩ / ⟨s, s⟩.
    This quotient lies between the other values, so the smallest and the largest value stay right.

    Args:
        matvec: u ↦ Au, a symmetric map from pytrees like ``like`` to themselves.
        like: a pytree of the shapes and dtypes of u; its values are not used.
        steps: the number of Lanczos steps, at least 1. No more than n, the number of entries of ``like``, are taken.
        start: s, a pytree like ``like``, not zero; None for a standard normal one with a fixed seed.

    Returns:
        The Ritz values in ascending order, ``[min(steps, n)]``, in the dtype of ``like``, or in float32 if the dtype of
        ``like`` is narrower. They are NaN if a product contains NaN.

    Raises:
        ValueError: for ``steps`` below 1, or a ``like`` without entries.

    Source: Lanczos (1950); Golub and Van Loan (2013), section 10.1; Parlett (1998), section 6.9, for "twice is enough".

    Example:
        >>> eigenvalues = jnp.array([1.0, 2.0, 4.0])
        >>> [round(float(value), 3) for value in ritz_values(lambda u: eigenvalues * u, jnp.zeros(3))]
        [1.0, 2.0, 4.0]
        >>> two_steps = ritz_values(lambda u: eigenvalues * u, jnp.zeros(3), steps=2, start=jnp.ones(3))
        >>> bool((1.0 <= two_steps[0]) & (two_steps[1] <= 4.0))
        True
    """
    flat, unravel = ravel_pytree(like)
    if steps < 1 or flat.size == 0:
        raise ValueError(
            f"ritz_values needs steps ≥ 1 and a vector of at least 1 entry, got steps={steps} and {flat.size} entries"
        )
    steps = min(steps, flat.size)
    # bfloat16 loses orthogonality after a few steps, and eigvalsh refuses it. So only the products are in bfloat16.
    dtype = tree.widened(flat).dtype
    first = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype) if start is None else ravel_pytree(start)[0]
    first = first.astype(dtype)
    # A remainder shorter than this fraction of the product is rounding noise: the error of a sum over n entries grows
    # like √n.
    cutoff = 10 * flat.size**0.5 * float(jnp.finfo(dtype).eps)

    def advance(k, state):
        basis, diagonal, off_diagonal, vector, alive = state
        basis = basis.at[k].set(vector)
        product = ravel_pytree(matvec(unravel(vector.astype(flat.dtype))))[0].astype(dtype)
        quotient = _dot(vector, product)
        remainder = product
        for _ in range(2):  # the second pass removes the rounding errors of the first along the basis
            remainder = remainder - _dot(basis.T, _dot(basis, remainder))
        size = jnp.linalg.norm(remainder)
        goes_on = alive & (size > cutoff * jnp.linalg.norm(product))
        diagonal = diagonal.at[k].set(jnp.where(alive, quotient, diagonal[0]))
        off_diagonal = off_diagonal.at[k].set(jnp.where(goes_on, size, jnp.zeros_like(size)))
        following = remainder / jnp.where(goes_on, size, jnp.ones_like(size))
        return basis, diagonal, off_diagonal, jnp.where(goes_on, following, jnp.zeros_like(following)), goes_on

    empty = jnp.zeros((steps, flat.size), dtype), jnp.zeros(steps, dtype), jnp.zeros(steps, dtype)
    state = *empty, first / jnp.linalg.norm(first), jnp.bool_(True)
    _, diagonal, off_diagonal, *_ = jax.lax.fori_loop(0, steps, advance, state)
    return jnp.linalg.eigvalsh(jnp.diag(diagonal) + jnp.diag(off_diagonal[:-1], 1) + jnp.diag(off_diagonal[:-1], -1))


def _dot(a, b):
    """Multiply in full precision: the TF32 products that a GPU takes for float32 keep three digits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
