"""Two tiers of tests: ``pytest`` runs the fast tests, and ``pytest --all`` runs the slow ones too.

A mark makes a test slow and gives the reason. It may exempt some of the test's parameters, which stay fast:

    @pytest.mark.slow("compiles each projection to second order", fast="projection_box")

``fast`` is a pattern of parameter ids, as in ``fnmatch``, or a tuple of patterns. A slow test also runs if the command
line names it, as in ``pytest tests/test_file.py::test_name``, or if the option ``-m`` is given and selects it.
"""

import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePath

import pytest

SLOW_PAGES = {
    "docs/choosing.md": "compiles a damped solve of a network",
    "docs/moving/benchmark_bilevel.md": "runs a stochastic loop to its end",
    "docs/moving/higher.md": "unrolls long inner solves",
    "docs/moving/jaxopt.md": "runs the solvers of jaxopt next to ours",
    "docs/moving/learn2learn.md": "compiles the meta-gradients of two algorithms",
    "docs/moving/optimistix.md": "compiles solvers of three libraries",
    "docs/moving/torchopt.md": "compiles a layer for each section",
    "docs/own-data.md": "trains two small runs",
    "docs/own-network.md": "draws the parameters of modules of two libraries",
    "docs/own-loop.md": "compiles a step in several ways",
    "docs/own-solver.md": "compiles each way to differentiate a solver",
    "docs/trouble.md": "compiles a gradient for each fault and its remedy",
    "docs/start/define.md": "runs an outer loop to its end",
    "docs/start/imaml.md": "compiles the adaptation of a convolutional network",
    "docs/stochastic.md": "compiles several stochastic loops",
    "docs/testing.md": "checks several methods against every reference",
    "docs/which-method.md": "compiles ten methods",
}
"""The reason for each page whose doctests are slow, by the path relative to this folder. A page cannot have a mark."""

# Files whose doctests need an optional package, by the name of the package.
OPTIONAL = {
    "equinox": ["docs/own-network.md"],
    "flax": ["docs/own-network.md"],
    "lineax": ["bilevel/linear/from_lineax.py"],
    "optimistix": ["bilevel/solvers/from_optimistix.py", "docs/moving/optimistix.md"],
}
collect_ignore = [file for package, files in OPTIONAL.items() if find_spec(package) is None for file in files]


MANY_MAPPINGS = 10_000
"""The compiled programs are forgotten if the process has more memory mappings than this after a file of tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


@pytest.hookimpl(tryfirst=True)  # before pytest selects tests by the expression of -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unmatched: dict[tuple[str, str], bool] = {}
    for item in items:
        if isinstance(item, pytest.DoctestItem) and (reason := SLOW_PAGES.get(_file(item))):
            item.add_marker(pytest.mark.slow(reason))
        for mark in list(item.iter_markers("slow")):
            _check(item, mark)
            for pattern in _patterns(mark):
                key = item.nodeid.partition("[")[0], pattern
                matches = fnmatchcase(_parameters(item), pattern)
                unmatched[key] = unmatched.get(key, True) and not matches
                if matches and mark in item.own_markers:
                    item.own_markers.remove(mark)
    named = [argument for argument in config.args if "::" in argument]
    if lost := sorted(key for key, is_unmatched in unmatched.items() if is_unmatched and not named):
        raise pytest.UsageError("no parameter matches the pattern of a slow test: " + "; ".join(map(": ".join, lost)))
    # With -m, the expression alone decides whether slow tests run.
    if config.getoption("all") or config.getoption("markexpr"):
        return
    deselected = [item for item in items if item.get_closest_marker("slow") and not _is_named(item, named)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        dropped = set(map(id, deselected))
        items[:] = [item for item in items if id(item) not in dropped]


def _file(item: pytest.Item) -> str:
    return PurePath(item.path).relative_to(item.config.rootpath).as_posix()


def _parameters(item: pytest.Item) -> str:
    """Return the id of a test's parameters, or the empty string for a test without parameters."""
    return getattr(getattr(item, "callspec", None), "id", "")


def _patterns(mark: pytest.Mark) -> tuple[str, ...]:
    fast = mark.kwargs.get("fast", ())
    return (fast,) if isinstance(fast, str) else tuple(fast)


def _check(item: pytest.Item, mark: pytest.Mark) -> None:
    reason = mark.args[0] if len(mark.args) == 1 else None
    if not isinstance(reason, str) or not reason or set(mark.kwargs) - {"fast"}:
        raise pytest.UsageError(
            f'{item.nodeid}: a slow test says why, as in @pytest.mark.slow("the reason", fast="a parameter"); '
            f"got {mark.args} and {dict(mark.kwargs)}"
        )


def _is_named(item: pytest.Item, named: list[str]) -> bool:
    """Return True if one of the arguments ``named`` is the id of this test, its class or its function."""
    names = (PurePath(argument).as_posix().removeprefix("./") for argument in named)
    return any(item.nodeid == name or item.nodeid.startswith((f"{name}::", f"{name}[")) for name in names)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Forget the compiled programs after a file of tests, if the process has many memory mappings.

    Each program takes some memory mappings. Linux allows a process 65,530 of them (vm.max_map_count). The programs of
    all tests together take more, and the process is then killed in the middle of a test.
    """
    yield
    if "jax" in sys.modules and _mappings() > MANY_MAPPINGS:
        sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def forget_registrations() -> Iterator[None]:
    """Forget the datasets and presets that a test or an example has registered."""
    yield
    for module, names in (("imaml.datasets.registry", "_readers"), ("imaml.settings.published_presets", "_registered")):
        if module in sys.modules:
            getattr(sys.modules[module], names).clear()


def _mappings() -> int:
    """Return the number of memory mappings of this process, or 0 on a system that does not tell."""
    try:
        return len(Path("/proc/self/maps").read_bytes().splitlines())
    except OSError:
        return 0


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("all"):
        return "tier: all tests, slow ones too"
    if config.getoption("markexpr"):
        return f"tier: tests with the marks -m {config.getoption('markexpr')!r}"
    return "tier: fast tests; --all runs the slow ones too"
