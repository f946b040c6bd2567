"""The pytest plugin: a fixture ``hypergradient`` and the option ``--hypergradient-report``.

The plugin is a module outside the package `bilevel`, because pytest imports its plugins in every run, and importing any
part of `bilevel` imports JAX, which takes about a second. The plugin imports JAX only when a test requests the fixture.
"""

from collections.abc import Iterator

import pytest

PROPERTY = "hypergradient"
"""Name of a test's checks in the ``user_properties`` of its report. pytest-xdist sends these to the main process."""
_FIXTURE: pytest.StashKey = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bilevel", "hypergradients")
    group.addoption(
        "--hypergradient-report",
        action="store_true",
        help="list what the hypergradient fixture checked, and the worst errors",
    )


@pytest.fixture(scope="session")
def hypergradient(request: pytest.FixtureRequest):
    """The assertions of bilevel.testing, with float64 enabled; --hypergradient-report lists their worst errors."""
    # The scope is the session, because Hypothesis rejects function-scoped fixtures.
    from bilevel.testing.fixture import Hypergradients

    request.config.stash[_FIXTURE] = fixture = Hypergradients()
    return fixture


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Enable float64 during set-up, call and tear-down of a test that requests the fixture."""
    # A parameter that is named "hypergradient" replaces the fixture.
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if "hypergradient" not in getattr(item, "fixturenames", ()) or "hypergradient" in parameters:
        return (yield)
    import jax

    with jax.enable_x64(True):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Add the worst checks of a test to its report."""
    try:
        return (yield)
    finally:
        fixture = item.config.stash.get(_FIXTURE, None)
        if fixture is not None:
            item.user_properties.extend((PROPERTY, row) for row in fixture.take())


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("hypergradient_report"):
        return
    rows = [
        (report.nodeid, value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    terminalreporter.section("hypergradients checked")
    if not rows:
        terminalreporter.write_line("none: no test called an assertion of the fixture")
    for line in _table(sorted(rows, key=lambda row: row[0])):
        terminalreporter.write_line(line)


def _table(rows) -> Iterator[str]:
    """Yield the lines of the report: each test, and below it one line for each pair of method and reference."""
    if not rows:
        return
    head = ("", "worst error", "rtol", "checks", "method", "against", "problem")
    cells = [
        (
            "ok" if row["ok"] else "WRONG",
            f"{row['error']:.1e}",
            f"{row['rtol']:.1e}",
            str(row["checks"]),
            row["method"],
            row["reference"],
            row["problem"],
        )
        for _, row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    last = None
    yield _line(head, widths)
    for (test, _), row in zip(rows, cells, strict=True):
        if test != last:
            yield test
        last = test
        yield _line(row, widths)


def _line(cells, widths):
    return "  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
