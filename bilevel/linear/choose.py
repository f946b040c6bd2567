"""The choice of a linear solver by the structure of a condition."""

from typing import NamedTuple

import jax

from bilevel.conditions.protocol import Condition
from bilevel.linear.dense import LU, Cholesky
from bilevel.linear.iterative import CG, GMRES
from bilevel.types import LinearSolver, PyTree


class LinearChoice(NamedTuple):
    """A linear solver and the reason for it."""

    solver: LinearSolver
    reason: str


DENSE_LIMIT = 500
"""Largest number n of unknowns for which :func:`choose_linear` chooses a dense factorisation.

It takes n products with A and stores the n² entries of A.
"""


def choose_linear(condition: Condition, w: PyTree | None = None) -> LinearChoice:
    """Choose a linear solver that fits the structure of a condition, and say why.

    Args:
        condition: the choice depends on its ``symmetric`` and ``positive_definite``.
        w: a pytree like the inner variables, or of their shapes. If it is given, the choice also depends on the number
            of its entries.

    Returns:
        ``(solver, reason)``; the reason is one sentence.

    Example:
        >>> from bilevel.conditions import Stationary
        >>> solver, reason = choose_linear(Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2))
        >>> type(solver).__name__, reason
        ('CG', 'Stationary is symmetric: conjugate gradients need one product an iteration and four vectors.')
    """
    name = type(condition).__name__
    # A Python number has no attribute size and counts as one unknown.
    size = None if w is None else sum(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(w))
    if size is not None and size <= DENSE_LIMIT:
        if condition.symmetric and condition.positive_definite:
            return LinearChoice(Cholesky(), f"{name} is positive definite with {size} unknowns: factorise it.")
        return LinearChoice(LU(), f"{name} has {size} unknowns: a dense factorisation is exact and needs no tuning.")
    if condition.symmetric:
        why = "conjugate gradients need one product an iteration and four vectors."
        return LinearChoice(CG(max_steps=100, tol=1e-6), f"{name} is symmetric: {why}")
    why = "until it restarts, GMRES has the smallest residual of all Krylov methods with as many products."
    return LinearChoice(GMRES(max_steps=100, tol=1e-6), f"{name} is not symmetric: {why}")
