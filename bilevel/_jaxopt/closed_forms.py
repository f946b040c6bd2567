"""Projections with a closed form, whose value and derivatives are finite on every non-empty set, at any scale.

They replace those of jaxopt, which divide by a norm, a radius or a row that may be zero. At a kink the derivative is
that of one side. A box bound or a radius that holds with equality counts as active, so for a radius of 0 the derivative
with respect to the point is 0. The bound of a halfspace that holds with equality counts as inactive.

If no point satisfies the constraints, the result contains NaN. For a box, only the entries whose bounds contradict each
other are NaN.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

from bilevel import tree
from bilevel._jaxopt.feasibility import nan_if_violated
from bilevel._jaxopt.loops import while_loop


def box(x, hyperparams):
    """Return x clipped to ``(low, high)``, each a number for all entries or a tree like x."""
    low, high = (for_each_leaf(x, bound) for bound in hyperparams)

    def clip(x, low, high):
        clipped = jnp.where(x <= low, low, jnp.where(x >= high, high, x))
        return jnp.where(jnp.asarray(low) <= high, clipped, jnp.nan)

    return jax.tree.map(clip, x, low, high)


def hypercube(x, unit=1.0):
    """Return x clipped to [0, unit]."""
    return box(x, (0.0, unit))


def linf_ball(x, max_value=1.0):
    """Return x clipped to [−max_value, max_value]."""
    return box(x, (-max_value, max_value))


def simplex(x, value=1.0):
    """Return the p nearest to x, ``[n]``, with p ≥ 0 and entries that sum to ``value``, which is at least 0."""
    value = 1.0 if value is None else value
    # Only differences of entries matter. Subtracting the largest entry keeps their digits if all of them are large.
    largest = lax.stop_gradient(jnp.max(x))
    centred = x - largest
    ordered = -jnp.sort(-lax.stop_gradient(centred))
    number = jnp.arange(1, x.size + 1)
    fits = lax.stop_gradient(value) + number * ordered > jnp.cumsum(ordered)
    last = jnp.maximum(jnp.sum(fits), 1)
    support = centred >= _between(jnp.append(ordered, -jnp.inf), last, last - 1)
    excess = jnp.sum(jnp.where(support, centred, 0)) - value
    point = jnp.where(support, centred - excess / jnp.maximum(jnp.sum(support), 1).astype(x.dtype), 0)
    return _nan_unless((value >= 0) & jnp.isfinite(largest), jnp.where(point < 0, 0, point))


def sparse_simplex(x, max_nz, use_approx_max_nz=False, value=1.0):
    """Return the projection of the ``max_nz`` largest entries of x onto the simplex, and 0 elsewhere."""
    largest, places = lax.approx_max_k(x, max_nz) if use_approx_max_nz else lax.top_k(x, max_nz)
    return jnp.zeros_like(x).at[places].set(simplex(largest, value))


def l1_sphere(x, value=1.0):
    """Return the nearest y to x, ``[n]``, with ‖y‖₁ = value. An entry 0 of x counts as positive."""
    sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
    return sign * simplex(sign * x, value)


def l1_ball(x, max_value=1.0):
    """Return the nearest y to x, ``[n]``, with ‖y‖₁ ≤ max_value."""
    return jnp.where(jnp.sum(jnp.abs(x)) < max_value, x, l1_sphere(x, max_value))


def l2_sphere(x, value=1.0):
    """Return the nearest y to x, a tree, with ‖y‖₂ = value.

    All points of the sphere are equally near to x = 0. For this x the result y has equal entries, and the derivative of
    y in x is 0.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(x))
    is_zero = norm(x) == 0
    point = jax.tree.map(lambda leaf: value * jnp.where(is_zero, 1 / math.sqrt(max(size, 1)), leaf), unit(x))
    return _nan_unless(value >= 0, point)


def l2_ball(x, max_value=1.0):
    """Return the nearest y to x, a tree, with ‖y‖₂ ≤ max_value."""
    is_inside = norm(x) < max_value
    point = jax.tree.map(lambda leaf, along: jnp.where(is_inside, leaf, max_value * along), x, unit(x))
    return _nan_unless(max_value >= 0, point)


def hyperplane(x, hyperparams):
    """Return the nearest y to x with ⟨a, y⟩ = b, for the tree a like x and the number b of ``hyperparams``."""
    a, b = _scaled_row(*hyperparams)
    return _nan_unless(_is_row(a) | (b == 0), _along_row(x, a, _dot(a, x) - b))


def halfspace(x, hyperparams):
    """Return the nearest y to x with ⟨a, y⟩ ≤ b; see :func:`hyperplane`."""
    a, b = _scaled_row(*hyperparams)
    return _nan_unless(_is_row(a) | (b >= 0), _along_row(x, a, jax.nn.relu(_dot(a, x) - b)))


def box_section(x, hyperparams, tol=None):
    """Return the nearest p to x with α ≤ p ≤ β and wᵀp = c, which is p = clip(x + τw, α, β) for a scalar τ.

    wᵀp is piecewise linear in τ and does not decrease. A bisection of its breakpoints finds the piece on which wᵀp
    equals c. On this piece τ has a closed form.

    Args:
        x: the point to project, ``[n]``.
        hyperparams: ``(α, β, w, c)``: two bounds and weights of shape ``[n]``, and a scalar. Bounds may be infinite.
        tol: ignored, because the method is exact.
    """
    del tol
    low, high, weights, c = hyperparams
    size = tree.safe_divisor(jnp.max(jnp.abs(lax.stop_gradient(weights))))
    weights, c = weights / size, c / size
    low, high = (jnp.broadcast_to(bound, x.shape) for bound in (low, high))
    fixed_x, fixed_low, fixed_high, w, fixed_c = map(lax.stop_gradient, (x, low, high, weights, c))

    def section(tau):
        return w @ jnp.clip(jnp.where(w == 0, fixed_x, fixed_x + tau * w), fixed_low, fixed_high)

    reached = [jnp.where(w == 0, jnp.inf, (b - fixed_x) / jnp.where(w == 0, 1, w)) for b in (fixed_low, fixed_high)]
    first, last = jnp.minimum(*reached), jnp.maximum(*reached)
    ends = jnp.full(1, jnp.inf, w.dtype)
    breakpoints = jnp.sort(jnp.concatenate([-ends, first, last, ends]))

    def halve(bounds):
        lower, upper = bounds
        middle = (lower + upper) // 2
        is_below = section(breakpoints[middle]) <= fixed_c
        return jnp.where(is_below, middle, lower), jnp.where(is_below, upper, middle)

    all_pieces = 0, breakpoints.size - 1
    lower, upper = while_loop(lambda bounds: bounds[1] - bounds[0] > 1, halve, all_pieces, breakpoints, fixed_c)
    # At the largest possible c, the piece begins at the last breakpoint, and no entry is free.
    middle = _between(breakpoints, lower, upper)
    free = (first < middle) & (last > middle) & (w != 0)
    is_past = last < middle
    bound = jnp.where(is_past == (w > 0), high, low)
    bound = jnp.where(w == 0, jnp.clip(x, low, high), bound)
    fixed_sum = jnp.sum(jnp.where(free, 0, weights * jnp.where(free, 0, bound)))
    inside = jnp.where(free, weights, 0)
    tau = (c - fixed_sum - inside @ x) / tree.safe_divisor(inside @ inside)
    point = jnp.where(free, x + tau * weights, bound)
    violation = jnp.stack([jnp.abs(weights @ point - c), jnp.max(jnp.where(low > high, jnp.inf, 0))])
    return nan_if_violated(point, violation, jnp.maximum(jnp.abs(c), jnp.max(jnp.abs(weights * x))))


def _between(ordered, lower, upper):
    """Return a finite number between two entries of a vector, given by their indices. Either entry may be infinite.

    XLA may compute one expression twice with different rounding errors, once for a sorted vector and once for a
    comparison with its entries. A comparison with a number between two entries has the same result with either
    rounding.
    """
    low, high = ordered[lower], ordered[upper]
    low = jnp.where(jnp.isneginf(low), jnp.where(jnp.isposinf(high), 0, high - 1 - jnp.abs(high)), low)
    high = jnp.where(jnp.isposinf(high), low + 1 + jnp.abs(low), high)
    return 0.5 * low + 0.5 * high


def norm(x):
    """Return ‖x‖₂ of a tree. No square over- or underflows, and the derivative at 0 is 0."""
    size, scaled = _scaled(x)
    squares = _dot(scaled, scaled)
    return size * jnp.where(squares == 0, 0, jnp.sqrt(tree.safe_divisor(squares)))


def unit(x):
    """Return x / ‖x‖₂ of a tree, and 0 for x = 0."""
    _, scaled = _scaled(x)
    length = jnp.sqrt(tree.safe_divisor(_dot(scaled, scaled)))
    return jax.tree.map(lambda leaf: leaf / length.astype(leaf.dtype), scaled)


def _scaled(x):
    """Return the largest absolute value of an entry (1 if all are 0), as a constant, and x divided by it."""
    sizes = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(lax.stop_gradient(x))]
    size = tree.safe_divisor(jnp.max(jnp.stack(sizes)))
    return size, jax.tree.map(lambda leaf: leaf / size.astype(leaf.dtype), x)


def _scaled_row(a, b):
    size, scaled = _scaled(a)
    return scaled, b / size


def _is_row(a):
    return _dot(a, a) > 0


def _along_row(x, a, excess):
    factor = excess / tree.safe_divisor(_dot(a, a))
    return jax.tree.map(lambda leaf, row: leaf - factor.astype(leaf.dtype) * row, x, a)


def _dot(a, b):
    """Return ⟨a, b⟩ of two trees, accumulated in float32 at least."""
    exact = functools.partial(jnp.vdot, precision=lax.Precision.HIGHEST)
    parts = jax.tree.map(lambda u, v: exact(u, v, preferred_element_type=jnp.result_type(u, v, jnp.float32)), a, b)
    return functools.reduce(operator.add, jax.tree.leaves(parts))


def for_each_leaf(x, bound):
    """Return ``bound`` if it is a tree like x, else a tree like x with ``bound`` at each leaf."""
    return bound if jax.tree.structure(bound) == jax.tree.structure(x) else jax.tree.map(lambda _: bound, x)


def _nan_unless(is_feasible, point):
    return jax.tree.map(lambda leaf: jnp.where(is_feasible, leaf, jnp.nan), point)
