"""Tests of a sweep: which combinations are trained, and that validation classes alone choose the best one."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_preset import dataset, tiny_preset

import imaml
from imaml import InputError
from imaml.datasets.images import ImageClasses
from imaml.runs import sweep as sweep_module
from imaml.runs.log import read_log
from imaml.runs.sweep import Sweep, Trial, presets_over
from imaml.settings.parts import Validation

PRESET = replace(tiny_preset(4), validation=Validation(every=2, tasks=8))


class Untouchable:
    """Test classes that fail the test if an attribute or the length is read."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} of the test classes was looked at")

    def __len__(self):
        raise AssertionError("the test classes were counted")


class WithoutTest:
    """A dataset with the test classes of :class:`Untouchable`."""

    name, test = "hidden", Untouchable()

    def __init__(self, pixels):
        self.train = dataset(pixels).train
        self.validation = ImageClasses(pixels, tuple(f"validation{i}" for i in range(len(pixels))))

    def fingerprint(self):
        return "f" * 64


@pytest.mark.slow("trains four runs")
def test_each_combination_is_trained_once_and_validation_chooses_the_best(tiny_pixels, tmp_path):
    data, steps, over = WithoutTest(tiny_pixels), [], {"inner.step_size": ["0.1", "0.2"], "strength": [0.1, 1]}

    def stop(progress):
        steps.append(progress.step)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)

    stopped = imaml.sweep(PRESET, over, tmp_path, dataset=data, on_progress=stop)
    assert stopped.stopped_by == signal.SIGINT and len(stopped.trials) == 2
    found = imaml.sweep(PRESET, over, tmp_path, dataset=data, on_progress=stop)
    assert len(steps) == 4 * 4 and found.stopped_by is None
    assert [trial.settings for trial in found.trials] == [
        {"inner.step_size": rate, "strength": strength} for rate in (0.1, 0.2) for strength in (0.1, 1.0)
    ]
    for trial in found.trials:
        validations = {p.step: p.validation for p in read_log(trial.directory) if p.validation is not None}
        assert list(validations) == [2, 4] and trial.value == max(validations.values()) == validations[trial.step]
        assert not (trial.directory / "result.json").exists()
        assert (trial.preset.inner.step_size, trial.preset.strength) == tuple(trial.settings.values())
    assert found.best.value == max(trial.value for trial in found.trials)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"inner.step_size={rate},strength={strength}" for rate in (0.1, 0.2) for strength in (0.1, 1.0)
    }


def trial(value, interval=0.01, failure=None, **settings):
    return Trial(settings, PRESET, Path("out/x"), value, interval, 4, 2.0, failure)


def test_the_table_lists_the_best_first_and_failures_last():
    trials = (trial(math.nan, math.nan, "diverged", strength=1.0), trial(0.5, strength=2.0), trial(0.7, strength=3.0))
    found = Sweep("tiny", "accuracy", trials)
    assert [t.settings["strength"] for t in found.ranked] == [3.0, 2.0, 1.0]
    lines = str(found).splitlines()
    assert "70.00% ± 1.00%" in lines[2] and "training failed" in lines[4]
    assert lines[-1] == "Best on validation: --strength 3.0. Test classes were not looked at."
    errors = Sweep("tiny", "mean squared error", (trial(0.5, strength=2.0), trial(0.49, strength=3.0)))
    assert errors.best.settings == {"strength": 3.0}
    assert "Its interval overlaps with those of 1 of 1 others." in str(errors)
    records = json.loads(json.dumps(found.records(), allow_nan=False))
    assert records["best"] == {"strength": 3.0} and records["trials"][2]["value"] is None
    assert Sweep("tiny", "accuracy", trials[:1]).best is None


def test_a_combination_that_diverges_is_a_failure_and_other_errors_end_the_sweep(tmp_path, monkeypatch):
    errors = [sweep_module.TrainingFailed("diverged"), InputError("no data")]

    def train(*arguments, **options):
        raise errors.pop(0)

    monkeypatch.setattr(sweep_module, "train", train)
    assert imaml.sweep(PRESET, {"strength": [1]}, tmp_path).trials[0].failure == "diverged"
    with pytest.raises(InputError, match="no data"):
        imaml.sweep(PRESET, {"strength": [1]}, tmp_path)


def test_a_preset_without_validation_is_validated_after_its_last_step_on_held_out_classes():
    bare = tiny_preset(7)
    [(_, chosen)] = presets_over(bare, {"strength": [2]})
    assert chosen.validation == Validation(every=7, held_out=0.1) and chosen.strength == 2.0
    [(_, chosen)] = presets_over(PRESET, {"strength": [2]})
    assert chosen.validation == PRESET.validation


def test_the_algorithm_is_chosen_before_the_settings_of_its_inner_loop():
    glyphs = imaml.preset("glyphs-5way-1shot-gd")
    found = presets_over(glyphs, {"inner.step_size": [0.3], "algorithm": ["imaml", "maml"]})
    assert [chosen.algorithm for _, chosen in found] == ["imaml", "maml"]
    assert all(chosen.inner.step_size == 0.3 for _, chosen in found)


@pytest.mark.parametrize(
    "over, message",
    [
        ({}, "needs a setting with values"),
        ({"strength": []}, "needs a setting with values"),
        ({"strenght": [1]}, "did you mean --strength"),
        ({"strength": [1, "1.0"]}, "is there twice"),
        ({"strength": [-1]}, "strength"),
        ({"outer.steps": [1, 2]}, "do not vary outer.steps"),
    ],
)
def test_settings_and_values_are_checked_before_any_training(over, message, tmp_path):
    with pytest.raises(InputError, match=message):
        imaml.sweep(PRESET, over, tmp_path)
    assert list(tmp_path.iterdir()) == []
