"""Two tiers of tests: ``pytest`` runs the fast one, ``pytest --all`` both.

A test is slow where it says so, with the reason: ``@pytest.mark.slow("compiles every preset at its real size")``.
A slow test also runs when the command line names it, as in ``pytest tests/test_file.py::test_name``.
"""

from pathlib import PurePath

import pytest

SLOW_PAGES: dict[str, str] = {}
"""Doctests that are slow: a file that cannot carry a mark, relative to this folder, and the reason."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.DoctestItem):
        file = PurePath(item.path).relative_to(item.config.rootpath).as_posix()
        if file in SLOW_PAGES:
            item.add_marker(pytest.mark.slow(SLOW_PAGES[file]))


# Last, because other plugins deselect by -m and -k, and what they drop is not for this hook to count.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow"):
            if not (len(mark.args) == 1 and isinstance(mark.args[0], str) and mark.args[0]) or mark.kwargs:
                raise pytest.UsageError(f'{item.nodeid}: a slow test says why: @pytest.mark.slow("the reason")')
    # With -m the marks are chosen by hand.
    if config.getoption("all") or config.getoption("markexpr"):
        return
    named = [argument for argument in config.args if "::" in argument]
    deselected = [item for item in items if item.get_closest_marker("slow") and not _is_named(item, named)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        dropped = {id(item) for item in deselected}
        items[:] = [item for item in items if id(item) not in dropped]


def _is_named(item: pytest.Item, named: list[str]) -> bool:
    """Return True if an argument names this test, its class or its function, not only its file."""
    return any(
        item.nodeid == name or item.nodeid.startswith((f"{name}::", f"{name}["))
        for name in (PurePath(argument).as_posix().removeprefix("./") for argument in named)
    )


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("all"):
        return "tier: all tests, slow ones too"
    if config.getoption("markexpr"):
        return f"tier: tests with the marks -m {config.getoption('markexpr')!r}"
    return "tier: fast tests; --all runs the slow ones too"
