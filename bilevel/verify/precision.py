"""The precision of the checks: float64, whatever the dtype of the caller's arrays.

References and checks take concrete arrays. They cast every inexact leaf to float64 and leave integers, booleans and
random keys unchanged.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.types import PyTree

EPS = float(np.finfo(np.float64).eps)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Enable float64 and standard dtype promotion.

    With strict promotion, JAX would refuse to combine float64 with a float32 constant of a user's function.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def as_double(tree: PyTree) -> PyTree:
    """Cast inexact leaves to float64 and return the others unchanged; call it within :func:`double_precision`.

    Raises:
        TypeError: for a complex leaf.
    """

    def cast(path, leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"the leaf {jax.tree_util.keystr(path) or 'itself'} is complex, and hypergradients are defined for "
                "real variables: split it into its real and imaginary parts"
            )
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


def eps_of(tree: PyTree) -> float:
    """Return the machine epsilon of the narrowest float dtype in ``tree``, or that of float64 if it has no floats."""
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)]
    return max((float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact)), default=EPS)
