"""The backtracking line search of HessianFree and GaussNewton."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import PyTree


def line_search(
    potential: Callable[[PyTree], jax.Array], w: PyTree, gradient: PyTree, direction: PyTree, halvings: int
) -> PyTree:
    """Return the first of w + d, w + d/2, … that meets Armijo's rule with the factor 10⁻⁴.

    If no trial meets the rule, return the last one if the objective there is not above that at w, and w otherwise.
    """
    # An objective of float64 data has a float64 value, although w and its gradient are float32. Give both one dtype.
    here, predicted = tree.widened((potential(w), tree.vdot(gradient, direction)))

    def value(size):
        return potential(moved(size)).astype(here.dtype)

    # Near the minimum the values differ by rounding errors alone, so an increase of that size is accepted.
    slack = 4 * jnp.finfo(here.dtype).eps * jnp.abs(here)

    def moved(size):
        return tree.add(w, tree.scale(size, direction))

    def too_far(carry):
        size, tries = carry
        return (tries < halvings) & ~(value(size) <= here + 1e-4 * size * predicted + slack)

    _, *start = tree.match_varying_axes(w, jnp.ones((), predicted.dtype), jnp.int32(0))
    size, tries = jax.lax.while_loop(too_far, lambda carry: (0.5 * carry[0], carry[1] + 1), tuple(start))
    accepted = (tries < halvings) | (value(size) <= here)
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved(size), w)
