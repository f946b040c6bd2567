"""Linear solvers of the adjoint system: one protocol, and a status computed from the true residual.

A solver is a frozen dataclass, called as ``solver(matvec, b, init=None) -> (x, LinearInfo)`` on a pytree. By default,
``CG`` runs jaxopt's ``solve_cg``, which returns x alone. ``Lineax`` runs a solver of the library Lineax. The other
solvers are implemented here. In float32 the recursive residual of an iterative algorithm can be wrong by orders of
magnitude. So every solve ends with one more product Ax, which gives the true residual and the sign of ⟨x, Ax⟩.
"""

from bilevel.linear.any_solver import check_linear, run_linear
from bilevel.linear.blockwise import Blockwise
from bilevel.linear.choose import DENSE_LIMIT, LinearChoice, choose_linear
from bilevel.linear.dense import LU, Cholesky
from bilevel.linear.from_lineax import Lineax
from bilevel.linear.iterative import CG, GMRES, BiCGStab, NormalCG
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.series import Neumann

__all__ = [
    "CG",
    "DENSE_LIMIT",
    "GMRES",
    "LU",
    "BiCGStab",
    "Blockwise",
    "Cholesky",
    "LinearChoice",
    "Lineax",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "check_linear",
    "choose_linear",
    "run_linear",
]
