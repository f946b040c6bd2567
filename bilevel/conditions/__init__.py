"""Conditions: what holds at the inner solution, declared as a residual F(w, θ, data) that vanishes there.

Everything else follows from the residual. The inner solver drives it to zero, and the implicit function theorem
differentiates it: dw*/dθ = −(∂F/∂w)⁻¹ ∂F/∂θ. A condition also declares its structure, such as symmetry. A
solver that needs a structure which the condition does not declare raises an error before it runs.
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
