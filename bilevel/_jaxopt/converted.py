"""A condition as jaxopt's solvers can take it: in one dtype, and with trees that may hold any leaves."""

import jax
import jax.numpy as jnp

from bilevel import tree


class Converted:
    """A condition whose functions take and return one dtype, and trees that jaxopt can work with.

    The user's functions still get w as they declared it, in its own dtypes. An objective with float64 data would return
    a float64 value for a float32 w. jaxopt's step size would then change from float32 to float64 inside its loop, which
    JAX refuses.

    jaxopt builds trees like w with scalars or stacked arrays as leaves. A class that checks the shapes of its fields
    refuses them, so jaxopt gets the list of leaves in place of such a w.
    """

    def __init__(self, condition, init, dtype):
        self._condition, self._init, self._dtype = condition, init, dtype
        self._structure = None if _takes_scalars(init) else jax.tree.structure(init)

    def packed(self, w):
        """Return w, or the list of its leaves if jaxopt cannot work with its class."""
        return w if self._structure is None else jax.tree.leaves(w)

    def unpacked(self, w):
        """Return w from :meth:`packed`."""
        return w if self._structure is None else jax.tree.unflatten(self._structure, w)

    def __getattr__(self, name):
        found = getattr(self._condition, name)
        if name not in ("potential", "objective", "residual", "residuals", "mapping", "projection", "prox"):
            return found

        def converted(w, *arguments):
            value = found(tree.like(self.unpacked(w), self._init), *arguments)
            value = self.packed(value) if name in ("residual", "mapping", "projection", "prox") else value
            return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(self._dtype), value)

        return converted


def _takes_scalars(w):
    """Return whether a tree like w may hold scalars as leaves."""
    try:
        jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), w)
    except Exception:  # a class may raise any error about its fields
        return False
    return True
