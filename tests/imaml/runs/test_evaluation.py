"""Evaluation: scores equal those of an adaptation written out here, and wrong arguments are refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_preset import TinyMLP
from tiny_run import EVALUATION_TASKS, PRESET, STEPS, contents, dataset, train

import bilevel as bl
import imaml
from imaml import InputError, datasets
from imaml.datasets import sinusoid
from imaml.datasets.omniglot_alphabets import SPLITS
from imaml.learning.tasks import Episode
from imaml.runs import checkpoints, evaluation
from imaml.runs import folder as runfolder
from imaml.runs import log as runlog
from imaml.runs.meta_step import initial_state
from imaml.settings.parts import Conv4

pytestmark = pytest.mark.usefixtures("traces")


@pytest.mark.slow("trains a regression to its end")
def test_a_regression_is_trained_logged_and_evaluated_by_its_squared_error(tmp_path):
    preset = imaml.preset("sinusoid-5shot-gd")
    outer = replace(preset.outer, steps=3, tasks=4, queries=5, at_once=2)
    preset = replace(preset, inner=bl.GradientDescent(0.01, 2), linear=bl.CG(1), outer=outer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: sinusoid.load(data))
        run = train(tmp_path, preset)
        found = run.evaluation
        assert imaml.evaluate(tmp_path, tasks=EVALUATION_TASKS) == run.evaluation
    assert (found.metric, found.normalisation, found.chance) == ("mean squared error", "none", None)
    assert np.isnan(found.accuracy) and found.value > 0.01
    assert str(found) == f"test mean squared error {found.value:.3f} ± {found.interval:.3f} on 4 tasks"
    log = runlog.read_log(tmp_path)
    assert len(log) == 3 and all(entry.accuracy is None and entry.loss > 0 for entry in log)
    result = json.loads((tmp_path / runfolder.RESULT).read_text())
    assert result["evaluations"] == found.records() and result["config"]["algorithm"] == "imaml"
    # Compute the error here: on each of the same tasks, take two gradient steps on the loss plus the proximal term.
    apply = preset.learner.apply

    @jax.jit
    def error(key):
        task = preset.episode.sample((), key)
        phi = run.theta
        for _ in range(2):
            slope = jax.grad(lambda w: jnp.mean((apply(w, task.support_x) - task.support_y) ** 2))(phi)
            phi = jax.tree.map(lambda w, s, c: w - 0.01 * (s + preset.strength * (w - c)), phi, slope, run.theta)
        return jnp.mean((apply(phi, task.query_x) - task.query_y) ** 2)

    errors = [error(key) for key in jax.random.split(preset.keys.test, EVALUATION_TASKS)]
    assert found.value == pytest.approx(np.mean(errors), rel=1e-4)


def save_checkpoint(folder, preset, state):
    description = {
        "preset": preset.name,
        "config": preset.config(),
        "types": preset.types(),
        "data": "",
        "versions": {},
    }
    checkpoints.save(folder, STEPS, state, description)


@pytest.mark.slow("refuses many evaluations for each split", fast="omniglot-omniglot-alphabets")
@pytest.mark.parametrize("trained, other", [SPLITS, SPLITS[::-1]])
def test_a_run_on_one_split_of_omniglot_is_not_evaluated_on_the_other(trained, other, tmp_path, tiny_pixels):
    preset = replace(PRESET, dataset=trained)
    state = initial_state(preset)
    save_checkpoint(tmp_path, preset, state)
    run = imaml.Run(tmp_path, preset, state.theta, STEPS, True, None, None)
    message = f"{tmp_path} was trained on {trained}, and {other} splits the same characters in another way: many "
    for what in (tmp_path, run):
        for chosen in (other, replace(dataset(tiny_pixels), name=other)):
            with pytest.raises(InputError, match=message):
                imaml.evaluate(what, preset, EVALUATION_TASKS, dataset=chosen)
        with pytest.raises(InputError, match=message):
            imaml.evaluate(what, replace(preset, dataset=other), EVALUATION_TASKS)
    with pytest.raises(InputError, match=message):
        imaml.diagnose(tmp_path, preset, EVALUATION_TASKS, dataset=other)


@pytest.mark.slow("trains a run from a checkpoint")
@pytest.mark.parametrize("trained, other", [SPLITS, SPLITS[::-1]])
def test_a_start_from_the_other_split_of_omniglot_is_reported(trained, other, tmp_path, tiny_pixels):
    preset, messages = replace(PRESET, dataset=trained), []
    (tmp_path / "first").mkdir()
    save_checkpoint(tmp_path / "first", preset, initial_state(preset))
    data = replace(dataset(tiny_pixels), name=other)
    train(tmp_path / "second", start=tmp_path / "first", dataset=data, evaluation_tasks=0, on_warning=messages.append)
    (message,) = messages
    assert f"was trained on {trained}, which splits the same characters in another way" in message
    assert f"test characters of {other} are among its training characters" in message


@pytest.mark.slow("compiles the evaluation for two normalisations")
def test_both_normalisations_are_evaluated_and_named(tiny_pixels):
    preset = replace(imaml.preset("glyphs-5way-1shot-gd"), network=Conv4(filters=2), inner=bl.GradientDescent(0.1, 1))
    preset = replace(preset, episode=Episode(ways=3, shots=1, queries=2))
    theta = initial_state(preset).theta
    found = imaml.evaluate(theta, preset, tasks=EVALUATION_TASKS)
    batch, support = found.each
    assert (found.accuracy, found.beside) == (batch.accuracy, support) and str(found) == f"{batch}\n{support}"
    assert (batch.normalisation, support.normalisation) == ("query batch", "support set")
    assert str(batch).endswith("batch normalisation over the query batch, as published (transductive)")
    assert str(support).endswith("batch normalisation by the support set's statistics")
    pixels, network = jnp.asarray(dataset(tiny_pixels).test.pixels), preset.functions

    @jax.jit
    def accuracies(key):
        task = preset.episode.sample(pixels, key)
        phi = preset.learner.adapt(theta, task).w
        together = network.apply(phi, task.query_x)
        # With the support set's statistics, a query image alone must give the same outputs as in a batch.
        one_by_one = jax.lax.map(
            lambda image: network.apply_with_support_statistics(phi, image[None], task.support_x)[0], task.query_x
        )
        return jnp.stack([jnp.mean(outputs.argmax(-1) == task.query_y) for outputs in (together, one_by_one)])

    expected = [accuracies(key) for key in jax.random.split(preset.keys.test, EVALUATION_TASKS)]
    np.testing.assert_allclose([batch.value, support.value], np.mean(expected, 0), atol=1e-6)


def test_a_run_is_not_evaluated_on_other_data_than_its_own(uninterrupted, tiny_pixels, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: dataset(tiny_pixels ^ 1))
    with pytest.raises(InputError, match="was trained on other data"):
        imaml.evaluate(uninterrupted.run.directory, PRESET, EVALUATION_TASKS)


def test_the_interval_is_the_95_percent_interval_of_the_mean(uninterrupted, tiny_pixels):
    classes = dataset(tiny_pixels).test
    keys = jax.random.split(PRESET.keys.test, EVALUATION_TASKS)
    scores = jax.jit(evaluation.task_scores(PRESET))((uninterrupted.run.theta, classes.pixels), keys)
    accuracies, result = np.asarray(scores)[:, 0], uninterrupted.run.evaluation
    assert result.accuracy == pytest.approx(accuracies.mean())
    assert result.interval == pytest.approx(1.96 * accuracies.std(ddof=1) / EVALUATION_TASKS**0.5)


def test_a_run_its_folder_and_its_parameters_have_the_same_evaluation(uninterrupted):
    run = uninterrupted.run
    for what, preset in ((run, None), (run.directory, PRESET), (str(run.directory), PRESET), (run.theta, PRESET)):
        assert imaml.evaluate(what, preset, tasks=EVALUATION_TASKS) == run.evaluation


def test_parameters_without_a_preset_are_refused(uninterrupted):
    with pytest.raises(InputError, match="pass the preset as well"):
        imaml.evaluate(uninterrupted.run.theta)


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
def test_outputs_that_are_not_finite_give_the_accuracy_nan(number, uninterrupted):
    theta = jax.tree.map(lambda leaf: leaf.at[..., 0].set(number), uninterrupted.run.theta)
    with pytest.warns(UserWarning, match=f"the outputs of 4 of {EVALUATION_TASKS} tasks are not finite"):
        found = imaml.evaluate(theta, PRESET, tasks=EVALUATION_TASKS)
    assert np.isnan(found.value) and np.isnan(found.interval)


def test_parameters_need_not_be_a_dictionary(uninterrupted):
    apply = TinyMLP().build(2).apply

    class TupleNetwork(TinyMLP):
        def build(self, ways):
            network = super().build(ways)
            return replace(network, init=None, apply=lambda theta, x: apply(theta[0], x))

    found = imaml.evaluate((uninterrupted.run.theta,), replace(PRESET, network=TupleNetwork()), EVALUATION_TASKS)
    assert found == uninterrupted.run.evaluation


def test_an_empty_folder_cannot_be_evaluated(tmp_path):
    with pytest.raises(InputError, match=f"there is no run in {tmp_path}"):
        imaml.evaluate(tmp_path)


def test_one_task_has_no_interval(uninterrupted):
    with pytest.raises(InputError, match="at least 2 tasks, got 1"):
        imaml.evaluate(uninterrupted.run, tasks=1)
    for tasks in (1, -5):
        with pytest.raises(InputError, match=f"at least 2 tasks, got {tasks}: pass 0 for none"):
            imaml.train(PRESET, uninterrupted.run.directory, evaluation_tasks=tasks)


@pytest.mark.slow("trains and evaluates a run")
def test_an_evaluation_warns_if_it_uses_an_older_checkpoint_than_the_damaged_last_one(tmp_path):
    train(tmp_path, checkpoint_seconds=0.0)
    (tmp_path / f"checkpoint-{STEPS:08}.npz").write_bytes(b"")
    before = contents(tmp_path)
    with pytest.warns(UserWarning, match="is damaged .* an older checkpoint is used"):
        imaml.evaluate(tmp_path, PRESET, EVALUATION_TASKS)
    assert contents(tmp_path) == before
