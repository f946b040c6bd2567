"""The object that the pytest fixture ``hypergradient`` returns: the assertions of `bilevel.testing`, with a record.

The plugin's report lists, for each test, the worst check of each pair of method and reference.
"""

from collections.abc import Callable
from typing import Any

from bilevel.conditions import Condition
from bilevel.problem import Problem
from bilevel.start import Start, is_function
from bilevel.testing.assertions import Check, assert_case, assert_condition, assert_hypergradient
from bilevel.testing.cases import Case
from bilevel.types import PyTree
from bilevel.verify.precision import as_double


class Hypergradients:
    """The assertions of :mod:`bilevel.testing`, with a record of the checks for the plugin's report.

    The plugin enables float64 during a test that requests the fixture.
    """

    def __init__(self) -> None:
        self._checks: list[Check] = []

    def assert_hypergradient(
        self,
        problem: Problem,
        theta: PyTree,
        init: Start,
        data: PyTree,
        solver: Callable[..., Any],
        method: Callable[..., Any],
        **options: Any,
    ) -> None:
        """Call :func:`bilevel.testing.assert_hypergradient` with ``theta``, ``init`` and ``data`` cast to float64.

        An ``init`` that is a function is called with float64 arguments instead.
        """
        __tracebackhide__ = True
        theta, data = as_double(theta), as_double(data)
        init = init if is_function(init) else as_double(init)
        assert_hypergradient(problem, theta, init, data, solver, method, record=self._checks.append, **options)

    def assert_case(
        self,
        case: Case,
        solver: Callable[..., Any] | None = None,
        method: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        """Call :func:`bilevel.testing.assert_case` in the case's own dtype."""
        __tracebackhide__ = True
        assert_case(case, solver, method, record=self._checks.append, **options)

    def assert_condition(
        self, problem: Problem | Condition, theta: PyTree, w: PyTree, data: PyTree, **options: Any
    ) -> None:
        """Call :func:`bilevel.testing.assert_condition`, which computes in float64."""
        __tracebackhide__ = True
        assert_condition(problem, theta, w, data, record=self._checks.append, **options)

    def take(self) -> list[dict[str, Any]]:
        """Return the worst check of each pair of method and reference, then delete all recorded checks.

        Each result is a plain dictionary, because pytest-xdist serialises test reports. Its entry ``checks`` counts the
        checks of that pair since the last call of this function.
        """
        worst, counts = {}, {}
        for check in self._checks:
            key = check.method, check.reference
            counts[key] = counts.get(key, 0) + 1
            if key not in worst or _badness(check) > _badness(worst[key]):
                worst[key] = check
        self._checks.clear()
        return [{**vars(check), "checks": counts[key], "ok": check.ok} for key, check in worst.items()]


def _badness(check):
    """Return a sort key: a failed check is worse than one that passed, then a larger error/rtol is worse."""
    return not check.ok, check.error / check.rtol if check.rtol else check.error
