"""The call of a linear solver, which may be a user's function that returns x alone."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear import diagnosis
from bilevel.types import LinearInfo, LinearSolver, MatVec, PyTree

# The functions of jaxopt.linear_solve, each with the class of this library that replaces it. They take other arguments
# than a linear solver of this library, and some of them take no pytrees.
_OF_JAXOPT = {
    "solve_bicgstab": "BiCGStab",
    "solve_cg": "CG",
    "solve_cholesky": "Cholesky",
    "solve_gmres": "GMRES",
    "solve_inv": "LU",
    "solve_iterative_refinement": "LU",
    "solve_lu": "LU",
    "solve_normal_cg": "NormalCG",
    "solve_qr": "LU",
}


def run_linear(
    linear: LinearSolver, matvec: MatVec, b: PyTree, init: PyTree | None = None
) -> tuple[PyTree, LinearInfo]:
    """Run a linear solver, and make the report if the solver returns x alone.

    That report holds the true residual, computed with one more product, and the status of a solver without ``tol``. A
    pair of x and None, or of x and one number, as from `jax.scipy.sparse.linalg`, counts as x alone. A solver without a
    third argument gets no ``init``.

    Raises:
        ValueError: for a solver that returns neither x nor a pair of x and a :class:`LinearInfo`, and for a function of
            `jaxopt.linear_solve`; the message names the solver of this library.
    """
    name = getattr(linear, "__name__", "")
    if name in _OF_JAXOPT and str(getattr(linear, "__module__", "")).startswith("jaxopt"):
        raise ValueError(
            f"jaxopt's {name} takes other arguments than a linear solver here: use bl.{_OF_JAXOPT[name]}()"
        )
    found: Any = linear(matvec, b, init) if _takes(linear, 3, unknown=False) else linear(matvec, b)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], LinearInfo):
        return found[0], found[1]
    expected = _form(b)
    if isinstance(found, tuple) and len(found) == 2 and _form(found) != expected and _is_code(found[1]):
        found = found[0]
    got = _form(found)
    if got != expected:
        raise ValueError(
            f"a linear solver returns x, a pytree like b of {expected[0]} and shapes {expected[1]}, or a pair of x and "
            f"a bl.LinearInfo; got {got[0]} and shapes {got[1]}"
        )
    x = tree.like(tree.arrays(found), b)
    return x, diagnosis.report(matvec, b, x, None)


def check_linear(owner: str, linear: object) -> None:
    """Raise TypeError for something that cannot be called as a linear solver, such as a class of solvers."""
    fits = callable(linear) and any(_takes(linear, count, unknown=True) for count in (2, 3))
    if isinstance(linear, type) or not fits:
        got = f"the class {linear.__name__}" if isinstance(linear, type) else type(linear).__name__
        remedy = f"pass an instance, {linear.__name__}(…)" if isinstance(linear, type) else "pass one, such as CG(20)"
        raise TypeError(f"{owner} calls linear(matvec, b, init), got {got}: {remedy}")


def _form(x: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(x), tree.shapes(x)


def _is_code(found: Any) -> bool:
    """Return whether the second output of a solver is None or one number, which says how the solver ended."""
    return found is None or (jax.tree_util.all_leaves([found]) and jnp.ndim(found) == 0)


def _takes(linear: Any, count: int, unknown: bool) -> bool:
    """Return whether a function takes ``count`` positional arguments, or ``unknown`` if it has no signature."""
    try:
        signature = inspect.signature(linear)
    except (TypeError, ValueError):  # a builtin may have no signature
        return unknown
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
