"""The wrapper that gives a condition to jaxopt's solvers: in one dtype, and with w as a list if jaxopt needs one."""

import jax
import jax.numpy as jnp

from bilevel import tree


class Converted:
    """A condition whose functions take w in one dtype, as a tree that jaxopt can work with, and return that dtype.

    The user's functions still get w with the tree structure and the dtypes of ``init``. Without the conversion, an
    objective with float64 data would return a float64 value for a float32 w. jaxopt's step size would then change from
    float32 to float64 inside its loop, which JAX refuses.

    jaxopt builds trees like w with scalars or stacked arrays as leaves. A class that checks the shapes of its fields
    refuses these leaves. If w is an instance of such a class, jaxopt gets the list of its leaves instead.
    """

    def __init__(self, condition, init, dtype):
        self._condition, self._init, self._dtype = condition, init, dtype
        self._structure = None if _takes_scalars(init) else jax.tree.structure(init)

    def packed(self, w):
        """Return w, or the list of its leaves if jaxopt cannot work with its class."""
        return w if self._structure is None else jax.tree.leaves(w)

    def unpacked(self, w):
        """Return the w for which :meth:`packed` returned this argument."""
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
