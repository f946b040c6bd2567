"""Tests of ``imaml diagnose``, ``report``, ``compare`` and ``sweep``, and of ``imaml train --log``: options and output.

The functions that do the work have tests of their own. Here, stand-ins record how they are called.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import imaml
from imaml.arguments import parse
from imaml.cli import main
from imaml.reports import comparison, run_report
from imaml.runs import diagnosis
from imaml.runs import sweep as sweep_module
from imaml.runs.diagnosis import Bin, Calibration, Diagnosis
from imaml.runs.loggers import TensorBoard, WeightsAndBiases
from imaml.runs.sweep import Sweep, Trial

SINUSOID = imaml.preset("sinusoid-5shot-gd")


@pytest.fixture
def called(monkeypatch):
    """The recorded calls of stand-ins for ``report`` and ``sweep``, which do no work and return plausible results."""
    calls = []
    trial = Trial({"strength": 2.0}, SINUSOID, Path("out/strength=2.0"), 0.5, 0.1, 9, 3.0)

    def report(run, path, **options):
        calls.append((run, path, options))
        return path or run / "report.html"

    def sweep(*arguments, **options):
        calls.append((*arguments, options))
        options["on_event"]("[1/1] strength=2.0")
        return Sweep("sinusoid-5shot-gd", "mean squared error", (trial,))

    monkeypatch.setattr(run_report, "report", report)
    monkeypatch.setattr(sweep_module, "sweep", sweep)
    return calls


def test_diagnose_passes_its_options_on_and_prints_the_diagnosis(monkeypatch, capsys):
    calls = []
    evaluation = imaml.Evaluation("accuracy", 0.5, 0.1, 0.2, 40, "none")
    bins = (Bin(0.0, 0.5, 0, math.nan, math.nan), Bin(0.5, 1.0, 40, 0.75, 0.5))
    found = Diagnosis(evaluation, None, None, Calibration(0.25, 0.9, bins, 40))

    def diagnose(run, *, on_event, **options):
        calls.append((run, options))
        on_event("classes are left out")
        return found

    monkeypatch.setattr(diagnosis, "diagnose", diagnose)
    assert main(["diagnose", "runs/first"]) == 0
    assert capsys.readouterr().out == f"classes are left out\n{found}\n"
    words = ["--tasks", "40", "--data", "cards", "--last", "--part", "validation", "--quiet", "--json"]
    assert main(["diagnose", "runs/first", *words]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["run"], record["part"], record["adapted"]["value"]) == ("runs/first", "validation", 0.5)
    assert record["calibration"]["bins"][0]["accuracy"] is None and err == "classes are left out\n"
    default = {"tasks": 600, "data": None, "best": None, "part": "test"}
    given = {"tasks": 40, "data": "cards", "best": False, "part": "validation"}
    assert calls == [(Path("runs/first"), default), (Path("runs/first"), given)]


def test_report_prints_the_path_of_the_file(called, capsys):
    assert main(["report", "runs/first", "--tasks", "40", "--data", "cards"]) == 0
    assert capsys.readouterr().out == "report: runs/first/report.html\n"
    assert main(["report", "runs/first", "--out", "page.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "runs/first", "file": "page.html"}
    (run, path, options), (_, other, default) = called
    assert (run, path, other) == (Path("runs/first"), None, Path("page.html"))
    assert (options["tasks"], options["data"], default["tasks"], default["data"]) == (40, "cards", None, None)


def test_sweep_passes_the_preset_the_values_and_the_folder_on(called, capsys):
    words = ["sweep", "sinusoid-5shot-gd", "--over", "inner.step_size=0.001,0.002", "--over=strength=2", "--out", "out"]
    assert main([*words, "--meta-steps", "9", "--seed", "3"]) == 0
    chosen, over, folder, data, options = called[0]
    assert (chosen.outer.steps, chosen.seed, chosen.strength) == (9, 3, SINUSOID.strength)
    assert over == {"inner.step_size": ["0.001", "0.002"], "strength": ["2"]}
    assert (folder, data, options["dataset"]) == (Path("out"), None, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/1] strength=2.0 …" and lines[-1].startswith("Best on validation: --strength 2.0.")
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == {"strength": 2.0}


def test_a_sweep_is_described_by_a_toml_file_too(called, tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('out = "out"\nover = ["strength=1,2", "inner.step_size=0.001"]\nouter.steps = 7\n')
    assert main(["sweep", "sinusoid-5shot-gd", "--config", str(file)]) == 0
    assert called[0][1] == {"strength": ["1", "2"], "inner.step_size": ["0.001"]} and called[0][0].outer.steps == 7


@pytest.mark.parametrize("over", ["strength", "strength=", "=1", "strength=1,,2"])
def test_values_that_cannot_be_split_are_refused(over, capsys):
    assert main(["sweep", "--out", "out", "--over", over]) == 2
    assert "must be a setting and its values, such as strength=1,2" in capsys.readouterr().err


def test_compare_prints_the_chosen_form(monkeypatch, capsys):
    found = SimpleNamespace(table=lambda form: f"the table as {form}", records=lambda: {"runs": []})
    monkeypatch.setattr(comparison, "compare", lambda runs: found if runs == [Path("a"), Path("b")] else None)
    for options, printed in ((["--format", "markdown"], "the table as markdown\n"), ([], "the table as terminal\n")):
        assert main(["compare", "a", "b", *options]) == 0
        assert capsys.readouterr().out == printed
    for option in (["--format", "json"], ["--json"]):
        assert main(["compare", "a", "b", *option]) == 0
        assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_the_loggers_of_train_are_chosen_by_name():
    from imaml.cli import _loggers

    chosen = parse(["train", "--log", "tensorboard", "--log", "wandb", "--log", "tensorboard"])
    assert _loggers(chosen) == [TensorBoard(), WeightsAndBiases()] and _loggers(parse(["train"])) == []
    with pytest.raises(imaml.InputError, match="did you mean tensorboard"):
        parse(["train", "--log", "tensorbord"])


def test_the_last_checkpoint_and_the_best_one_are_chosen_on_the_command_line_and_in_a_file(tmp_path):
    assert [parse(["evaluate", "run", *option]).best for option in ([], ["--best"], ["--last"])] == [None, True, False]
    file = tmp_path / "last.toml"
    file.write_text("last = true\n")
    assert parse(["evaluate", "run", "--config", str(file)]).best is False
