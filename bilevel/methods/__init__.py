"""Methods: ways to differentiate the outer value at the inner solution.

A method is a frozen dataclass. It is called as ``method(problem, solver, theta, init, data, linear_init)``, and returns
a :class:`~bilevel.Hypergradient`. Any function with this signature is a method too.
"""

from bilevel.methods.evolution_strategies import EvolutionStrategies
from bilevel.methods.finite_difference import FiniteDifference
from bilevel.methods.first_order import FirstOrder
from bilevel.methods.implicit import Implicit
from bilevel.methods.one_step import OneStep
from bilevel.methods.protocol import Method, Start
from bilevel.methods.unrolled import ForwardUnrolled, Unrolled
from bilevel.methods.value_penalty import ValuePenalty

__all__ = [
    "EvolutionStrategies",
    "FiniteDifference",
    "FirstOrder",
    "ForwardUnrolled",
    "Implicit",
    "Method",
    "OneStep",
    "Start",
    "Unrolled",
    "ValuePenalty",
]
