"""Training: a run ends with an evaluation, stops when told, and resumed is to the bit what it would have been."""

import errno
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bilevel as bl
import imaml
from imaml import InputError, datasets
from imaml.datasets import sinusoid
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.learning import networks
from imaml.learning.algorithms import MetaGradient
from imaml.learning.tasks import Episode
from imaml.parallel.devices import global_mesh, on_all
from imaml.runs import checkpoints, compilation, evaluation, training
from imaml.runs import folder as runfolder
from imaml.runs import log as runlog
from imaml.runs.interruption import stop_on_signals
from imaml.runs.meta_step import TrainState, initial_state
from imaml.settings.parts import Conv4, Outer
from imaml.storage import files

STEPS, STOP_AT, EVALUATION_TASKS = 6, 3, 4
DEFAULTS = {"evaluation_tasks": EVALUATION_TASKS, "checkpoint_seconds": float("inf")}
"""The end is saved anyway; what is saved before shall not hang on how fast the machine is."""


@dataclass(frozen=True)
class Flat:
    """A network that compiles in a second; what is tested here is the loop around it."""

    hidden: int = 4

    def build(self, ways):
        network = networks.mlp((28 * 28, self.hidden, ways))
        return networks.Network(network.init, lambda p, x: network.apply(p, x.reshape(len(x), -1)))


PRESET = replace(
    imaml.preset("glyphs-5way-1shot-gd"),
    episode=Episode(ways=2, shots=1, queries=1),
    network=Flat(),
    inner=bl.GradientDescent(0.1, max_steps=2),
    linear=bl.CG(2),
    outer=Outer(learning_rate=1e-2, tasks=2, queries=1, steps=STEPS),
)
DIVERGING = replace(PRESET, inner=bl.GradientDescent(1e30, max_steps=3))


def dataset(pixels):
    names = [f"{split}{i}" for split in ("train", "test") for i in range(len(pixels))]
    half = len(pixels)
    return ImageDataset("tiny", ImageClasses(pixels, tuple(names[:half])), ImageClasses(pixels, tuple(names[half:])))


@pytest.fixture(scope="module", autouse=True)
def traces(tiny_pixels):
    """The tiny dataset in place of any other, programs made once for all tests, and a count of their traces."""
    counted, tiny = [], dataset(tiny_pixels)
    meta_step, scores, over_tasks = compilation.meta_step, evaluation.task_scores, evaluation.over_tasks

    @functools.cache
    def counting(preset, mesh=None):
        step = meta_step(preset, mesh)

        def meta_step_of_test(*inputs):
            counted.append(preset)
            return step(*inputs)

        return meta_step_of_test

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: tiny)
        patch.setattr(compilation, "meta_step", counting)
        patch.setattr(evaluation, "task_scores", functools.cache(scores))
        patch.setattr(evaluation, "over_tasks", functools.cache(over_tasks))
        yield counted


def train(directory, preset=PRESET, **options):
    return imaml.train(preset, directory, **(DEFAULTS | options))


def stop_at(step, number=signal.SIGTERM):
    """What is called after each meta-step, and sends this process a signal after that one."""
    return lambda progress: signal.raise_signal(number) if progress.step == step else None


@pytest.fixture(scope="module")
def whole(tmp_path_factory, traces):
    """A run from beginning to end, what it told, and how often its step was traced and compiled."""
    seen, events, messages = [], [], []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles():
            run = train(tmp_path_factory.mktemp("whole"), on_progress=seen.append, on_event=events.append)
    finally:
        logging.getLogger("jax").removeHandler(handler)
    compiled = [message for message in messages if re.match(r"Compiling (jit\()?meta_step_of_test", message)]
    return SimpleNamespace(run=run, seen=seen, events=events, traces=len(traces), compilations=len(compiled))


def saved_state(directory):
    return checkpoints.newest(directory).restore(initial_state(PRESET))


def plain(leaf):
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same_bits(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), one, other)


def contents(directory):
    """Every file of a folder but the lock, which says who was last in it."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != files.LOCK}


def assert_same_run(directory, whole):
    """θ, the optimiser, the key and the step to the bit; the log with each step once, and the same numbers."""
    assert_same_bits(saved_state(directory), saved_state(whole.run.directory))
    logs = [[replace(p, seconds=0.0) for p in runlog.read_log(d)] for d in (directory, whole.run.directory)]
    assert logs[0] == logs[1]


def test_a_run_ends_evaluated_against_chance(whole):
    run = whole.run
    assert (run.step, run.finished, run.stopped_by) == (STEPS, True, None)
    found = run.evaluation  # the network has no normalisation
    assert (found.metric, found.normalisation) == ("accuracy", "none")
    assert (found.chance, found.tasks) == (0.5, EVALUATION_TASKS)
    assert 0 <= found.accuracy == found.value <= 1 and found.interval >= 0
    assert str(found).endswith("(chance 50%)")
    assert_same_bits(run.theta, saved_state(run.directory).theta)


def test_a_run_learns(whole):
    before = initial_state(PRESET).theta
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, whole.run.theta)), strict=True)]
    # Adam moves each parameter that has a gradient by about its rate in each step.
    assert all(1e-3 < distance < 2 * STEPS * PRESET.outer.learning_rate for distance in moved)


def test_its_result_is_on_disk_with_what_it_belongs_to(whole):
    result = json.loads((whole.run.directory / runfolder.RESULT).read_text())
    assert result["evaluations"] == whole.run.evaluation.records()
    assert result["config"] == PRESET.config()
    assert sorted(contents(whole.run.directory)) == [f"checkpoint-{STEPS:08}.npz", runlog.FILE, runfolder.RESULT]


def test_the_log_has_one_line_for_each_step_and_is_what_was_shown(whole):
    log = runlog.read_log(whole.run.directory)
    assert [entry.step for entry in log] == list(range(1, STEPS + 1))
    assert log == whole.seen
    # A task whose linear solve ends worse than none has a status and does not count.
    assert all(entry.tasks <= sum(entry.statuses.values()) == PRESET.outer.tasks for entry in log)
    assert all(np.isfinite([entry.loss, entry.inner_residual, entry.linear_residual]).all() for entry in log)


def test_what_takes_time_is_announced(whole):
    assert whole.events == [
        "reading glyphs",
        "compiling the meta-step",
        f"evaluating on {EVALUATION_TASKS} tasks of held-out classes",
    ]


def test_the_step_is_traced_and_compiled_once_for_all_steps(whole):
    assert (whole.traces, whole.compilations) == (1, 1)


@pytest.mark.parametrize("classes, compilations", [(12, 1), (13, 2), (1, 1)], ids=["as expected", "more", "too few"])
def test_the_step_is_compiled_while_the_data_are_read_and_again_where_they_are_not_as_expected(
    classes, compilations, whole, tmp_path, tiny_pixels, monkeypatch
):
    events, beside = [], []

    def load(name, data, meanwhile):
        meanwhile(ImageClasses.blank(classes, *tiny_pixels.shape[1:]))
        beside.extend(events)
        return dataset(tiny_pixels)

    monkeypatch.setattr(datasets, "load", load)
    train(tmp_path, on_event=events.append)
    assert events.count("compiling the meta-step") == compilations
    assert ("compiling the meta-step" in beside) == (classes > 1)  # tasks that do not fit are not compiled for
    assert_same_run(tmp_path, whole)


def test_each_step_draws_tasks_of_its_own(whole, tiny_pixels):
    step, states = (
        jax.jit(compilation.meta_step(PRESET)),
        [replace(initial_state(PRESET), step=jnp.int32(i)) for i in (0, 1)],
    )
    values = [float(step(*on_all((s, tiny_pixels), global_mesh(PRESET.outer.tasks)))[1].value) for s in states]
    assert values[0] == whole.seen[0].loss != values[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_the_rest_is_done_later_to_the_bit(number, whole, tmp_path):
    stopped = train(tmp_path, on_progress=stop_at(STOP_AT, number))
    assert (stopped.step, stopped.finished, stopped.stopped_by) == (STOP_AT, False, number)
    assert stopped.evaluation is None and not (tmp_path / runfolder.RESULT).exists()
    assert int(saved_state(tmp_path).step) == STOP_AT
    resumed = train(tmp_path)
    assert resumed.evaluation == whole.run.evaluation
    assert_same_run(tmp_path, whole)


def test_handlers_are_put_back_whether_or_not_a_signal_came():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for send in (False, True):
        with stop_on_signals() as stop:
            assert [signal.getsignal(number) for number in numbers] != before
            if send:
                signal.raise_signal(signal.SIGTERM)
        assert (stop.received, bool(stop)) == ((signal.SIGTERM, True) if send else (None, False))
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_amid_a_print_stops_no_less_cleanly():
    def reentrant_print():
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with stop_on_signals(reentrant_print) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.received is signal.SIGINT


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a test run in the background of a script does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path, interruptible):
    def twice(progress):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_progress=twice)


def test_a_signal_amid_the_trace_ahead_acts_when_that_is_done(tmp_path, tiny_pixels, interruptible, monkeypatch):
    begun = []

    def begin(compiler, source):
        signal.raise_signal(signal.SIGINT)
        begun.append(source.shape)

    def load(name, data, meanwhile):
        meanwhile(ImageClasses.blank(*tiny_pixels.shape))
        return pytest.fail("went on")

    monkeypatch.setattr(compilation.StepCompiler, "begin", begin)
    monkeypatch.setattr(datasets, "load", load)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert begun == [tiny_pixels.shape] and not (tmp_path / "run").exists()


CHILD = """
import functools, os, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)  # as in the tests
sys.path.insert(0, sys.argv[1])
import test_training as tests
from imaml import cli, datasets
from imaml.report import progress
from imaml.runs import training
from imaml.settings import published_presets
folder, pixels, number = sys.argv[2:]
published_presets._PRESETS = {tests.PRESET.name: tests.PRESET}
datasets.load = lambda name, data=None, meanwhile=None: tests.dataset(np.load(pixels))
training.train = functools.partial(training.train, checkpoint_seconds=0.0)
progress.Reporter.step = lambda self, p: p.step == tests.STOP_AT and os.kill(os.getpid(), int(number))
cli._start_jax = lambda: None
sys.exit(cli.main(["train", "--out", folder]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_process_that_is_killed_or_stopped_is_gone_on_with_to_the_bit(number, code, whole, tmp_path, tiny_pixels):
    folder, pixels = tmp_path / "run", tmp_path / "pixels.npy"
    np.save(pixels, tiny_pixels)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, here, folder, pixels, str(number.value)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(here.parents[2])}, check=False,
    )  # fmt: skip
    assert done.returncode == code, done
    assert checkpoints.newest(folder).step == STOP_AT
    assert train(folder).evaluation == whole.run.evaluation
    assert_same_run(folder, whole)


def test_a_crash_loses_only_what_came_after_the_checkpoint(whole, tmp_path):
    def crash(progress):
        if progress.step == STOP_AT + 1:
            raise RuntimeError("crash")

    train(tmp_path, on_progress=stop_at(STOP_AT))
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, on_progress=crash)
    assert int(saved_state(tmp_path).step) == STOP_AT  # the log is a step ahead
    assert len(runlog.read_log(tmp_path)) == STOP_AT + 1
    train(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_finished_run_called_again_only_evaluates(whole, traces):
    seen, events, traced = [], [], len(traces)
    before = saved_state(whole.run.directory)
    files_before = contents(whole.run.directory)
    again = train(whole.run.directory, on_progress=seen.append, on_event=events.append)
    assert (again.finished, again.evaluation) == (True, whole.run.evaluation)
    assert (seen, len(traces)) == ([], traced)
    assert not any("compiling" in event for event in events)
    assert_same_run(whole.run.directory, whole)
    assert_same_bits(saved_state(whole.run.directory), before)
    assert contents(whole.run.directory) == files_before


@pytest.mark.parametrize(
    "other, difference",
    [
        (replace(PRESET, strength=0.7), "strength: 0.1 → 0.7"),
        (replace(PRESET, outer=replace(PRESET.outer, steps=9)), "outer.steps: 6 → 9"),
        (replace(PRESET, network=Flat(hidden=5)), "network.hidden: 4 → 5"),
        (replace(PRESET, seed=3), "seed: 0 → 3"),
    ],
)
def test_a_run_with_other_settings_is_refused_and_they_are_named(other, difference, whole):
    before = contents(whole.run.directory)
    with pytest.raises(InputError, match=re.escape(f"a run with other settings ({difference})")):
        train(whole.run.directory, other)
    assert contents(whole.run.directory) == before


def test_a_run_begun_before_a_setting_existed_goes_on(whole, tmp_path):
    stop_halfway(tmp_path)
    found = checkpoints.newest(tmp_path)
    config = found.description["config"]
    for section, name in (
        (config, "algorithm"),
        (config, "fidelity"),
        (config, "test_steps"),
        (config["outer"], "at_once"),
    ):
        del section[name]
    facts = {name: found.description[name] for name in ("preset", "data", "versions")} | {"config": config}
    checkpoints.save(tmp_path, STOP_AT, found.restore(initial_state(PRESET)), facts)
    train(tmp_path)
    assert_same_run(tmp_path, whole)
    assert checkpoints.newest(tmp_path).description["config"] == PRESET.config()


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile"])
def test_a_run_with_another_algorithm_is_another_run(name, whole):
    with pytest.raises(InputError, match=rf"other settings \(algorithm: imaml → {name}"):
        train(whole.run.directory, PRESET.using(name))


def test_a_regression_is_trained_logged_and_evaluated_by_its_error(tmp_path):
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
    # By hand: adapt to each of the same tasks, and take the error of the query points.
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
        one_by_one = jax.lax.map(lambda image: network.apply_beside(phi, image[None], task.support_x)[0], task.query_x)
        return jnp.stack([jnp.mean(outputs.argmax(-1) == task.query_y) for outputs in (together, one_by_one)])

    expected = [accuracies(key) for key in jax.random.split(preset.keys.test, EVALUATION_TASKS)]
    np.testing.assert_allclose([batch.value, support.value], np.mean(expected, 0), atol=1e-6)


def test_a_run_on_other_data_is_refused(whole, tiny_pixels, monkeypatch):
    other = tiny_pixels.copy()
    other[3, 2, 5, 5] ^= 1  # one bit
    monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: dataset(other))
    with pytest.raises(InputError, match="holds a run on other data"):
        train(whole.run.directory)


def test_a_run_is_not_evaluated_on_other_data_than_its_own(whole, tiny_pixels, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: dataset(tiny_pixels ^ 1))
    with pytest.raises(InputError, match="was trained on other data"):
        imaml.evaluate(whole.run.directory, PRESET, EVALUATION_TASKS)


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
@example(ways=12, shots=3, queries=3, training_queries=3, tasks=1)  # the most that there is
@given(ways=counts, shots=counts, queries=counts, training_queries=counts, tasks=st.integers(-1, 3))
def test_whatever_cannot_be_drawn_is_refused_before_anything_is_compiled(ways, shots, queries, training_queries, tasks):
    possible = 2 <= ways <= 12 and shots >= 1 and tasks >= 1
    possible = possible and all(number >= 1 and shots + number <= 6 for number in (queries, training_queries))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(training, "RunFolder", reached := Mock(side_effect=Reached))
        patch.setattr(jax, "jit", compiled := Mock())
        try:
            outer = replace(PRESET.outer, queries=training_queries, tasks=tasks)
            train(Path(folder) / "run", replace(PRESET, episode=Episode(ways, shots, queries), outer=outer))
        except Reached:
            assert possible
        except InputError as error:
            assert not possible and re.search(r"-?\d", str(error))
        assert reached.called == possible and not compiled.called
        assert not list(Path(folder).iterdir())


class Reached(Exception):
    """The checks are behind; what follows writes and compiles."""


def test_held_out_classes_too_few_are_refused_before_training(tiny_pixels, monkeypatch, tmp_path):
    full = dataset(tiny_pixels)
    few = ImageClasses(full.test.pixels[:1], full.test.labels[:1])
    monkeypatch.setattr(datasets, "load", lambda *_: ImageDataset("tiny", full.train, few))
    with pytest.raises(InputError, match="2 ways are more than the 1 classes of tiny's test set"):
        train(tmp_path / "run")


def test_training_that_diverges_is_refused_and_theta_is_not_updated(traces, tiny_pixels, tmp_path):
    with pytest.raises(InputError, match=r"meta-step 1 had no task with finite numbers.*lower inner\.step_size"):
        train(tmp_path, DIVERGING)
    assert runlog.read_log(tmp_path) == [] and checkpoints.newest(tmp_path) is None
    state = initial_state(DIVERGING)
    start, pixels = on_all((state, tiny_pixels), global_mesh(DIVERGING.outer.tasks))
    after, report = jax.jit(compilation.meta_step(DIVERGING))(start, pixels)
    assert int(report.tasks) == 0 and int(after.step) == 1
    assert_same_bits(replace(after, step=state.step), state)


def test_progress_is_measured_on_tasks_with_finite_numbers():
    numbers = jnp.array([1.0, jnp.nan, 3.0, 5.0])
    status = jnp.array([0, 7, 0, 3], jnp.int32)
    report = MetaGradient(jnp.float32(0.5), {}, jnp.float32(0.25), jnp.float32(3), numbers, 2 * numbers, status)
    progress = training._progress(PRESET, TrainState({}, (), PRESET.keys.train, jnp.int32(4)), report, 1.5)
    assert (progress.inner_residual, progress.linear_residual, progress.tasks) == (3.0, 6.0, 3)
    assert progress.statuses == {"CONVERGED": 2, "NONFINITE": 1, "MAX_STEPS": 1}


def test_the_interval_is_that_of_a_mean(whole, tiny_pixels):
    classes = dataset(tiny_pixels).test
    keys = jax.random.split(PRESET.keys.test, EVALUATION_TASKS)
    scores = jax.jit(evaluation.task_scores(PRESET))((whole.run.theta, classes.pixels), keys)
    accuracies, result = np.asarray(scores)[:, 0], whole.run.evaluation
    assert result.accuracy == pytest.approx(accuracies.mean())
    assert result.interval == pytest.approx(1.96 * accuracies.std(ddof=1) / EVALUATION_TASKS**0.5)


def test_a_run_a_folder_and_parameters_are_evaluated_alike(whole):
    run = whole.run
    for what, preset in ((run, None), (run.directory, PRESET), (str(run.directory), PRESET), (run.theta, PRESET)):
        assert imaml.evaluate(what, preset, tasks=EVALUATION_TASKS) == run.evaluation


def test_parameters_without_a_preset_are_refused(whole):
    with pytest.raises(InputError, match="pass the preset as well"):
        imaml.evaluate(whole.run.theta)


def test_an_empty_folder_cannot_be_evaluated(tmp_path):
    with pytest.raises(InputError, match=f"there is no run in {tmp_path}"):
        imaml.evaluate(tmp_path)


def test_one_task_has_no_interval(whole):
    with pytest.raises(InputError, match="at least 2 tasks, got 1"):
        imaml.evaluate(whole.run, tasks=1)


# What goes wrong with a folder


def stop_halfway(directory):
    train(directory, on_progress=stop_at(STOP_AT))
    assert checkpoints.newest(directory).step == STOP_AT


@pytest.mark.parametrize("room", [0, 30_000])  # for nothing, and for the log but no checkpoint
def test_a_full_disk_ends_the_run_and_the_old_checkpoint_stands(room, small_disk, whole):
    stop_halfway(small_disk)
    before = (small_disk / f"checkpoint-{STOP_AT:08}.npz").read_bytes()
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - room)
    with pytest.raises(OSError) as caught:
        train(small_disk)
    assert caught.value.errno == errno.ENOSPC
    assert (small_disk / f"checkpoint-{STOP_AT:08}.npz").read_bytes() == before
    ballast.unlink()
    train(small_disk)
    assert_same_run(small_disk, whole)


def test_a_read_only_run_is_not_trained_but_evaluated(whole, sealed):
    files_before = contents(whole.run.directory)
    with sealed(files_before) as folder:
        with pytest.raises(OSError) as caught:
            train(folder)
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
        assert imaml.evaluate(folder, tasks=EVALUATION_TASKS, preset=PRESET) == whole.run.evaluation
        assert contents(folder) == files_before


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(whole, tmp_path):
    refusals = []

    def intrude(progress):
        with pytest.raises(InputError, match=f"{tmp_path} is in use by process {os.getpid()} on ") as caught:
            train(tmp_path)
        refusals.append(caught)

    train(tmp_path, on_progress=intrude)
    assert len(refusals) == STEPS
    assert_same_run(tmp_path, whole)


def test_a_damaged_checkpoint_is_told_and_set_aside_and_the_run_ends_with_the_same_bits(whole, tmp_path):
    train(tmp_path, checkpoint_seconds=0.0, keep_checkpoints=3)
    damaged = tmp_path / f"checkpoint-{STEPS:08}.npz"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    events = []
    train(tmp_path, on_event=events.append)
    (told,) = [event for event in events if "damaged" in event]
    assert told.startswith(f"{damaged} is damaged (") and told.endswith("set aside, the one before is taken")
    assert (tmp_path / f"{damaged.name}.damaged").read_bytes() == content[: len(content) // 2]
    assert_same_run(tmp_path, whole)


def test_a_run_that_is_refused_is_left_as_it_is(tmp_path):
    train(tmp_path, checkpoint_seconds=0.0)
    (tmp_path / f"checkpoint-{STEPS:08}.npz").write_bytes(b"")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"strength: 0\.1 → 0\.7"):
        train(tmp_path, replace(PRESET, strength=0.7))
    assert contents(tmp_path) == before


def test_an_evaluation_says_that_it_takes_the_checkpoint_before_a_damaged_one(tmp_path):
    train(tmp_path, checkpoint_seconds=0.0)
    (tmp_path / f"checkpoint-{STEPS:08}.npz").write_bytes(b"")
    before = contents(tmp_path)
    with pytest.warns(UserWarning, match="is damaged .* the one before is taken"):
        imaml.evaluate(tmp_path, PRESET, EVALUATION_TASKS)
    assert contents(tmp_path) == before


def test_the_last_checkpoints_and_the_best_are_kept_and_the_best_can_be_evaluated(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(runlog, "RECENT", 1)
    losses = {p.step: p.loss for p in whole.seen}
    last = next(step for step in range(2, STEPS + 1) if losses[step] > losses[step - 1])  # so not the best
    train(tmp_path, checkpoint_seconds=0.0, keep_checkpoints=1, on_progress=stop_at(last))
    best = min(range(1, last), key=losses.get)
    names = {name for name in contents(tmp_path) if name.endswith(".npz")}
    assert names == {f"checkpoint-{step:08}.npz" for step in (best, last)}
    # The tasks that are evaluated on have no say in it: the loss is that of the training tasks in the log.
    assert checkpoints.best(tmp_path).loss == losses[best]
    theta = checkpoints.best(tmp_path).restore(initial_state(PRESET)).theta
    expected = imaml.evaluate(theta, PRESET, EVALUATION_TASKS)
    assert imaml.evaluate(tmp_path, PRESET, EVALUATION_TASKS, best=True) == expected


def test_leftovers_of_a_killed_process_are_swept_when_the_run_goes_on(tmp_path):
    stop_halfway(tmp_path)
    ours, foreign = tmp_path / ".checkpoint-00000004.npz.0123456789abcdef.imaml-tmp", tmp_path / ".mine"
    ours.touch(), foreign.touch()
    train(tmp_path)
    assert not ours.exists() and foreign.exists()


def test_other_versions_are_told_and_do_not_stop_a_run(whole, tmp_path, monkeypatch):
    stop_halfway(tmp_path)
    versions = training.versions()
    monkeypatch.setattr(training, "versions", lambda: versions | {"jax": "9.9"})
    events = []
    train(tmp_path, on_event=events.append)
    assert f"going on with other versions, so bits may differ (jax: {versions['jax']} → 9.9)" in events


def test_a_checkpoint_says_what_it_belongs_to(whole):
    description = checkpoints.newest(whole.run.directory).description
    assert description["preset"] == PRESET.name and description["config"] == PRESET.config()
    assert description["data"] == datasets.load("tiny").fingerprint()
    assert {"python", "jax", "jaxlib", "numpy", "imaml", "devices"} == set(description["versions"])
    leaves = [path for path, _, _ in description["leaves"]]
    assert {"key", "step"} <= set(leaves) and {path.split("/")[0] for path in leaves} == {
        "theta", "optimizer", "key", "step"
    }  # fmt: skip


def test_a_hundred_steps_are_one_trace(traces, tiny_pixels):
    preset, traced = replace(PRESET, outer=replace(PRESET.outer, steps=100)), len(traces)
    mesh = global_mesh(preset.outer.tasks)
    compiler = compilation.StepCompiler(preset, mesh)
    steps = training._steps(preset, mesh, initial_state(preset), tiny_pixels, compiler)
    # Each number is asked for before the step after the next is begun, as in a run: devices that meet in a sum
    # need a thread each, and a hundred steps under way would leave them none.
    assert [int(state.step) for state, _ in steps] == list(range(1, 101))
    assert len(traces) - traced == 1
