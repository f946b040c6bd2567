"""Conditions: what holds at the inner solution, declared as a residual F(w, θ, data) that vanishes there.

Everything else follows from the residual. The inner solver drives it to zero, and the implicit function theorem
differentiates it: dw*/dθ = −(∂F/∂w)⁻¹ ∂F/∂θ. A condition also states its structure (symmetric, positive definite), so
that a solver which needs more than that is refused before anything runs.
"""

from bilevel.conditions.constrained import Projected, ProximalGradient
from bilevel.conditions.general import FixedPoint, Root
from bilevel.conditions.kkt import KKT
from bilevel.conditions.protocol import Condition, Residual, StrongConvexity
from bilevel.conditions.stationary import Proximal, Stationary, identity_center, theta_itself

__all__ = [
    "KKT",
    "Condition",
    "FixedPoint",
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
