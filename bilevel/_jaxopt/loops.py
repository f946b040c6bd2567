"""A while loop that also works inside ``shard_map``."""

import jax
import jax.numpy as jnp
from jax import lax

from bilevel import tree


def while_loop(is_open, step, state, *captured):
    """Return the last state of ``jax.lax.while_loop``.

    Inside ``shard_map`` a state may not begin as a constant and then vary over the devices. So this function marks the
    first state as varying over every mesh axis over which the ``captured`` arrays vary.
    """
    state = jax.tree.map(jnp.asarray, state)
    return lax.while_loop(is_open, step, tree.match_varying_axes(state, captured)[0])
