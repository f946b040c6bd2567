"""Projections onto affine sets and polyhedra, exact to rounding for rows of any length.

The dual method of Goldfarb and Idnani finds the active inequalities in finitely many steps, and is not differentiated.
The projection onto the face that they define is a linear solve, with exact derivatives of any order.

Source: Goldfarb, Idnani (1983), A numerically stable dual method for solving strictly convex quadratic programs.
"""

import jax.numpy as jnp
from jax import lax

from bilevel._jaxopt.feasibility import nan_if_violated
from bilevel._jaxopt.loops import while_loop


def affine_set(x, hyperparams, rounding=0.0):
    """Return the nearest y to x with Ay = b.

    Args:
        x: the point to project, ``[n]``.
        hyperparams: ``(A, b)`` of shapes ``[m, n]`` and ``[m]``. The rows of A may be linearly dependent, and m may be
            0. ``(None, None)`` is no constraint.
        rounding: as for :func:`~bilevel._jaxopt.feasibility.nan_if_violated`.
    """
    rows, right = _constraints(x, *hyperparams)
    point = _onto_rows(x, rows, right)
    return nan_if_violated(point, jnp.abs(rows @ point - right), _size(x, right), rounding)


def polyhedron(x, hyperparams, tol=None, rounding=0.0):
    """Return the nearest y to x with Ay = b and Gy ≤ h.

    Args:
        x: the point to project, ``[n]``.
        hyperparams: ``(A, b, G, h)`` of shapes ``[m, n]``, ``[m]``, ``[k, n]`` and ``[k]``. m or k may be 0, and None
            stands for absent constraints. The rows may be linearly dependent and of different lengths. An entry of h
            may be ∞.
        tol: the largest violation with which a row still counts as satisfied. The row is scaled to length 1, and the
            violation is relative to x and h. None means 4·eps.
        rounding: as for :func:`affine_set`.
    """
    equal, b = _constraints(x, *hyperparams[:2])
    unequal, h = _constraints(x, *hyperparams[2:])
    unequal, h = jnp.where(jnp.isposinf(h)[:, None], 0, unequal), jnp.where(jnp.isposinf(h), 0, h)
    tol = 4 * jnp.finfo(x.dtype).eps if tol is None else tol
    active = _active_rows(*map(lax.stop_gradient, (x, equal, b, unequal, h)), tol)
    rows = jnp.concatenate([equal, jnp.where(active[:, None], unequal, 0)])
    right = jnp.concatenate([b, jnp.where(active, h, 0)])
    point = _onto_rows(x, rows, right)
    violation = jnp.concatenate([jnp.abs(equal @ point - b), unequal @ point - h])
    return nan_if_violated(point, violation, _size(x, right), rounding)


def _constraints(x, matrix, right):
    """Return the rows and the right-hand sides, divided by the lengths of the rows. A row of zeros is not scaled."""
    if matrix is None:
        return jnp.zeros((0, x.size), x.dtype), jnp.zeros(0, x.dtype)
    matrix, right = jnp.asarray(matrix, jnp.result_type(matrix, x)), jnp.asarray(right)
    largest = jnp.max(jnp.abs(lax.stop_gradient(matrix)), 1, initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(lax.stop_gradient(matrix) / largest[:, None], axis=1)  # no square overflows
    length = jnp.where(length > 0, length, 1)
    return matrix / largest[:, None] / length[:, None], right / largest / length


def _size(x, right):
    return jnp.maximum(jnp.max(jnp.abs(x), initial=0), jnp.max(jnp.abs(right), initial=0))


def _onto_rows(x, rows, right):
    """Return the nearest y to x with ``rows @ y = right``."""
    if rows.shape[0] == 0:
        return x
    inverse = jnp.linalg.pinv(rows)
    point = x - inverse @ (rows @ x - right)
    return point - inverse @ (rows @ point - right)  # corrects the rounding errors of nearly parallel rows


def _active_rows(x, equal, b, unequal, h, tol):
    """Return which rows of Gy ≤ h hold with equality at the nearest point to x, as a mask ``[k]``.

    The rows that the mask selects are linearly independent of each other and of the rows of A. The method begins with
    the nearest point on Ay = b. It adds the most violated row to the active ones, and moves along the part of the row
    that is orthogonal to the active rows, until the row is satisfied. It drops an active row whose multiplier becomes
    zero on the way. The distance to x grows with each row that is added, so the method ends.
    """
    if unequal.shape[0] == 0:
        return jnp.zeros(0, bool)
    dtype = jnp.result_type(x, equal, b, unequal, h)
    eps = jnp.finfo(dtype).eps
    start = _onto_rows(x, equal, b).astype(dtype)
    gap = (h - unequal @ start).astype(dtype)
    rows = unequal.astype(dtype)
    if equal.shape[0] > 0:
        rows = rows - (rows @ jnp.linalg.pinv(equal)) @ equal
    length = jnp.linalg.norm(rows, axis=1)
    is_free = length > 100 * eps  # else the row is constant on Ay = b
    rows = jnp.where(is_free[:, None], rows / jnp.where(is_free, length, 1)[:, None], 0)
    gap = jnp.where(is_free, gap / jnp.where(is_free, length, 1), jnp.inf)
    noise = tol * (jnp.abs(h) + jnp.linalg.norm(start)) / jnp.where(is_free, length, 1)
    count_limit = 100 + 20 * sum(rows.shape)

    def worst(moved):
        violation = rows @ moved - gap - noise
        chosen = jnp.argmax(violation)
        return chosen, violation[chosen] > 0

    def is_open(state):
        count, _, _, _, _, _, is_violated = state
        return (count < count_limit) & is_violated

    def step(state):
        count, moved, multipliers, inverse, active, chosen, _ = state
        row = rows[chosen]
        coefficients = inverse @ row
        direction = row - coefficients @ rows
        correction = inverse @ direction  # repeated, because the inverse collects rounding errors
        direction = direction - correction @ rows
        square = direction @ direction
        is_independent = square > (100 * eps) ** 2
        square = jnp.where(is_independent, square, 1)
        to_row = jnp.where(is_independent, (row @ moved - gap[chosen]) / square, jnp.inf)
        rates = coefficients + correction
        falling = active & (rates > 0)
        ratios = jnp.where(falling, multipliers / jnp.where(falling, rates, 1), jnp.inf)
        dropped = jnp.argmin(ratios)
        is_added = to_row <= ratios[dropped]
        length = jnp.minimum(to_row, ratios[dropped])
        is_stuck = jnp.isinf(length)  # the row cannot be satisfied together with the active ones
        length = jnp.where(is_stuck, 0, length)
        moved = moved - jnp.where(is_independent, length, 0) * direction
        multipliers = jnp.where(active, jnp.maximum(multipliers - length * rates, 0), 0)
        multipliers = multipliers.at[chosen].set(state[2][chosen] + length)
        # The rows of the pseudo-inverse of the active rows, after one row is added, or after one is dropped.
        grown = inverse - (coefficients[:, None] * direction[None]) / square
        grown = grown.at[chosen].set(direction / square)
        last = inverse[dropped]
        squared = last @ last
        fewer = inverse - (inverse @ last)[:, None] * last[None] / jnp.where(squared > 0, squared, 1)
        fewer = fewer.at[dropped].set(0)
        inverse = jnp.where(is_added, grown, fewer)
        active = jnp.where(is_added, active.at[chosen].set(True), active.at[dropped].set(False))
        multipliers = jnp.where(active | (jnp.arange(active.size) == chosen), multipliers, 0)
        next_chosen, is_violated = worst(moved)
        return (
            count + 1,
            moved,
            multipliers,
            inverse,
            active,
            jnp.where(is_added, next_chosen, chosen),
            jnp.where(is_added, is_violated, ~is_stuck),
        )

    none = jnp.zeros(gap.shape, dtype)
    state = 0, jnp.zeros_like(start), none, jnp.zeros_like(rows), none > 0, *worst(jnp.zeros_like(start))
    return while_loop(is_open, step, state, rows)[4]
