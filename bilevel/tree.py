"""Linear algebra on pytrees, as far as ``optax.tree`` lacks it.

Reductions accumulate in float32 at least, in the widest dtype among the leaves: a bfloat16 network has a
million terms in one inner product.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from bilevel.types import PyTree


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """⟨a, b⟩ over all leaves, a scalar."""
    dtype = _accumulator(a)
    products = jax.tree.map(lambda x, y: jnp.vdot(x.astype(dtype), y.astype(dtype)), a, b)
    return functools.reduce(operator.add, jax.tree.leaves(products), jnp.zeros((), dtype))


def norm(a: PyTree) -> jax.Array:
    """‖a‖₂ over all leaves, divided through by the largest entry so that no square overflows or vanishes."""
    dtype = _accumulator(a)
    peaks = [jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in jax.tree.leaves(a) if leaf.size]
    peak = functools.reduce(jnp.maximum, peaks, jnp.zeros((), dtype))
    unit = jax.lax.stop_gradient(jnp.where((peak > 0) & jnp.isfinite(peak), peak, jnp.ones_like(peak)))
    scaled = jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, a)
    return unit * jnp.sqrt(vdot(scaled, scaled))


def scale(factor: PyTree, a: PyTree) -> PyTree:
    """``factor · a``: leaf by leaf where ``factor`` is a tree like ``a``, else one scalar for all leaves."""
    if jax.tree.structure(factor) != jax.tree.structure(a):
        factor = jax.tree.map(lambda _: factor, a)
    return jax.tree.map(lambda f, leaf: jnp.asarray(f, leaf.dtype) * leaf, factor, a)


def add(a: PyTree, b: PyTree) -> PyTree:
    """``a + b``."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """``a - b``."""
    return jax.tree.map(jnp.subtract, a, b)


def _accumulator(a: PyTree) -> jnp.dtype:
    floats = (leaf.dtype for leaf in jax.tree.leaves(a) if jnp.issubdtype(leaf.dtype, jnp.floating))
    dtypes = [jnp.dtype(jnp.float32), *floats]
    return max(dtypes, key=lambda dtype: dtype.itemsize)
