"""Preparation that all linear solvers share: option checks, the ridge, the scale of b, and the dtype of a recursion."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import LinearInfo, MatVec, PyTree


def check_not_negative(name: str, **options: float | None) -> None:
    """Raise ValueError for an option below zero; None stands for an option that is not set."""
    for option, value in options.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} needs {option} of at least 0, got {value}")


def with_ridge(matvec: MatVec, ridge: float) -> MatVec:
    """Return the operator A + ridge·I."""
    if not ridge:
        return matvec
    return lambda v: tree.add(matvec(v), tree.scale(ridge, v))


def normalise(b: PyTree, init: PyTree | None = None) -> tuple[jax.Array, PyTree, PyTree | None]:
    """Return ‖b‖, b / ‖b‖ and init / ‖b‖, so that a cotangent of size 1e-20 or 1e20 is solved as well as one of size 1.

    Where ‖b‖ is zero or not finite, 1 takes its place.
    """
    size = tree.norm(b)
    size = jax.lax.stop_gradient(jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size)))
    return size, tree.scale(1 / size, b), None if init is None else tree.scale(1 / size, init)


def denormalise(size: jax.Array, info: LinearInfo) -> tuple[PyTree, LinearInfo]:
    """Return the solution for b and its report, from the report on the solution for b / size."""
    solution = tree.scale(size, info.solution)
    return solution, replace(info, solution=solution)


def in_accumulation_dtype(matvec: MatVec, like: PyTree) -> MatVec:
    """Return a map on trees like ``like`` as a map on trees in the accumulation dtype (that of :func:`tree.widened`).

    A recursion in bfloat16 loses too many digits. The products themselves are computed in the dtypes of ``like``.
    """
    # Inside shard_map, the basis vectors of a dense solver vary over no mesh axis, but matvec may need varying ones.
    return lambda v: tree.widened(matvec(tree.like(tree.match_varying_axes(v, like)[0], like)))


def recursive_tol(tol: float | None, b: PyTree) -> float:
    """Return the relative residual at which a recursion stops.

    The recursion goes a little below ``tol``, so that the true residual meets ``tol`` in spite of rounding errors. It
    stops at eps² in any case: smaller residuals gain nothing, and their squares would underflow and give 0/0.
    """
    tol, eps = tol or 0.0, tree.eps(b)
    return max((0.9 if tol > 80 * eps else 0.5) * tol, eps**2)
