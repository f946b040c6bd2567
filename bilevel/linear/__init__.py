"""Linear solvers of the adjoint system: one protocol, and a status computed from the true residual.

A solver is a frozen value, called as ``solver(matvec, b, init=None) -> (x, LinearInfo)`` on any pytree. Every solve ends
with one more product Ax, which gives the true residual and the sign of ⟨x, Ax⟩, because the recursive residual of an
iterative solver can be wrong by orders of magnitude in float32. The recursions of this library also say how they ended,
which tells a spent budget from a breakdown, a singular operator and the limit of rounding. The default engine of ``CG``
is jaxopt's, which returns x and nothing else.
"""

from bilevel.linear.choose import DENSE_LIMIT, LinearChoice, choose_linear
from bilevel.linear.dense import LU, Cholesky
from bilevel.linear.iterative import CG, GMRES, BiCGStab, NormalCG
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.series import Neumann

__all__ = [
    "CG",
    "DENSE_LIMIT",
    "GMRES",
    "LU",
    "BiCGStab",
    "Cholesky",
    "LinearChoice",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "choose_linear",
]
