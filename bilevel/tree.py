"""Linear algebra on pytrees, as far as ``optax.tree`` lacks it.

Reductions accumulate in float32 at least, in the widest dtype among the leaves: a bfloat16 network has a
million terms in one inner product. θ may hold leaves that are not floating, a count or a mask: they have no derivative
and are left as they are.
"""

import functools
import operator
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from bilevel.types import PyTree


@jax.jit
def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """⟨a, b⟩ over all leaves, a scalar."""
    dtype = _accumulator(a)
    exact = partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
    products = jax.tree.map(lambda x, y: exact(x.astype(dtype), y.astype(dtype)), a, b)
    return functools.reduce(operator.add, jax.tree.leaves(products), jnp.zeros((), dtype))


@jax.jit
def norm(a: PyTree) -> jax.Array:
    """‖a‖₂ over all leaves; entries are divided by the largest one where a square overflows or vanishes."""
    dtype = _accumulator(a)
    a = [leaf.astype(dtype) for leaf in jax.tree.leaves(a) if is_floating(leaf)]
    squares = vdot(a, a)
    number = jnp.finfo(dtype)
    sound = (squares > number.tiny / number.eps**2) & (squares < number.max)
    return jax.lax.cond(sound, lambda a, squares: jnp.sqrt(squares), _scaled_norm, a, squares)


def _scaled_norm(a, squares):  # seldom run, often compiled: one array is shorter than many
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in a] or [jnp.zeros(1, squares.dtype)])
    peak = jnp.max(jnp.abs(flat), initial=0)
    unit = jax.lax.stop_gradient(jnp.where((peak > 0) & jnp.isfinite(peak), peak, jnp.ones_like(peak)))
    scaled = flat / unit
    return unit * jnp.sqrt(vdot(scaled, scaled))


def arrays(a: PyTree) -> PyTree:
    """Every leaf as a JAX array."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), a)


def scale(factor: PyTree, a: PyTree) -> PyTree:
    """``factor · a``: leaf by leaf where ``factor`` is a tree like ``a``, else one scalar for all leaves."""
    if jax.tree.structure(factor) != jax.tree.structure(a):
        factor = jax.tree.map(lambda _: factor, a)
    return jax.tree.map(lambda f, leaf: jnp.asarray(f, leaf.dtype) * leaf if is_floating(leaf) else leaf, factor, a)


def add(a: PyTree, b: PyTree) -> PyTree:
    """``a + b``."""
    return jax.tree.map(lambda x, y: x + y if is_floating(x) else x, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """``a - b``."""
    return jax.tree.map(lambda x, y: x - y if is_floating(x) else x, a, b)


def like(a: PyTree, template: PyTree) -> PyTree:
    """``a`` in the dtypes of another tree."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), a, template)


def widened(a: PyTree) -> PyTree:
    """Every leaf in the dtype that reductions over ``a`` accumulate in."""
    dtype = _accumulator(a)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), a)


def eps(a: PyTree) -> float:
    """The coarsest machine epsilon among the leaves; 0 where there are none."""
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(a)), default=0.0)


def varying_alike(*trees: PyTree) -> tuple[PyTree, ...]:
    """The trees with every leaf varying over each mesh axis that one of them varies over, inside of ``shard_map``.

    There JAX sums a derivative over the devices where it is taken in what all of them share: of an inner objective
    this would be the sum over all tasks.
    """
    axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(trees)))
    return jax.tree.map(lambda leaf: _vary(leaf, axes - _varying(leaf)), trees)


def _varying(leaf):
    return jax.typeof(leaf).manual_axis_type.varying


def _vary(leaf, axes):
    return jax.lax.pcast(leaf, tuple(axes), to="varying") if axes else leaf


def is_floating(leaf: jax.Array) -> bool:
    """Whether a leaf can have a derivative."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def with_zeros(cotangent: PyTree, like: PyTree) -> PyTree:
    """A derivative with zeros of a leaf's own dtype where JAX has float0, for what is not floating."""
    return jax.tree.map(lambda leaf, d: d if is_floating(leaf) else jnp.zeros_like(leaf), like, cotangent)


def with_others(a: PyTree, like: PyTree) -> PyTree:
    """``a``, with the leaves of another tree where they are not floating."""
    return jax.tree.map(lambda leaf, other: leaf if is_floating(other) else other, a, like)


def split_floating(a: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The floating leaves of a tree, and the function that puts such leaves back among the others."""
    leaves, structure = jax.tree.flatten(a)
    floating = [is_floating(leaf) for leaf in leaves]

    def join(floats):
        floats = iter(floats)
        mixed = [next(floats) if at else leaf for leaf, at in zip(leaves, floating, strict=True)]
        return jax.tree.unflatten(structure, mixed)

    return [leaf for leaf, at in zip(leaves, floating, strict=True) if at], join


def _accumulator(a: PyTree) -> jnp.dtype:
    floats = (leaf.dtype for leaf in jax.tree.leaves(a) if is_floating(leaf))
    dtypes = [jnp.dtype(jnp.float32), *floats]
    return max(dtypes, key=lambda dtype: dtype.itemsize)
