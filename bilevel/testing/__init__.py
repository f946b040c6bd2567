"""Tools to verify hypergradients in a test suite: assertions, cases with known answers, Hypothesis strategies.

The pytest plugin of this package offers the same assertions as a fixture; see docs/testing.md. ``import bilevel`` does
not import this package, and only :mod:`bilevel.testing.strategies` imports Hypothesis.
"""

import importlib
from types import ModuleType

from bilevel.testing import families
from bilevel.testing.assertions import Check, assert_case, assert_condition, assert_hypergradient
from bilevel.testing.cases import Case

__all__ = ["Case", "Check", "assert_case", "assert_condition", "assert_hypergradient", "families", "strategies"]


def __getattr__(name: str) -> ModuleType:
    """Import ``strategies`` on first use, so that the rest of this package works without Hypothesis."""
    if name == "strategies":
        return importlib.import_module("bilevel.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
