"""Proximal operators whose value and derivatives are finite everywhere, in place of those of jaxopt.

Their kinks are at the edge of the region where the result is zero. At a kink the derivative is zero. Without a penalty
the operator is the identity, and its derivative is the identity too.
"""

import jax
import jax.numpy as jnp

from bilevel._jaxopt.closed_forms import for_each_leaf, norm, unit


def lasso(x, l1reg=1.0, scaling=1.0):
    """Return argmin_y ½‖y − x‖² + scaling·l1reg·‖y‖₁ for a tree x; ``l1reg`` is a number or a tree like x."""
    strengths = for_each_leaf(x, 1.0 if l1reg is None else l1reg)
    return jax.tree.map(lambda leaf, strength: _shrink(leaf, scaling * strength), x, strengths)


def elastic_net(x, hyperparams=None, scaling=1.0):
    """Return argmin_y ½‖y − x‖² + scaling·λ·(‖y‖₁ + ½κ‖y‖²); ``hyperparams`` = (λ, κ), numbers or trees like x."""
    strengths, ratios = (for_each_leaf(x, part) for part in hyperparams or (1.0, 1.0))
    return jax.tree.map(lambda u, s, r: _shrink(u, scaling * s) / (1 + scaling * s * r), x, strengths, ratios)


def group_lasso(x, l2reg=1.0, scaling=1.0):
    """Return argmin_y ½‖y − x‖² + scaling·l2reg·‖y‖₂ for a tree x, all of which is one group."""
    threshold = scaling * (1.0 if l2reg is None else l2reg)
    length = norm(x)
    is_zero = (length <= threshold) & (jnp.asarray(threshold) > 0)

    def shrink(leaf, along):
        shorter = (length - threshold).astype(leaf.dtype) * along
        return jnp.where(is_zero, 0, jnp.where(length == 0, leaf, shorter))

    return jax.tree.map(shrink, x, unit(x))


def _shrink(u, threshold):
    """Return the entries moved towards 0 by ``threshold``, and 0 for an entry of at most this absolute value."""
    is_zero = (jnp.abs(u) <= threshold) & (jnp.asarray(threshold) > 0)
    return jnp.where(is_zero, 0, u - jnp.sign(u) * threshold)
