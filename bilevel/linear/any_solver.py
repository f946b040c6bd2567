"""The call of a linear solver, which may be a user's function that returns x alone."""

import inspect
from typing import Any

import jax

from bilevel import tree
from bilevel.linear import diagnosis
from bilevel.types import LinearInfo, LinearSolver, MatVec, PyTree

# The functions of jaxopt.linear_solve, each with the class here that replaces it. They take other arguments than a
# linear solver here, and some of them take no pytrees.
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
    pair of x and None, as from `jax.scipy.sparse.linalg`, counts as x alone. A solver without a third argument gets no
    ``init``.

    Raises:
        ValueError: for a solver that returns neither x nor a pair of x and a :class:`LinearInfo`, and for a function of
            `jaxopt.linear_solve`; the message names the solver of this library.
    """
    name = getattr(linear, "__name__", "")
    if name in _OF_JAXOPT and str(getattr(linear, "__module__", "")).startswith("jaxopt"):
        raise ValueError(
            f"jaxopt's {name} takes other arguments than a linear solver here: use bl.{_OF_JAXOPT[name]}()"
        )
    found: Any = linear(matvec, b, init) if _takes_init(linear, matvec, b) else linear(matvec, b)
    if isinstance(found, tuple) and len(found) == 2:
        if isinstance(found[1], LinearInfo):
            return found[0], found[1]
        if found[1] is None:
            found = found[0]
    got, expected = ((jax.tree.structure(x), tree.shapes(x)) for x in (found, b))
    if got != expected:
        raise ValueError(
            f"a linear solver returns x, a pytree like b of {expected[0]} and shapes {expected[1]}, or a pair of x and "
            f"a bl.LinearInfo; got {got[0]} and shapes {got[1]}"
        )
    x = tree.like(tree.arrays(found), b)
    return x, diagnosis.report(matvec, b, x, None)


def _takes_init(linear: LinearSolver, matvec: MatVec, b: PyTree) -> bool:
    """Return whether a solver has a third positional argument, for ``init``."""
    try:
        inspect.signature(linear).bind(matvec, b, None)
    except (TypeError, ValueError):
        return False
    return True
