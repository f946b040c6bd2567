"""Functions on pytrees, mostly linear algebra.

Reductions accumulate in the widest dtype among the floating-point leaves, and in float32 at least, because a sum of a
million terms loses its digits in bfloat16. Trees may hold leaves that are not floating point, such as a count or a
mask. These leaves have no derivative. `norm` ignores them, and `scale`, `add` and `subtract` return those of `a`
unchanged.
"""

import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.types import PyTree


@jax.jit
def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Return ⟨a, b⟩ over all leaves, a scalar."""
    dtype = _accumulator(a)
    exact = partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
    # A class that checks its fields may refuse scalars in place of its arrays, so the leaves stay in a list.
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = [exact(x.astype(dtype), y.astype(dtype)) for x, y in pairs]
    return functools.reduce(operator.add, products, jnp.zeros((), dtype))


@jax.jit
def norm(a: PyTree) -> jax.Array:
    """Return ‖a‖₂ over the floating-point leaves.

    Where the squares would over- or underflow, the entries are first divided by the largest one. Under ``jax.vmap``,
    this is done for all tasks if any task needs it, and for none otherwise.
    """
    return _norm(lambda a: a, a)


@jax.jit
def distance(a: PyTree, b: PyTree) -> jax.Array:
    """Return ``norm(subtract(a, b))`` with less memory: the difference is not an operand of the branch in the norm."""
    return _norm(subtract, a, b)


def _norm(function, *args):
    """Return the norm of a function of some trees.

    The branch with the scaled norm computes the function again. An operand of the branch would stay in memory until the
    branch ends.
    """

    def leaves(*args):
        return widened([leaf for leaf in jax.tree.leaves(function(*args)) if is_floating(leaf)])

    a = leaves(*args)
    squares = vdot(a, a)
    limits = jnp.finfo(squares.dtype)
    in_range = (squares > limits.tiny / limits.eps**2) & (squares < limits.max)
    usual = jnp.sqrt(jnp.where(in_range, squares, jnp.ones_like(squares)))

    def scaled(*args):
        return jnp.where(in_range, usual, _scaled_norm(leaves(*args)))

    return jax.lax.cond(in_any_task(~in_range), scaled, lambda *_: usual, *args)


def _scaled_norm(a):
    # This branch is compiled with every norm and seldom runs. One flat array makes a shorter program than many leaves.
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in a] or [jnp.zeros(1, jnp.float32)])
    peak = jnp.max(jnp.abs(flat), initial=0)
    unit = jax.lax.stop_gradient(jnp.where((peak > 0) & jnp.isfinite(peak), peak, jnp.ones_like(peak)))
    scaled = flat / unit
    return unit * jnp.sqrt(vdot(scaled, scaled))


def is_finite(a: PyTree) -> jax.Array:
    """Return whether every entry of the tree is finite, a boolean scalar."""
    return functools.reduce(operator.and_, (jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(a)), jnp.bool_(True))


@jax.custom_batching.custom_vmap
def in_any_task(flag: jax.Array) -> jax.Array:
    """Return a boolean scalar unchanged; under ``jax.vmap``, return whether it is True in any task.

    A ``jax.lax.cond`` on the result stays a branch under ``jax.vmap``. A cond on a flag that differs between tasks
    would become a select of both branches, for which JAX copies each array in the branches once for every task. If
    ``jit`` has divided the tasks over devices, the devices exchange the flag.
    """
    return flag


@in_any_task.def_vmap
def _in_any_task_of_a_batch(axis_size, in_batched, flags):
    return in_any_task(jnp.any(flags, axis=0)), False


def arrays(a: PyTree, name: str = "") -> PyTree:
    """Return the tree with every leaf as a JAX array.

    Raises:
        TypeError: for a leaf that is not an array or a number; the message begins with ``name`` and the leaf's path.
    """
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(a)):
        return a
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _array(leaf, f"{name}{jax.tree_util.keystr(path)}"), a)


def real_arrays(a: PyTree, name: str) -> PyTree:
    """Return the outer variables as JAX arrays, or raise TypeError for a complex leaf."""
    a = arrays(a, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(a):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"outer variables are real, got {leaf.dtype} at {name}{jax.tree_util.keystr(path)}: there are two "
                "conventions for a derivative in a complex variable; split the variable into its real and imaginary "
                "part"
            )
    return a


def traceable(a: PyTree, name: str) -> PyTree:
    """Return a tree that can be passed to ``jax.jit``.

    This takes less time than :func:`arrays`, because Python numbers and NumPy arrays are not converted.

    Raises:
        TypeError: as :func:`arrays`.
    """
    for leaf in jax.tree.leaves(a):
        if not isinstance(leaf, jax.Array | float | int) and not (
            isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiub"
        ):
            return arrays(a, name)
    return a


def _array(leaf: object, name: str) -> jax.Array:
    try:
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is not an array or a number, got {type(leaf).__name__}: let the problem's functions use it as a "
            "variable of a closure, or make it a static field (metadata of a registered dataclass, "
            "equinox.field(static=True)), or split the tree (equinox.partition, flax.nnx.split) and pass its arrays"
        ) from error


def safe_divisor(number: jax.Array) -> jax.Array:
    """Return ``number`` with 1 in place of 0, as a divisor that is never zero."""
    return jnp.where(number == 0, jnp.ones_like(number), number)


def is_traced(a: PyTree) -> bool:
    """Return whether any leaf is a tracer."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(a))


def are_concrete_arrays(a: PyTree) -> bool:
    """Return whether every leaf is a JAX array with a value."""
    return all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(a))


def shapes(a: PyTree) -> list[tuple[int, ...]]:
    """Return the shapes of the leaves."""
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(a)]


def count_samples(samples: PyTree, name: str) -> int:
    """Return the length of the leading axis of some samples. ``name`` is their owner, for the message.

    Raises:
        ValueError: if there is no leaf, no sample, or if the lengths differ.
    """
    if (count := common_length(samples)) is None:
        raise ValueError(
            f"{name} needs arrays with one common leading axis of samples, got the shapes {shapes(samples)}: a "
            "constant that all samples share belongs in the functions of the problem or in theta"
        )
    return count


def common_length(a: PyTree) -> int | None:
    """Return the length of the leading axis of all leaves; None if they have none in common, or if it is empty."""
    lengths = {shape[0] if shape else 0 for shape in shapes(a)}
    return lengths.pop() or None if len(lengths) == 1 else None


def shapes_for_message(a: PyTree) -> PyTree:
    """Return the tree with shapes as leaves, or a list of shapes for a class that refuses such leaves."""
    try:
        return jax.tree.map(jnp.shape, a)
    except Exception:  # a dataclass may check its fields and raise any error
        return shapes(a)


def numbers_as_floats(theta: PyTree) -> PyTree:
    """Return θ with Python integers as Python floats, if no leaf of θ is floating point.

    A Python number has no dtype of its own, so ``theta=1`` means ``theta=1.0``. If θ also has a floating-point leaf,
    its Python integers are constants. Booleans, and arrays and NumPy scalars of an integer dtype, are always constants.
    """
    if any(not _is_integer(leaf) for leaf in jax.tree.leaves(theta)):
        return theta
    return jax.tree.map(lambda leaf: float(leaf) if type(leaf) is int else leaf, theta)


def _is_integer(leaf: object) -> bool:
    try:
        # An array's own dtype is read first, because result_type takes ten times as long.
        return not jnp.issubdtype(getattr(leaf, "dtype", None) or jnp.result_type(leaf), jnp.inexact)
    except TypeError:  # no array: :func:`arrays` refuses it
        return False


def scale(factor: PyTree, a: PyTree) -> PyTree:
    """Return ``factor · a``: leaf by leaf where ``factor`` is a tree like ``a``, else one scalar for all leaves."""

    def scaled(leaf: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.asarray(factor, leaf.dtype) * leaf if is_floating(leaf) else leaf

    if jax.tree.structure(factor) == jax.tree.structure(a):
        return jax.tree.map(scaled, a, factor)
    return jax.tree.map(lambda leaf: scaled(leaf, factor), a)


def add(a: PyTree, b: PyTree) -> PyTree:
    """Return ``a + b``."""
    return jax.tree.map(lambda x, y: x + y if is_floating(x) else x, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """Return ``a - b``."""
    return jax.tree.map(lambda x, y: x - y if is_floating(x) else x, a, b)


def like(a: PyTree, template: PyTree) -> PyTree:
    """Return ``a`` in the dtypes of another tree."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), a, template)


def strongly_typed(a: PyTree) -> PyTree:
    """Return the tree with arrays that are not weakly typed, as a compiled loop returns them."""
    return jax.tree.map(_strongly_typed, a)


def _strongly_typed(leaf: Any) -> jax.Array:
    leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    return leaf.astype(leaf.dtype) if getattr(jax.typeof(leaf), "weak_type", False) else leaf


def signature(a: PyTree) -> tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]:
    """Return the structure of a tree, and the shape and dtype of each leaf."""
    leaves, structure = jax.tree.flatten(a)
    return structure, tuple((jnp.shape(leaf), _dtype(leaf)) for leaf in leaves)


def _dtype(leaf: Any) -> Any:
    # jnp.result_type takes 10 µs a leaf, and is not needed for an array of JAX.
    return leaf.dtype if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jnp.result_type(leaf)


def widened(a: PyTree) -> PyTree:
    """Return the tree with every leaf in the dtype that reductions over ``a`` accumulate in."""
    dtype = _accumulator(a)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), a)


def eps(a: PyTree) -> float:
    """Return the largest machine epsilon among the leaves' dtypes; 0 for a tree without leaves."""
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(a)), default=0.0)


def match_varying_axes(*trees: PyTree) -> tuple[PyTree, ...]:
    """Mark every leaf as varying over each mesh axis over which any leaf varies, for use inside ``shard_map``.

    JAX sums a derivative over the devices if all of them have the same value of the variable. The gradient of an inner
    objective would then be the sum over all tasks. Marking the variable as varying prevents that sum.
    """
    axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(trees)))
    return jax.tree.map(lambda leaf: _vary(leaf, axes - _varying(leaf)), trees)


def _varying(leaf):
    return jax.typeof(leaf).manual_axis_type.varying


def _vary(leaf, axes):
    return jax.lax.pcast(leaf, tuple(axes), to="varying") if axes else leaf


def is_floating(leaf: jax.Array) -> bool:
    """Return whether a leaf is real floating point, so that it can have a derivative."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def with_zeros(cotangent: PyTree, like: PyTree) -> PyTree:
    """Return a cotangent whose float0 leaves are replaced by zeros of the dtype of the matching leaf of ``like``."""
    return jax.tree.map(lambda leaf, d: d if is_floating(leaf) else jnp.zeros_like(leaf), like, cotangent)


def with_others(a: PyTree, like: PyTree) -> PyTree:
    """Return ``a`` with the leaves of ``like`` wherever those are not floating point."""
    return jax.tree.map(lambda leaf, other: leaf if is_floating(other) else other, a, like)


def partition_inexact(a: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """Return the floating-point leaves of a tree, and a function that puts new leaves in their place."""
    leaves, structure = jax.tree.flatten(a)
    floating = [is_floating(leaf) for leaf in leaves]

    def join(floats):
        floats = iter(floats)
        mixed = [next(floats) if is_float else leaf for leaf, is_float in zip(leaves, floating, strict=True)]
        return jax.tree.unflatten(structure, mixed)

    return [leaf for leaf, is_float in zip(leaves, floating, strict=True) if is_float], join


def _accumulator(a: PyTree) -> jnp.dtype:
    floats = (leaf.dtype for leaf in jax.tree.leaves(a) if is_floating(leaf))
    dtypes = [jnp.dtype(jnp.float32), *floats]
    return max(dtypes, key=lambda dtype: dtype.itemsize)
