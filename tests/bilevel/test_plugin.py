"""The pytest plugin, run in subprocesses: its checks, its report, and no effect on tests without the fixture."""

import os
import re
from pathlib import Path

import pytest

pytest_plugins = "pytester"
ROOT = Path(__file__).parents[2]

PROJECT = """
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

import bilevel as bl
from bilevel.testing import strategies


def fit(w, theta, data):
    return 0.5 * (w - data) ** 2 + 0.5 * jnp.exp(theta) * w**2


PROBLEM = bl.Problem(bl.Stationary(fit), lambda w, theta, data: w**2)
SOLVER = bl.GradientDescent(0.3, 200)


def wrong(problem, solver, theta, init, data):
    return -bl.Implicit(bl.CG(1))(problem, solver, theta, init, data).gradient


def test_before():
    assert jnp.zeros(()).dtype == jnp.float32


def test_right(hypergradient):
    assert jnp.zeros(()).dtype == jnp.float64
    hypergradient.assert_hypergradient(PROBLEM, 0.5, 0.0, 2.0, SOLVER, bl.Implicit(bl.CG(1)), against="dense")
    hypergradient.assert_condition(PROBLEM, 0.5, 2 / (1 + jnp.exp(0.5)), 2.0)


def test_wrong(hypergradient):
    hypergradient.assert_hypergradient(PROBLEM, 0.5, 0.0, 2.0, SOLVER, wrong, against="dense")


@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(case=strategies.quadratic_problems(sizes=(3,), conditions=(2.0,), w_layouts=("flat",), theta_layouts=("flat",)))
def test_drawn(hypergradient, case):
    hypergradient.assert_case(case)


@pytest.mark.parametrize("hypergradient", [1])
def test_a_parameter_of_that_name_is_not_the_fixture(hypergradient):
    assert jnp.zeros(()).dtype == jnp.float32


def test_after():
    assert jnp.zeros(()).dtype == jnp.float32
"""
STRICT = (
    "-p",
    "pytest_bilevel",
    "-p",
    "no:cacheprovider",
    "--strict-markers",
    "-W",
    "error",
    "--import-mode=importlib",
)


@pytest.fixture
def run(pytester, monkeypatch):
    """Return a function that runs pytest with the plugin and strict options in a temporary folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compilation takes most of the time
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this test itself may run in a worker of xdist
    return lambda *arguments: pytester.runpytest_subprocess(*STRICT, *arguments)


def rows(output):
    return re.findall(r"^  (ok|WRONG) +(\S+) +(\S+) +(\d+) +(.*)$", output, re.MULTILINE)


@pytest.mark.slow("runs pytest on a file of its own")
def test_right_and_wrong_methods_and_the_report(pytester, run):
    pytester.makepyfile(test_project=PROJECT)
    result = run("--hypergradient-report")
    result.assert_outcomes(passed=5, failed=1)
    output = result.stdout.str()
    assert "likely cause: the sign of the whole gradient is flipped" in output
    report = output[output.index("hypergradients checked") :]
    places = ["test_project.py::test_drawn", "test_project.py::test_right", "test_project.py::test_wrong"]
    assert re.findall(r"^test_project\S+$", report, re.MULTILINE) == places
    found = rows(report)
    assert len(found) == 6  # a case, a right gradient, the checks finite, residual and symmetry, a wrong gradient
    for verdict, error, rtol, _, _ in found:
        assert (float(error) <= float(rtol)) == (verdict == "ok")
    # Two examples with three comparisons each: solution, value and gradient.
    assert [int(count) for *_, count, rest in found if "closed form" in rest] == [6]
    assert [rest.split()[0] for verdict, *_, rest in found if verdict == "WRONG"] == ["wrong"]


@pytest.mark.slow("starts pytest with a worker of its own")
def test_the_report_includes_tests_in_processes_of_xdist(pytester, run):
    pytester.makepyfile(test_project=PROJECT)
    result = run("--hypergradient-report", "-n", "1", "-k", "wrong")
    result.assert_outcomes(failed=1)
    report = result.stdout.str().partition("hypergradients checked")[2]
    assert [(verdict, rest.split()[0]) for verdict, *_, rest in rows(report)] == [("WRONG", "wrong")]


def test_without_the_fixture_jax_is_not_imported_and_nothing_is_printed(pytester, run):
    pytester.makepyfile(
        test_light="""
        import sys
        import unittest

        def test_light():
            assert not {"jax", "bilevel", "hypothesis"} & set(sys.modules)

        class TestOld(unittest.TestCase):
            def test_old(self):
                pass
        """
    )
    result = run("-p", "no:hypothesispytest")
    result.assert_outcomes(passed=2)
    assert "hypergradients" not in result.stdout.str()
    reported = run("-p", "no:hypothesispytest", "--hypergradient-report")
    reported.stdout.fnmatch_lines(["*hypergradients checked*", "none: no test called an assertion of the fixture"])


def test_the_plugin_is_registered_under_its_own_name():
    """The entry point has the module's name, so that ``-p pytest_bilevel`` does not load the plugin twice."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"pytest_bilevel": "pytest_bilevel"}
    assert "pytest_bilevel.py" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
