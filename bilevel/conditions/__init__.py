"""Conditions: what holds at the inner solution, declared as a residual F(w, θ, data) that vanishes there.

The residual defines the inner solution and its derivative in θ. The inner solver looks for the w* with
F(w*, θ, data) = 0. The implicit function theorem gives its derivative: dw*/dθ = −(∂F/∂w)⁻¹ ∂F/∂θ. A condition also
declares its structure, such as symmetry. A linear solver that needs symmetry, and an inner solver that needs a gradient
or a mapping, are refused with an error if the condition lacks that property. Positive definiteness is not checked
beforehand. If it is missing, Cholesky reports NEGATIVE_CURVATURE. CG reports it only if its solution or a search
direction shows the negative curvature.
"""

from bilevel.conditions.constrained import Projected, ProximalGradient
from bilevel.conditions.general import FixedPoint, Root
from bilevel.conditions.kkt import KKT
from bilevel.conditions.least_squares import LeastSquares
from bilevel.conditions.protocol import Condition, Residual, StrongConvexity
from bilevel.conditions.stationary import Proximal, Stationary, identity_center, theta_itself

__all__ = [
    "KKT",
    "Condition",
    "FixedPoint",
    "LeastSquares",
    "Projected",
    "Proximal",
    "ProximalGradient",
    "Residual",
    "Root",
    "Stationary",
    "StrongConvexity",
    "identity_center",
    "theta_itself",
]
