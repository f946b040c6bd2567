"""Tests of validation during training, of extended runs, and of runs that start from trained parameters."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import PRESET, STEPS, assert_equal_states, contents, dataset, saved_state, stop_at, train

import imaml
from imaml import InputError
from imaml.datasets.images import ImageDataset
from imaml.datasets.splits import held_out
from imaml.runs import checkpoints, training
from imaml.runs import data as run_data
from imaml.runs import log as runlog
from imaml.runs.evaluation import evaluate_classes, trained
from imaml.runs.folder import RESULT
from imaml.runs.validation import Selection, Validator
from imaml.settings.parts import Validation
from imaml.settings.saved import completed, with_config

pytestmark = pytest.mark.usefixtures("traces")

VALIDATED = replace(PRESET, validation=Validation(every=2, tasks=8, held_out=0.25))


@pytest.fixture(scope="module")
def validated(tmp_path_factory, traces):
    """An uninterrupted run with validation."""
    return train(tmp_path_factory.mktemp("validated"), VALIDATED)


def with_steps(preset, steps):
    return replace(preset, outer=replace(preset.outer, steps=steps))


def validations(directory):
    return {entry.step: entry.validation for entry in runlog.read_log(directory) if entry.validation is not None}


# --- Settings ------------------------------------------------------------------------------------------------------


def test_a_preset_without_validation_has_the_settings_and_types_of_earlier_versions():
    assert "validation" not in PRESET.config() and "validation" not in VALIDATED.types()
    assert VALIDATED.config()["validation"] == {"every": 2, "tasks": 8, "patience": 0, "held_out": 0.25}
    assert completed(VALIDATED, PRESET.config()) == PRESET.config()
    assert with_config(VALIDATED, PRESET.config(), PRESET.types()) == PRESET
    assert with_config(PRESET, VALIDATED.config(), VALIDATED.types()) == VALIDATED
    partly = VALIDATED.config() | {"validation": {"every": 2}}
    assert with_config(PRESET, partly).validation == Validation(every=2)


@pytest.mark.parametrize("field, value", [("every", -1), ("tasks", 1), ("patience", -1), ("held_out", 1.0)])
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=f"validation.{field} must be .* got {value}"):
        Validation(**{field: value})


def test_patience_without_validation_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"need validation\.every, which is 0"):
        train(tmp_path / "run", replace(PRESET, validation=Validation(patience=2)))
    assert not (tmp_path / "run").exists()


# --- The classes ---------------------------------------------------------------------------------------------------


def test_held_out_training_classes_are_validated_on_and_not_trained_on(tiny_pixels):
    data = dataset(tiny_pixels)
    parts = {part: run_data.usable(VALIDATED, data, part) for part in ("train", "validation", "test")}
    remaining, held = held_out(12, 0.25)
    assert len(held) == 3 and sorted(remaining + held) == list(range(12))
    assert parts["validation"].labels == tuple(f"train{index}" for index in held)
    np.testing.assert_array_equal(parts["train"].pixels, tiny_pixels[remaining])
    assert parts["test"].labels == data.test.labels
    own = replace(data, validation=replace(data.test, labels=tuple(f"validation{index}" for index in range(12))))
    assert run_data.usable(VALIDATED, own, "validation") is own.validation
    assert run_data.usable(VALIDATED, own, "train") is data.train


def test_held_out_classes_of_uneven_size_keep_their_images():
    labels = np.repeat(np.arange(10), np.arange(1, 11))
    images = np.broadcast_to(labels[:, None, None].astype(np.uint8), (len(labels), 2, 2))
    data = ImageDataset.from_arrays(images, labels, split={"train": range(9), "test": [9]})
    remaining, held = (data.train.subset(indices) for indices in held_out(9, 1 / 3))
    for part in (remaining, held):
        values = [np.unique(pixels) for pixels in np.split(part.pixels, np.cumsum(part.counts)[:-1])]
        assert [[str(value) for value in each] for each in values] == [[label] for label in part.labels]
        assert part.counts == tuple(int(label) + 1 for label in part.labels)
    assert len(held) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        (Validation(every=1), r"tiny has no validation classes: .* --validation\.held_out 0\.1"),
        (Validation(every=1, held_out=0.01), r"held_out=0\.01 of the 12 training classes of tiny are 0 classes"),
        (Validation(every=1, held_out=0.08), "2 ways are more than the 1 classes of tiny's validation set"),
    ],
)
def test_validation_classes_that_are_missing_or_too_few_are_refused_before_training(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", replace(PRESET, validation=settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow("compiles two evaluations")
def test_sinusoids_are_validated_on_other_tasks_than_the_test_tasks():
    preset = imaml.preset("sinusoid-5shot-gd")
    theta = preset.functions.init(preset.keys.init)
    data = imaml.datasets.sinusoid.load()
    test, validation = (evaluate_classes(theta, preset, part, 20) for part in (data.test, data.validation))
    assert test.value != validation.value and data.test == data.train


# --- A run with validation -----------------------------------------------------------------------------------------


@pytest.mark.slow("trains and evaluates a run")
def test_the_log_has_the_accuracy_that_an_evaluation_of_the_validation_classes_gives(validated):
    found = validations(validated.directory)
    assert list(found) == [2, 4, 6]
    best = max(found, key=lambda step: (found[step], -step))
    assert (validated.best_step, validated.step, validated.finished) == (best, STEPS, True)
    assert found[best] == imaml.evaluate(validated, part="validation", tasks=8).value
    entry = runlog.read_log(validated.directory)[best - 1]
    assert entry.validation_interval == imaml.evaluate(validated, part="validation", tasks=8).interval
    assert "validation" not in (validated.directory / runlog.FILE).read_text().splitlines()[0]


@pytest.mark.slow("trains a run with validation")
def test_the_best_validation_gives_the_parameters_of_the_run_and_of_its_folder(validated, tmp_path):
    chosen = trained(validated.directory)
    assert (chosen.step, chosen.description["validation"]["step"]) == (validated.best_step, validated.best_step)
    assert_equal_states(chosen.restore(saved_state(validated.directory)).theta, validated.theta)
    assert_equal_states(imaml.load(validated.directory, VALIDATED).theta, validated.theta)
    assert trained(validated.directory, best=False).step == STEPS
    result = json.loads((validated.directory / RESULT).read_text())
    assert result["meta_steps"] == STEPS and result["validation"]["step"] == validated.best_step
    assert imaml.evaluate(validated.directory, VALIDATED, tasks=4) == validated.evaluation


@pytest.mark.slow("trains a run with validation")
def test_a_stopped_run_with_validation_resumes_to_the_same_numbers(validated, tmp_path):
    train(tmp_path, VALIDATED, on_progress=stop_at(3))
    resumed = train(tmp_path, VALIDATED)
    assert (resumed.best_step, resumed.evaluation) == (validated.best_step, validated.evaluation)
    assert validations(tmp_path) == validations(validated.directory)
    assert_equal_states(resumed.theta, validated.theta)
    assert (
        checkpoints.newest(tmp_path).description["validation"]
        == checkpoints.newest(validated.directory).description["validation"]
    )


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that sets the accuracies of the validations to those of a list, whatever θ is."""

    def script(accuracies):
        def validated(validator, progress, theta):
            step = progress.step
            return replace(progress, validation=accuracies[step - 1], validation_interval=0.0)

        monkeypatch.setattr(Validator, "validated", validated)

    return script


EARLY = replace(VALIDATED, validation=Validation(every=1, tasks=8, held_out=0.25, patience=2))


@pytest.mark.slow("trains three runs")
@pytest.mark.parametrize("stop", [None, 3], ids=["uninterrupted", "resumed"])
def test_a_run_stops_early_after_enough_validations_without_a_better_one(stop, tmp_path, scripted):
    scripted([0.5, 0.7, 0.7, 0.6, 0.9, 0.9])
    if stop:
        train(tmp_path, EARLY, on_progress=stop_at(stop))
    run = train(tmp_path, EARLY)
    assert (run.step, run.best_step, run.finished, run.evaluation is None) == (4, 2, True, False)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [
        f"checkpoint-{step:08}.npz" for step in sorted({2, stop or 2, 4})
    ]
    best = checkpoints.best(tmp_path)
    assert best.step == 2
    assert_equal_states(run.theta, best.restore(saved_state(tmp_path)).theta)
    again = train(tmp_path, EARLY)
    assert (again.step, again.finished, again.evaluation) == (4, True, run.evaluation)
    assert_equal_states(again.theta, run.theta)
    # An extended run continues although it had stopped early, and counts its validations without a better one from 0.
    longer = train(tmp_path, with_steps(EARLY, STEPS + 1), on_progress=stop_at(5))
    assert (longer.step, longer.best_step) == (5, 5)


@pytest.mark.slow("trains a run")
def test_a_damaged_best_checkpoint_is_reported(tmp_path, scripted):
    scripted([0.9, 0.7, 0.7, 0.6, 0.5, 0.4])
    train(tmp_path, VALIDATED)
    (tmp_path / "checkpoint-00000001.npz").write_bytes(b"")
    messages = []
    assert trained(tmp_path, on_event=messages.append).step == STEPS
    assert "after meta-step 1, which had the best validation, is missing or damaged" in messages[0]


def test_the_first_of_two_equal_validations_is_the_best_and_nan_is_the_worst():
    def last(values, metric):
        selection = Selection()
        for step, value in enumerate(values, 1):
            selection = selection.after(step, value, metric)
        return selection

    assert last([0.5, 0.8, 0.8, math.nan], "accuracy") == Selection(2, 0.8, 2)
    assert last([math.nan, math.nan, 3.0, 2.0, 4.0], "mean squared error") == Selection(4, 2.0, 1)
    assert last([], "accuracy").step == 0


# --- Extended runs -------------------------------------------------------------------------------------------------


@pytest.mark.slow("compiles the meta-step for a shorter run")
@pytest.mark.parametrize("stop", [None, 2], ids=["finished", "stopped"])
def test_an_extended_run_with_a_constant_rate_equals_a_longer_run(stop, uninterrupted, tmp_path):
    messages = []
    train(tmp_path, with_steps(PRESET, 4), on_progress=stop_at(stop) if stop else lambda progress: None)
    extended = train(tmp_path, on_warning=messages.append)
    assert (extended.step, extended.evaluation) == (STEPS, uninterrupted.run.evaluation)
    assert_equal_states(saved_state(tmp_path), saved_state(uninterrupted.run.directory))
    assert f"extended after {stop or 4} meta-steps, from 4 to 6" in messages[0]
    entry = {"step": stop or 4, "from": 4, "to": STEPS}
    assert checkpoints.newest(tmp_path).description["extended"] == [entry]
    assert json.loads((tmp_path / RESULT).read_text())["extended"] == [entry]
    earlier = tmp_path / "result-00000004.json"
    assert earlier.exists() == (stop is None)
    assert stop or json.loads(earlier.read_text())["config"]["outer"]["steps"] == 4
    train(tmp_path)  # the extension is recorded once, and stays in the folder
    assert checkpoints.newest(tmp_path).description["extended"] == [entry]


@pytest.mark.slow("compiles the meta-step for two lengths")
def test_the_rate_of_an_extended_run_is_that_of_a_run_of_the_new_length(tmp_path):
    """The first step after the extension has the rate of the longer cosine schedule, which is not 0 at that step."""
    falling = replace(PRESET, outer=replace(PRESET.outer, steps=4, final_fraction=0.0))
    train(tmp_path, falling)
    before = saved_state(tmp_path).theta
    train(tmp_path, with_steps(falling, 8), on_progress=stop_at(5))
    after = checkpoints.newest(tmp_path).restore(saved_state(tmp_path)).theta
    largest = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    rate = PRESET.outer.learning_rate * 0.5 * (1 + math.cos(math.pi * 4 / 8))
    assert 0.3 * rate < largest < 3 * rate


@pytest.mark.slow("trains a run")
def test_a_shorter_run_or_another_setting_is_no_extension(tmp_path):
    train(tmp_path, with_steps(PRESET, 2))
    before = contents(tmp_path)
    others = (with_steps(PRESET, 1), replace(with_steps(PRESET, 4), seed=1))
    for other in others:
        with pytest.raises(InputError, match="holds a run with other settings"):
            train(tmp_path, other)
    assert contents(tmp_path) == before


# --- Runs that start from trained parameters -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "folder", "file", "learner", "parameters"])
def test_a_run_starts_from_trained_parameters_with_a_new_optimiser(kind, uninterrupted, tmp_path, monkeypatch):
    source = uninterrupted.run
    file = tmp_path / "theta.npz"
    imaml.load(source).save(file)
    starts = {
        "run": source, "folder": source.directory, "file": file, "learner": imaml.load(source),
        "parameters": source.theta,
    }  # fmt: skip
    seen = []
    monkeypatch.setattr(training, "_steps", lambda preset, mesh, state, *rest: seen.append(state) or [])
    run = train(tmp_path / "run", start=starts[kind])
    assert_equal_states(seen[0].theta, source.theta)
    assert run.step == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(seen[0].optimizer))


@pytest.mark.slow("trains two runs")
def test_a_fine_tuned_run_records_its_start_and_resumes_only_with_it(uninterrupted, tmp_path):
    source = uninterrupted.run.directory
    folder = tmp_path / "tuned"
    train(folder, start=source, on_progress=stop_at(1))
    described = checkpoints.newest(folder).description["start"]
    assert described["from"] == str(source) and described["step"] == STEPS and len(described["sha256"]) == 64
    assert described["data"] == checkpoints.newest(source).description["data"]
    other = jax.tree.map(lambda leaf: leaf + 1, uninterrupted.run.theta)
    for wrong in (None, other):
        with pytest.raises(InputError, match=f"holds a run that started from {source}: resume it with the same start="):
            train(folder, start=wrong)
    with pytest.raises(InputError, match="whose initial parameters were drawn at random: resume it without start="):
        train(source, start=other)
    run = train(folder, start=uninterrupted.run.theta)  # the same parameters from another place
    assert json.loads((folder / RESULT).read_text())["start"] == described
    whole = train(tmp_path / "whole", start=source)
    assert_equal_states(run.theta, whole.theta)
    assert run.evaluation == whole.evaluation
    assert not np.array_equal(jax.tree.leaves(run.theta)[0], jax.tree.leaves(uninterrupted.run.theta)[0])


def test_a_start_that_does_not_fit_the_network_is_refused(tmp_path):
    theta = {"layer0": {"kernel": np.zeros((3, 3), np.float32)}}
    with pytest.raises(InputError, match="the arrays in parameters do not fit the network of tiny"):
        train(tmp_path / "run", start=theta)
    with pytest.raises(InputError, match="there is no run in"):
        train(tmp_path / "run", start=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow("compiles the meta-step for other data")
def test_a_start_that_may_know_the_test_classes_is_reported(uninterrupted, tmp_path, tiny_pixels):
    other = dataset(tiny_pixels[:, :5])
    messages = []
    first = train(tmp_path / "first", dataset=other, on_progress=stop_at(1))
    assert first.step == 1
    train(
        tmp_path / "second",
        start=first,
        dataset=dataset(tiny_pixels),
        on_progress=stop_at(1),
        on_warning=messages.append,
    )
    assert "trained on other data that are called tiny too" in messages[0]
