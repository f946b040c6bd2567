"""Hypergradients verified in a test suite: assertions, cases with known answers, Hypothesis strategies.

The pytest plugin that comes with the package offers the same assertions as a fixture; see docs/testing.md.
Nothing here is imported by `bilevel` itself, and Hypothesis only with :mod:`bilevel.testing.strategies`.
"""

import importlib

from bilevel.testing import families
from bilevel.testing.assertions import Check, assert_case, assert_condition, assert_hypergradient
from bilevel.testing.cases import Case

__all__ = ["Case", "Check", "assert_case", "assert_condition", "assert_hypergradient", "families", "strategies"]


def __getattr__(name: str):
    if name == "strategies":
        return importlib.import_module("bilevel.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
