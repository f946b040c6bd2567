"""Verify hypergradients: one point of a problem, one method against references, several methods against each other.

- :func:`check_condition` checks at one point whether the assumptions of the implicit function theorem hold.
- :func:`check_hypergradient` compares a method's gradient with the references of :mod:`bilevel.verify.references`. If
  they differ, it names the likely cause.
- :func:`compare_methods` measures the error, time, memory and products of several methods.

Methods are arguments of these functions. The references share no gradient code with them, so that a fault in that code
cannot show on both sides.
"""

from bilevel.verify.condition import Check, ConditionReport, check_condition
from bilevel.verify.gradient import Comparison, HypergradientReport, check_hypergradient
from bilevel.verify.methods import MethodComparison, MethodReport, compare_methods

__all__ = [
    "Check",
    "Comparison",
    "ConditionReport",
    "HypergradientReport",
    "MethodComparison",
    "MethodReport",
    "check_condition",
    "check_hypergradient",
    "compare_methods",
]
