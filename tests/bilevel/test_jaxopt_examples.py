"""The examples in examples/from_jaxopt/ have the outer values of the same programs in jaxopt, in no more lines."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the data of the examples are part of scikit-learn")
pytest.importorskip("flax", reason="two examples train networks of Flax")
from benchmarks import code_lines
from benchmarks.jaxopt_examples import __main__ as comparison

LINES = {"ridge": 47, "lasso": 54, "svm_dual": 77, "equilibrium": 192, "distillation": 41, "sinusoids": 188}
"""Lines of code of jaxopt's examples at its last commit, 2de13bf, counted by benchmarks/code_lines.py."""


def test_every_example_exists_and_is_no_longer_than_jaxopts():
    files = {path.stem: path for path in (comparison.ROOT / "examples" / "from_jaxopt").glob("*.py")}
    assert set(files) == set(LINES) == set(comparison.THEIRS)
    for name, path in files.items():
        assert code_lines.count(path.read_text()) <= LINES[name], name


# Relative tolerances. The two libraries solve the dual of the SVM by different variants of FISTA. The networks of the
# last two examples amplify rounding errors.
TOLERANCES = {
    "ridge": 1e-5, "lasso": 1e-5, "svm_dual": 1e-3, "distillation": 1e-4, "sinusoids": 1e-2, "equilibrium": 1e-2,
}  # fmt: skip


@pytest.mark.slow("trains a model twice, by each library")
@pytest.mark.parametrize("name", TOLERANCES)
def test_the_outer_values_are_those_of_jaxopt(name):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        ours, theirs, *_ = comparison.programs(name).values()
        found, expected = np.asarray(ours()), np.asarray(theirs())
    assert np.all(np.isfinite(found)) and len(found) == len(expected)
    np.testing.assert_allclose(found[:5], expected[:5], rtol=TOLERANCES[name])
    if name != "sinusoids":  # here each value is a loss on different tasks, so the last one may be larger
        assert found[-1] < found[0]


def test_lines_of_code_are_those_that_hold_statements(tmp_path):
    source = Path(code_lines.__file__).read_text()
    program = ast.parse(source)
    docstrings = {
        line
        for node in ast.walk(program)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    expected = sum(
        1
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in docstrings
    )
    assert code_lines.count(source) == expected > 30

    notebook = tmp_path / "notebook.md"
    first = "```{code-cell}\n:id: a\n\n%pip install x\nx = 1\n```\n"
    notebook.write_text(f"text\n{first}\n```{{code-cell}} ipython3\n---\nid: b\n---\n# c\ny = 2\n```\n")
    assert code_lines.count(code_lines.code_of(notebook)) == 2
