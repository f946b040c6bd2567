"""Training: a run ends with an evaluation, stops on a signal, and when resumed equals an uninterrupted run."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_run import (
    EVALUATION_TASKS,
    PRESET,
    STEPS,
    STOP_AT,
    assert_equal_states,
    assert_same_run,
    contents,
    dataset,
    saved_state,
    stop_at,
    train,
)

import bilevel as bl
from imaml import InputError, datasets
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.learning.meta_gradient import MetaGradient
from imaml.learning.tasks import Episode
from imaml.parallel.devices import global_mesh, on_all
from imaml.runs import checkpoints, step_compiler, training
from imaml.runs import folder as runfolder
from imaml.runs import log as runlog
from imaml.runs.interruption import stop_on_signals
from imaml.runs.meta_step import TrainState, initial_state

pytestmark = pytest.mark.usefixtures("traces")

DIVERGING = replace(PRESET, inner=bl.GradientDescent(1e30, max_steps=3))


def test_a_run_ends_with_an_evaluation_that_names_the_chance_level(uninterrupted):
    run = uninterrupted.run
    assert (run.step, run.finished, run.stopped_by) == (STEPS, True, None)
    found = run.evaluation  # The network has no batch normalisation.
    assert (found.metric, found.normalisation) == ("accuracy", "none")
    assert (found.chance, found.tasks) == (0.5, EVALUATION_TASKS)
    assert 0 <= found.accuracy == found.value <= 1 and found.interval >= 0
    assert str(found).endswith("(chance 50%)")
    assert_equal_states(run.theta, saved_state(run.directory).theta)


def test_every_parameter_array_moves_and_no_faster_than_adam_allows(uninterrupted):
    before = initial_state(PRESET).theta
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, uninterrupted.run.theta)), strict=True)]
    # Adam moves each number that has a gradient by about the learning rate in each step.
    assert all(1e-3 < distance < 2 * STEPS * PRESET.outer.learning_rate for distance in moved)


def test_the_result_file_holds_evaluations_and_settings(uninterrupted):
    result = json.loads((uninterrupted.run.directory / runfolder.RESULT).read_text())
    assert result["evaluations"] == uninterrupted.run.evaluation.records()
    assert result["config"] == PRESET.config()
    assert sorted(contents(uninterrupted.run.directory)) == [
        f"checkpoint-{STEPS:08}.npz",
        runlog.FILE,
        runfolder.RESULT,
    ]


def test_the_log_has_one_line_for_each_step_and_equals_the_reported_progress(uninterrupted):
    log = runlog.read_log(uninterrupted.run.directory)
    assert [entry.step for entry in log] == list(range(1, STEPS + 1))
    assert log == uninterrupted.progress
    # A task with a linear residual above 1 has a status but is not counted in `tasks`.
    assert all(entry.tasks <= sum(entry.statuses.values()) == PRESET.outer.tasks for entry in log)
    assert all(np.isfinite([entry.loss, entry.inner_residual, entry.linear_residual]).all() for entry in log)


def test_events_precede_reading_compiling_and_evaluating(uninterrupted):
    assert uninterrupted.events == [
        "reading glyphs",
        "compiling the meta-step",
        f"evaluating on {EVALUATION_TASKS} tasks of held-out classes",
    ]


def test_the_step_is_traced_and_compiled_once_for_all_steps(uninterrupted):
    assert (uninterrupted.traces, uninterrupted.compilations) == (1, 1)


@pytest.mark.slow("compiles the meta-step twice")
@pytest.mark.parametrize("classes, compilations", [(12, 1), (13, 2), (1, 1)], ids=["as expected", "more", "too few"])
def test_the_step_is_compiled_while_reading_and_again_if_the_shapes_were_not_as_expected(
    classes, compilations, uninterrupted, tmp_path, tiny_pixels, monkeypatch
):
    events, while_reading = [], []

    def load(name, data, meanwhile):
        meanwhile(ImageClasses.blank(classes, *tiny_pixels.shape[1:]))
        while_reading.extend(events)
        return dataset(tiny_pixels)

    monkeypatch.setattr(datasets, "load", load)
    train(tmp_path, on_event=events.append)
    assert events.count("compiling the meta-step") == compilations
    # With one class no task can be drawn, so nothing is compiled ahead.
    assert ("compiling the meta-step" in while_reading) == (classes > 1)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow("compiles the meta-step")
def test_each_step_draws_other_tasks(uninterrupted, tiny_pixels):
    step, states = (
        jax.jit(step_compiler.meta_step(PRESET)),
        [replace(initial_state(PRESET), step=jnp.int32(i)) for i in (0, 1)],
    )
    values = [float(step(*on_all((s, tiny_pixels), global_mesh(PRESET.outer.tasks)))[1].value) for s in states]
    assert values[0] == uninterrupted.progress[0].loss != values[1]


@pytest.mark.slow("trains a run in two parts", fast="15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bits(number, uninterrupted, tmp_path):
    stopped = train(tmp_path, on_progress=stop_at(STOP_AT, number))
    assert (stopped.step, stopped.finished, stopped.stopped_by) == (STOP_AT, False, number)
    assert stopped.evaluation is None and not (tmp_path / runfolder.RESULT).exists()
    assert int(saved_state(tmp_path).step) == STOP_AT
    resumed = train(tmp_path)
    assert resumed.evaluation == uninterrupted.run.evaluation
    assert_same_run(tmp_path, uninterrupted)


def test_signal_handlers_are_restored_with_and_without_a_signal():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for send in (False, True):
        with stop_on_signals() as stop:
            assert [signal.getsignal(number) for number in numbers] != before
            if send:
                signal.raise_signal(signal.SIGTERM)
        assert (stop.received, bool(stop)) == ((signal.SIGTERM, True) if send else (None, False))
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_during_a_print_is_recorded():
    def reentrant_print():
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with stop_on_signals(reentrant_print) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.received is signal.SIGINT


@pytest.fixture
def interruptible():
    """Install Python's default SIGINT handler. Otherwise a background job of a shell script ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path, interruptible):
    def twice(progress):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_progress=twice)


def test_a_signal_while_compiling_ahead_acts_after_the_trace(tmp_path, tiny_pixels, interruptible, monkeypatch):
    begun = []

    def begin(compiler, source):
        signal.raise_signal(signal.SIGINT)
        begun.append(source.shape)

    def load(name, data, meanwhile):
        meanwhile(ImageClasses.blank(*tiny_pixels.shape))
        return pytest.fail("the signal did not stop the run")

    monkeypatch.setattr(step_compiler.StepCompiler, "begin", begin)
    monkeypatch.setattr(datasets, "load", load)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert begun == [tiny_pixels.shape] and not (tmp_path / "run").exists()


CHILD = """
import functools, os, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)  # as in tests/conftest.py
sys.path.insert(0, sys.argv[1])
import imaml, tiny_run
from imaml import cli, datasets
from imaml.runs import progress
from imaml.runs import training
folder, pixels, number = sys.argv[2:]
imaml.register_preset(tiny_run.PRESET)
datasets.load = lambda name, data=None, meanwhile=None: tiny_run.dataset(np.load(pixels))
training.train = functools.partial(training.train, checkpoint_seconds=0.0)
progress.Reporter.step = lambda self, p: p.step == tiny_run.STOP_AT and os.kill(os.getpid(), int(number))
cli.start_jax = lambda: None
sys.exit(cli.main(["train", tiny_run.PRESET.name, "--out", folder]))
"""


@pytest.mark.slow("trains in processes that are killed and started again")
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_killed_or_stopped_process_is_resumed_to_the_same_bits(number, code, uninterrupted, tmp_path, tiny_pixels):
    folder, pixels = tmp_path / "run", tmp_path / "pixels.npy"
    np.save(pixels, tiny_pixels)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, here, folder, pixels, str(number.value)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parents[1])])}, check=False,
    )  # fmt: skip
    assert done.returncode == code, done
    assert checkpoints.newest(folder).step == STOP_AT
    assert train(folder).evaluation == uninterrupted.run.evaluation
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow("trains a run in two parts")
def test_a_crash_loses_only_the_steps_after_the_checkpoint(uninterrupted, tmp_path):
    def crash(progress):
        if progress.step == STOP_AT + 1:
            raise RuntimeError("crash")

    train(tmp_path, on_progress=stop_at(STOP_AT))
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, on_progress=crash)
    assert int(saved_state(tmp_path).step) == STOP_AT  # The log is one step ahead of the checkpoint.
    assert len(runlog.read_log(tmp_path)) == STOP_AT + 1
    train(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow("evaluates a finished run again")
def test_training_a_finished_run_only_evaluates(uninterrupted, traces):
    seen, events, traced = [], [], len(traces)
    before = saved_state(uninterrupted.run.directory)
    files_before = contents(uninterrupted.run.directory)
    again = train(uninterrupted.run.directory, on_progress=seen.append, on_event=events.append)
    assert (again.finished, again.evaluation) == (True, uninterrupted.run.evaluation)
    assert (seen, len(traces)) == ([], traced)
    assert not any("compiling" in event for event in events)
    assert_same_run(uninterrupted.run.directory, uninterrupted)
    assert_equal_states(saved_state(uninterrupted.run.directory), before)
    assert contents(uninterrupted.run.directory) == files_before


@pytest.mark.parametrize(
    "other, message",
    [
        (replace(PRESET, episode=Episode(13, 1, 1)), "13 ways are more .* tiny's training set"),
        (replace(PRESET, outer=replace(PRESET.outer, queries=6)), "1 shots and 6 queries .* tiny's training set"),
        (replace(PRESET, episode=Episode(2, 4, 3)), "4 shots and 3 queries .* tiny's test set"),
    ],
)
def test_tasks_that_cannot_be_drawn_are_refused_before_anything_is_written_or_compiled(
    other, message, tmp_path, traces
):
    traced = len(traces)
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", other)
    assert not (tmp_path / "run").exists() and len(traces) == traced


counts = st.integers(-1, 14)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@example(ways=12, shots=3, queries=3, training_queries=3, tasks=1)  # all classes and all images of each class
@given(ways=counts, shots=counts, queries=counts, training_queries=counts, tasks=st.integers(-1, 3))
def test_impossible_task_sizes_are_refused_before_anything_is_compiled(ways, shots, queries, training_queries, tasks):
    possible = 2 <= ways <= 12 and shots >= 1 and tasks >= 1
    possible = possible and all(number >= 1 and shots + number <= 6 for number in (queries, training_queries))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(training, "RunFolder", opened := Mock(side_effect=FolderOpened))
        patch.setattr(jax, "jit", compiled := Mock())
        try:
            outer = replace(PRESET.outer, queries=training_queries, tasks=tasks)
            train(Path(folder) / "run", replace(PRESET, episode=Episode(ways, shots, queries), outer=outer))
        except FolderOpened:
            assert possible
        except InputError as error:
            assert not possible and re.search(r"-?\d", str(error))
        assert opened.called == possible and not compiled.called
        assert not list(Path(folder).iterdir())


class FolderOpened(Exception):
    """Raised in place of opening the run's folder. All checks have passed by then."""


def test_too_few_held_out_classes_are_refused_before_training(tiny_pixels, monkeypatch, tmp_path):
    full = dataset(tiny_pixels)
    few = ImageClasses(full.test.pixels[:1], full.test.labels[:1])
    monkeypatch.setattr(datasets, "load", lambda *_: ImageDataset("tiny", full.train, few))
    with pytest.raises(InputError, match="2 ways are more than the 1 classes of tiny's test set"):
        train(tmp_path / "run")


@pytest.mark.slow("trains a run without a usable gradient")
def test_training_in_which_no_task_has_a_usable_gradient_is_refused(tmp_path, monkeypatch):
    original = step_compiler.meta_step

    def without_gradients(preset, mesh=None):
        def step(state, source):
            after, report = original(preset, mesh)(state, source)
            unsolved = jnp.full_like(report.linear_residual, 4.0)
            usable = state.step == 1  # Only the second of the six meta-steps has a usable gradient.
            return after, replace(report, tasks=jnp.int32(usable), linear_residual=unsolved)

        return step

    monkeypatch.setattr(step_compiler, "meta_step", without_gradients)
    monkeypatch.setattr(training, "PATIENCE", 3)
    with pytest.raises(InputError) as refused:
        train(tmp_path)
    assert "none of the tasks of the last 3 meta-steps had a usable gradient" in str(refused.value)
    assert "adjoint systems is 4.0" in str(refused.value) and "raise linear.max_steps or strength" in str(refused.value)
    assert [entry.tasks for entry in runlog.read_log(tmp_path)] == [0, 1, 0, 0, 0]


@pytest.mark.slow("trains two runs of 210 meta-steps")
@pytest.mark.parametrize(("factor", "warns"), [(1.4, False), (3.0, True)], ids=["1.4", "3.0"])
def test_a_run_whose_loss_has_risen_since_its_least_value_warns(tmp_path, monkeypatch, factor, warns):
    original = step_compiler.meta_step

    def with_losses(preset, mesh=None):
        def step(state, source):
            after, report = original(preset, mesh)(state, source)
            return after, replace(report, value=jnp.where(state.step < 105, 0.25, factor * 0.25))

        return step

    monkeypatch.setattr(step_compiler, "meta_step", with_losses)
    messages = []
    longer = replace(PRESET, outer=replace(PRESET.outer, steps=210))
    train(tmp_path, longer, on_warning=messages.append, checkpoint_seconds=0.0)
    found = [message for message in messages if "training became unstable" in message]
    assert len(found) == warns
    if warns:
        assert "over 100 meta-steps was 0.25 at meta-step 100, and is 0.75 now" in found[0]
        assert "'imaml evaluate RUN --best' takes θ of meta-step 105." in found[0]
        assert "lower inner.step_size or outer.learning_rate" in found[0]


@pytest.mark.slow("trains until it diverges")
def test_training_that_diverges_is_refused_and_theta_is_not_updated(traces, tiny_pixels, tmp_path):
    with pytest.raises(InputError, match=r"meta-step 1 had no task with finite numbers.*lower inner\.step_size"):
        train(tmp_path, DIVERGING)
    assert runlog.read_log(tmp_path) == [] and checkpoints.newest(tmp_path) is None
    state = initial_state(DIVERGING)
    start, pixels = on_all((state, tiny_pixels), global_mesh(DIVERGING.outer.tasks))
    after, report = jax.jit(step_compiler.meta_step(DIVERGING))(start, pixels)
    assert int(report.tasks) == 0 and int(after.step) == 1
    assert_equal_states(replace(after, step=state.step), state)


def test_residuals_in_the_progress_are_medians_over_finite_values():
    numbers = jnp.array([1.0, jnp.nan, 3.0, 5.0])
    names = ("CONVERGED", "NONFINITE", "CONVERGED", "MAX_STEPS")
    status = jnp.array([bl.Status[name] for name in names], jnp.int32)
    report = MetaGradient(jnp.float32(0.5), {}, jnp.float32(0.25), jnp.float32(3), numbers, 2 * numbers, status)
    progress = training._progress(PRESET, TrainState({}, (), PRESET.keys.train, jnp.int32(4)), report, 1.5)
    assert (progress.inner_residual, progress.linear_residual, progress.tasks) == (3.0, 6.0, 3)
    assert progress.statuses == {"CONVERGED": 2, "NONFINITE": 1, "MAX_STEPS": 1}


@pytest.mark.slow("trains a hundred steps")
def test_a_hundred_steps_are_traced_once(traces, tiny_pixels):
    preset, traced = replace(PRESET, outer=replace(PRESET.outer, steps=100)), len(traces)
    mesh = global_mesh(preset.outer.tasks)
    compiler = step_compiler.StepCompiler(preset, mesh)
    steps = training._steps(preset, mesh, initial_state(preset), tiny_pixels, compiler, 100)
    # Read each step's number before the step after the next is dispatched, as training does. Devices need one thread
    # each for a sum over devices, and a hundred dispatched steps would exhaust the thread pool.
    assert [int(state.step) for state, _ in steps] == list(range(1, 101))
    assert len(traces) - traced == 1
