"""Is this hypergradient right? Checks for a person, of a condition, of a method, and of methods side by side.

:func:`check_condition` looks at one point: what the implicit function theorem asks for, and does it hold here?
:func:`check_hypergradient` sets a method's gradient beside the references of :mod:`bilevel.verify.oracles` and says
which side is wrong, and how. :func:`compare_methods` measures. Methods are arguments; no gradient code is shared with
them.
"""

from bilevel.verify.compare import MethodComparison, MethodReport, compare_methods
from bilevel.verify.examine import Check, ConditionReport, check_condition
from bilevel.verify.verdict import Comparison, HypergradientReport, check_hypergradient

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
