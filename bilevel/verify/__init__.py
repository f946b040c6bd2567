"""Verify hypergradients: check a problem at one point, check a method against references, and compare methods.

- :func:`check_condition` checks whether the assumptions of the implicit function theorem hold at one point.
- :func:`check_hypergradient` compares a method's gradient with the references of :mod:`bilevel.verify.references`. If
  they differ, it names the likely cause.
- :func:`compare_methods` measures each method's error, time, memory and number of products with the inner Jacobian.

:func:`check_hypergradient` and :func:`compare_methods` take methods as arguments. The references share no gradient code
with the methods, so a mistake in a method's gradient code cannot make its reference wrong too.
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
