"""Families of cases: each function draws the numbers of one problem from a seed and returns a :class:`Case`.

The matrices A₀, Q, H and XᵀX/s in the formulas of the families have singular values from 1/κ to 1, where κ is the
option ``condition``. One step size therefore suits a whole family. For the logistic family, the matrix is ¼XᵀX/s,
because the second derivative of the loss is at most ¼. The matrix of a fixed point is I minus a contraction, and has a
condition number of at most κ. For a family with constraints the solution is drawn first, with a known distance to the
nearest change of the active set. The problem is then built so that it has this solution.
"""

from collections.abc import Callable

from bilevel.testing.cases import Case
from bilevel.testing.families.affine import fixed_point, quadratic, root
from bilevel.testing.families.building_blocks import (
    Options,
    contraction_complement,
    general_matrix,
    orthogonal,
    symmetric_matrix,
)
from bilevel.testing.families.constrained import box, lasso, simplex
from bilevel.testing.families.multipliers import kkt
from bilevel.testing.families.proximal import imaml
from bilevel.testing.families.regression import logistic, ridge
from bilevel.testing.families.suggested import newton

__all__ = [
    "FAMILIES",
    "Options",
    "box",
    "contraction_complement",
    "fixed_point",
    "general_matrix",
    "imaml",
    "kkt",
    "lasso",
    "logistic",
    "newton",
    "orthogonal",
    "quadratic",
    "ridge",
    "root",
    "simplex",
    "symmetric_matrix",
]

FAMILIES: dict[str, Callable[..., Case]] = {
    family.__name__: family
    for family in (quadratic, root, fixed_point, ridge, logistic, imaml, box, simplex, lasso, kkt)
}
"""Every family by name."""
