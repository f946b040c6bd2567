"""Pytrees as flat vectors of the entries of their inexact leaves, with a name for each entry."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.types import PyTree
from bilevel.verify.precision import as_double, double_precision


class Flat(NamedTuple):
    """The inexact leaves of a tree as one vector, with the function that rebuilds the tree.

    Attributes:
        vector: the entries of all inexact leaves.
        rebuild: turns a vector back into the tree; integer leaves keep their values.
        names: name and shape of each inexact leaf.
    """

    vector: jax.Array
    rebuild: Callable[[jax.Array], PyTree]
    names: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each entry: ``theta['a'][0]``."""
        entries = ((leaf, index) for leaf, shape in self.names for index in np.ndindex(shape))
        return tuple(f"{leaf}{list(index) if index else ''}" for leaf, index in entries)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The name of the leaf that each entry belongs to."""
        return tuple(leaf for leaf, shape in self.names for _ in range(math.prod(shape)))


def flatten(tree: PyTree, name: str = "") -> Flat:
    """Flatten the inexact leaves of ``tree`` into one vector; labels begin with ``name``."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in paths]
    inexact = [number for number, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    ends = np.cumsum([leaves[number].size for number in inexact])[:-1]
    names = tuple((f"{name}{jax.tree_util.keystr(path)}", leaf.shape) for path, leaf in (paths[i] for i in inexact))

    def rebuild(vector):
        parts = dict(zip(inexact, jnp.split(vector, ends) if inexact else [], strict=True))
        new = [parts[i].reshape(leaf.shape) if i in parts else leaf for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, new)

    vector = jnp.concatenate([leaves[number].ravel() for number in inexact]) if inexact else jnp.zeros(0)
    return Flat(vector, rebuild, names)


def vector_of(tree: PyTree) -> np.ndarray:
    """Return the inexact leaves of ``tree`` as one numpy vector in float64."""
    with double_precision():
        return np.asarray(flatten(as_double(tree)).vector)


def gradient_vector(gradient: PyTree, theta: PyTree) -> np.ndarray:
    """Return the entries of ``gradient``, a tree like θ, at the inexact leaves of θ, in float64.

    The gradient's leaves at integer leaves of θ are left out: they may have the dtype ``float0``.
    """
    inexact = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) for leaf in jax.tree.leaves(theta)]
    return vector_of([leaf for leaf, moves in zip(jax.tree.leaves(gradient), inexact, strict=True) if moves])
