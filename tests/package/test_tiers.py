"""The fast and the slow tier: which tests run by default, what a slow mark needs, and a fast test in each file."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = "pytester"
ROOT = Path(__file__).parents[2]

PROJECT = """
import pytest


def test_quick():
    pass


@pytest.mark.slow("it sleeps")
@pytest.mark.parametrize("value", [1, 2])
def test_sleeps(value):
    pass


@pytest.mark.slow("each value takes long", fast=("quick-*", "three"))
@pytest.mark.parametrize("value", ["quick-one", "two", "three", "four"])
def test_values(value):
    pass


@pytest.mark.parametrize("value", [1, pytest.param(2, marks=pytest.mark.slow("two takes longer"))])
def test_one_value(value):
    pass


@pytest.mark.slow("each one sleeps")
class TestGroup:
    def test_one(self):
        pass

    def test_other(self):
        pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs pytest on PROJECT with this repository's conftest.py."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-xdist may run this test itself in a worker
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\nmarkers = ['slow(reason): takes long']\n")
    pytester.makepyfile(test_project=PROJECT)
    options = ("-p", "no:cacheprovider", "-p", "no:pytest_bilevel", "-p", "no:hypothesispytest", "--strict-markers")
    return lambda *arguments: pytester.runpytest_inprocess(*options, *arguments)


@pytest.mark.parametrize(
    "arguments, passed, deselected",
    [
        ((), 4, 7),
        (("--all",), 11, 0),
        (("-m", "slow"), 7, 4),
        (("-m", "not slow"), 4, 7),
        (("test_project.py",), 4, 7),
        (("test_project.py::test_sleeps",), 2, 0),
        (("./test_project.py::test_values",), 4, 0),
        (("test_project.py::test_sleeps[2]",), 1, 0),
        (("test_project.py::test_values[two]",), 1, 0),
        (("test_project.py::TestGroup",), 2, 0),
        (("test_project.py::TestGroup::test_one", "test_project.py::test_quick"), 2, 0),
        (("-k", "sleeps or quick"), 2, 9),
    ],
)
def test_which_tests_run(arguments, passed, deselected, run):
    run(*arguments).assert_outcomes(passed=passed, deselected=deselected)


def test_the_workers_of_xdist_run_the_same_tests(run):
    run("-n", "1").assert_outcomes(passed=4)
    run("-n", "1", "--all").assert_outcomes(passed=11)


def test_each_run_names_its_tier(run):
    run().stdout.fnmatch_lines(["tier: fast tests; --all runs the slow ones too"])
    run("--all").stdout.fnmatch_lines(["tier: all tests, slow ones too"])


@pytest.mark.parametrize(
    "mark", ["slow", "slow()", "slow('')", "slow(reason='it sleeps')", "slow(3)", "slow('it sleeps', quick='1')"]
)
def test_a_slow_test_without_a_reason_is_an_error(mark, pytester, run):
    pytester.makepyfile(test_other=f"import pytest\n\n@pytest.mark.{mark}\ndef test_it():\n    pass\n")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_other.py::test_it: a slow test says why*"])


def test_a_pattern_that_no_parameter_matches_is_an_error(pytester, run):
    body = "@pytest.mark.parametrize('value', ['one', 'two'])\ndef test_it(value):\n    pass\n"
    pytester.makepyfile(test_other=f"import pytest\n\n@pytest.mark.slow('it sleeps', fast='three')\n{body}")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no parameter matches the pattern of a slow test: test_other.py::test_it: three"])
    run("test_other.py::test_it").assert_outcomes(passed=2)


def test_each_slow_page_exists():
    assert all((ROOT / page).is_file() for page in runpy.run_path(str(ROOT / "conftest.py"))["SLOW_PAGES"])


def functions(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield the name of each test of a module, and whether a mark of the test or of its class makes all cases slow."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name.startswith("test"):
                    yield f"{node.name}::{inner.name}", is_slow(node) or is_slow(inner)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield node.name, is_slow(node)


def is_slow(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Return True if a mark makes all cases of a test or class slow."""
    decorators = map(ast.unparse, node.decorator_list)
    return any(text.startswith("pytest.mark.slow(") and "fast=" not in text for text in decorators)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_has_a_fast_test(path):
    tree = ast.parse(path.read_text())
    marks = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    assert "mark.slow" not in "".join(map(ast.unparse, marks)), "mark tests or classes, not a whole file"
    found = dict(functions(tree))
    assert not all(found.values()), f"all tests of this file are slow: {sorted(found)}"


def test_contributing_lists_every_slow_test_with_its_reason():
    module = runpy.run_path(str(Path(__file__).with_name("slow_tests.py")))
    assert module["listed"]() == module["slow_tests"]()
