"""What the pytest fixture ``hypergradient`` is: the assertions in float64, each remembered for the report."""

from bilevel.conditions import Condition
from bilevel.problem import Problem
from bilevel.testing.assertions import Check, assert_case, assert_condition, assert_hypergradient
from bilevel.testing.cases import Case
from bilevel.types import PyTree
from bilevel.verify import oracles


class Hypergradients:
    """The assertions of :mod:`bilevel.testing`; a test that asks for the fixture runs in float64."""

    def __init__(self):
        self._checks: list[Check] = []

    def assert_hypergradient(self, problem: Problem, theta: PyTree, init, data: PyTree, solver, method, **options):
        """:func:`bilevel.testing.assert_hypergradient` on ``theta``, ``init`` and ``data`` cast to float64."""
        __tracebackhide__ = True
        theta, data = oracles.as_double(theta), oracles.as_double(data)
        init = init if callable(init) else oracles.as_double(init)
        assert_hypergradient(problem, theta, init, data, solver, method, record=self._checks.append, **options)

    def assert_case(self, case: Case, solver=None, method=None, **options):
        """:func:`bilevel.testing.assert_case`, in the case's own dtype."""
        __tracebackhide__ = True
        assert_case(case, solver, method, record=self._checks.append, **options)

    def assert_condition(self, problem: Problem | Condition, theta: PyTree, w: PyTree, data: PyTree, **options):
        """:func:`bilevel.testing.assert_condition`."""
        __tracebackhide__ = True
        assert_condition(problem, theta, w, data, record=self._checks.append, **options)

    def take(self) -> list[dict]:
        """The checks since the last call, as plain dictionaries: the worst for each method and oracle.

        Plain, because a report of pytest may travel between processes.
        """
        worst, counts = {}, {}
        for check in self._checks:
            key = check.method, check.oracle
            counts[key] = counts.get(key, 0) + 1
            if key not in worst or _badness(check) > _badness(worst[key]):
                worst[key] = check
        self._checks.clear()
        return [{**vars(check), "checks": counts[key], "ok": check.ok} for key, check in worst.items()]


def _badness(check):
    return not check.ok, check.error / check.rtol if check.rtol else check.error
