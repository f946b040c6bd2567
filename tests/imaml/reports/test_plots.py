"""Tests of the learning curve, which is drawn from a run's files without importing JAX."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from imaml.reports.plots import PICTURE, learning_curve
from imaml.runs.log import LogWriter, Progress, read_log

REDUCTIONS = {"query batch": 0.0, "support set": 0.1}
PACKAGE = Path(__file__).resolve().parents[3] / "imaml"


def write_log(directory, steps, linear_residual=1e-2, regression=False):
    with LogWriter(directory, 0) as log:
        for step in range(1, steps + 1):
            accuracy = None if regression else 1 - 0.8 / step
            log.write(Progress(step, steps, 1.6 / step, accuracy, 4, 0.1, linear_residual, {}, float(step)))


def write_result(directory):
    evaluations = [
        {"value": 0.8 - reduction, "interval": 0.02, "normalisation": name} for name, reduction in REDUCTIONS.items()
    ]
    (directory / "result.json").write_text(json.dumps({"evaluations": evaluations}))


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("steps, evaluated", [(1, False), (120, True)])
def test_a_run_of_any_length_gives_one_picture_of_moderate_size(steps, evaluated, tmp_path):
    write_log(tmp_path, steps)
    if evaluated:
        write_result(tmp_path)
    path = learning_curve(tmp_path, ways=5)
    assert path == tmp_path / PICTURE
    width, height = png_size(path)
    assert 1000 <= width <= 3000 and 300 <= height <= 1500
    assert 10_000 < path.stat().st_size < 1_000_000
    assert [other.name for other in tmp_path.glob("*.png")] == [PICTURE]


@pytest.mark.parametrize("regression", [False, True])
def test_the_validations_are_drawn_with_their_intervals(regression, tmp_path, monkeypatch):
    drawn = []
    errorbar = Axes.errorbar

    def recorded(axes, *data, **style):
        drawn.append((*data, style["label"]))
        return errorbar(axes, *data, **style)

    write_log(tmp_path, 40, regression=regression)
    monkeypatch.setattr(Axes, "errorbar", recorded)
    before = learning_curve(tmp_path, None if regression else 5).read_bytes()
    assert drawn == []
    entries = read_log(tmp_path)
    with LogWriter(tmp_path, 0) as log:
        for entry in entries:
            validated = {"validation": 0.5 + entry.step / 100, "validation_interval": 0.04}
            log.write(replace(entry, **validated) if entry.step % 20 == 0 else entry)
    assert learning_curve(tmp_path, None if regression else 5).read_bytes() != before
    label = "validation curves" if regression else "validation classes"
    assert drawn == [([20, 40], [0.7, 0.9], [0.04, 0.04], label)]
    write_result(tmp_path)  # the evaluation is drawn at the step of the best validation
    result = json.loads((tmp_path / "result.json").read_text()) | {"validation": {"step": 20, "value": 0.7}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    learning_curve(tmp_path, None if regression else 5)
    assert [each[0] for each in drawn[2:]] == [20, 20]


def test_a_run_without_a_log_still_gets_a_picture(tmp_path):
    write_result(tmp_path)
    assert png_size(learning_curve(tmp_path, ways=5))


def test_a_longer_log_changes_the_picture(tmp_path):
    write_log(tmp_path, 5)
    before = learning_curve(tmp_path, ways=5).read_bytes()
    write_log(tmp_path, 50)
    assert learning_curve(tmp_path, ways=5).read_bytes() != before


def test_a_log_with_linear_residuals_of_zero_can_be_drawn(tmp_path):
    write_log(tmp_path, 10, linear_residual=0.0)
    png_size(learning_curve(tmp_path, ways=5))


@pytest.mark.slow("draws a picture")
def test_the_result_of_an_earlier_version_is_drawn(tmp_path):
    write_log(tmp_path, 10)
    without = learning_curve(tmp_path, ways=5).read_bytes()
    (tmp_path / "result.json").write_text(json.dumps({"evaluation": {"accuracy": 0.8, "interval": 0.02}}))
    assert learning_curve(tmp_path, ways=5).read_bytes() != without


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_regression_is_drawn_without_an_accuracy(evaluated, tmp_path):
    write_log(tmp_path, 10, regression=True)
    if evaluated:
        found = {"value": 0.8, "interval": 0.02, "normalisation": "none"}
        (tmp_path / "result.json").write_text(json.dumps({"evaluations": [found]}))
    width, height = png_size(learning_curve(tmp_path, ways=None))
    assert width < 1200 and 300 <= height <= 1500


def test_the_module_imports_neither_jax_nor_matplotlib():
    # An empty package replaces imaml/__init__.py, so that only the imports of this module count.
    code = f"""
import sys, types
package = types.ModuleType("imaml")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["imaml"] = package
import imaml.reports.plots
sys.exit(", ".join({{"jax", "jaxlib", "bilevel", "matplotlib"}} & set(sys.modules)) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
