"""What can be known of a linear map from its products: its matrix where that is small, else Ritz values.

A Ritz value lies between the extreme eigenvalues, so it over-estimates the smallest and under-estimates the
largest: it can disprove a bound on the spectrum and never prove one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.types import MatVec, PyTree

RITZ_STEPS = 12
"""Lanczos steps of a probe: each is a product, and the largest eigenvalue is then known to a few per cent."""


class Spectrum(NamedTuple):
    """Of a linear map A of a space to itself.

    Attributes:
        norm: ‖A‖₂, or an upper bound where the matrix is at hand.
        smallest: the smallest singular value: a lower bound up to rounding where the matrix is at hand, else an
            upper one.
        lowest: an upper bound of min ⟨u, Au⟩ / ‖u‖²; of that value itself where the matrix is at hand.
    """

    norm: jax.Array
    smallest: jax.Array
    lowest: jax.Array


def matrix(linear: MatVec, like: PyTree) -> jax.Array:
    """The matrix of a linear map from trees like ``like``, one product a column."""
    flat, unravel = ravel_pytree(like)
    columns = jax.vmap(lambda u: ravel_pytree(linear(unravel(u)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T


def dense_spectrum(dense: jax.Array) -> Spectrum:
    """From a factorisation, each end moved by its own rounding, n·eps·‖A‖, to the safe side."""
    norm = jnp.linalg.norm(dense)
    slack = dense.shape[0] * jnp.finfo(dense.dtype).eps * norm
    smallest = jnp.maximum(jnp.linalg.svd(dense, compute_uv=False)[-1] - slack, jnp.zeros_like(norm))
    lowest = jnp.linalg.eigvalsh(0.5 * (dense + dense.T))[0] + slack
    return Spectrum(norm + slack, smallest, lowest)


def probed_spectrum(linear: MatVec, transpose: MatVec, like: PyTree) -> Spectrum:
    """From Lanczos' recursion on AᵀA and on the symmetric part of A."""
    squares = ritz_values(lambda u: transpose(linear(u)), like)
    middle = ritz_values(lambda u: tree.scale(0.5, tree.add(linear(u), transpose(u))), like)
    roots = jnp.sqrt(jnp.maximum(squares, jnp.zeros_like(squares)))
    return Spectrum(roots[-1], roots[0], middle[0] + 10 * jnp.finfo(middle.dtype).eps * roots[-1])


def norm(linear: MatVec, like: PyTree) -> jax.Array:
    """‖linear‖₂ from below, by Lanczos' recursion on its square; ``linear`` may map to another space."""
    transpose = jax.linear_transpose(linear, like)
    largest = ritz_values(lambda u: transpose(linear(u))[0], like)[-1]
    return jnp.sqrt(jnp.maximum(largest, jnp.zeros_like(largest)))


def ritz_values(matvec: MatVec, like: PyTree) -> jax.Array:
    """The Ritz values of a symmetric operator, ascending, after ``RITZ_STEPS`` steps from a random vector.

    Every new vector is orthogonalised against all before it, twice. Where the space is exhausted early the
    rest is filled with the first Rayleigh quotient, which lies among the others.

    Source: Lanczos (1950); Golub and Van Loan, section 10.1.
    """
    flat, unravel = ravel_pytree(like)
    steps = min(RITZ_STEPS, flat.size)
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)

    def advance(k, state):
        basis, diagonal, off, vector, alive = state
        basis = basis.at[k].set(vector)
        product = ravel_pytree(matvec(unravel(vector)))[0]
        quotient = vector @ product
        rest = product - basis.T @ (basis @ product)
        rest = rest - basis.T @ (basis @ rest)
        size = jnp.linalg.norm(rest)
        goes_on = alive & (size > 10 * flat.size * jnp.finfo(flat.dtype).eps * jnp.linalg.norm(product))
        diagonal = diagonal.at[k].set(jnp.where(alive, quotient, diagonal[0]))
        off = off.at[k].set(jnp.where(goes_on, size, jnp.zeros_like(size)))
        following = jnp.where(goes_on, rest / jnp.where(goes_on, size, jnp.ones_like(size)), jnp.zeros_like(rest))
        return basis, diagonal, off, following, goes_on

    empty = jnp.zeros((steps, flat.size), flat.dtype), jnp.zeros(steps, flat.dtype), jnp.zeros(steps, flat.dtype)
    state = *empty, start / jnp.linalg.norm(start), jnp.bool_(True)
    _, diagonal, off, *_ = jax.lax.fori_loop(0, steps, advance, state)
    return jnp.linalg.eigvalsh(jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1))
