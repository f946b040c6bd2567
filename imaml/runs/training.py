"""Training: a loop of meta-steps that writes a log, saves checkpoints and stops on a signal.

In a run of one process, the loop reads a step's numbers only after it has dispatched the next step. Logging and saving
therefore overlap with computation.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from signal import Signals, raise_signal
from typing import Any

import jax
import numpy as np

import bilevel as bl
from imaml.datasets import Dataset
from imaml.datasets.omniglot_alphabets import is_other_split
from imaml.errors import InputError, TrainingFailed, check
from imaml.learning.meta_gradient import MetaGradient
from imaml.parallel.devices import from_first, gathered, global_mesh, here, is_first, on_all
from imaml.runs import checkpoints
from imaml.runs import data as run_data
from imaml.runs.evaluation import evaluate_classes
from imaml.runs.folder import NullRunFolder, RunFolder
from imaml.runs.interruption import stop_on_signals
from imaml.runs.log import RECENT, Progress, losses_of, read_log
from imaml.runs.loggers import Logger, Loggers
from imaml.runs.meta_step import TrainState, initial_state
from imaml.runs.progress import Reporter
from imaml.runs.results import Run
from imaml.runs.start import read_start
from imaml.runs.step_compiler import StepCompiler
from imaml.runs.validation import Validator
from imaml.runs.versions import versions
from imaml.settings.preset import Preset
from imaml.settings.saved import completed

PATIENCE = 100
"""Meta-steps in a row without a usable gradient after which training gives up: θ has not moved in any of them."""

WORSENED = 1.5
"""A run is reported as unstable if its loss at the end is more than this many times its least value.

The means over 100 meta-steps of a stable run hardly rise. A classifier of N classes that falls to chance has a loss of
about ln N only, so a larger factor would miss the fall of a run that has not learned much yet.
"""


def train(
    preset: Preset,
    directory: str | Path,
    data: str | Path | None = None,
    *,
    dataset: str | Dataset | None = None,
    start: str | Path | Run | Any = None,
    devices: int | str | None = None,
    on_event: Callable[[str], None] = lambda message: None,
    on_warning: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    progress: bool = False,
    loggers: Sequence[Logger] = (),
    evaluation_tasks: int = 600,
    checkpoint_seconds: float = 30.0,
    keep_checkpoints: int = checkpoints.KEEP,
) -> Run:
    """Train a preset, or resume from the last intact checkpoint in ``directory``; then evaluate on test classes.

    On the same machine, a run that was stopped or killed and then resumed ends with the same bits as an uninterrupted
    run. On SIGINT or SIGTERM during the meta-steps, the current one is finished and saved, and a :class:`Run` without
    evaluation is returned.

    With ``preset.validation.every``, tasks of validation classes are evaluated during training. The result is then θ
    with the best validation, not the last one, and ``preset.validation.patience`` stops a run that does not improve any
    more. A resumed run validates at the same meta-steps, with the same tasks, as an uninterrupted one.

    A run is extended if ``preset`` differs from that of the folder only by a larger ``outer.steps``. This holds for a
    stopped run, a finished one, and one that stopped early. The state of Adam is kept. After the extension, the
    learning rate is that of a run of the new length. A rate that had fallen to 0 thus rises again: a cosine that ended
    after 1,000 meta-steps goes on at half of the first rate in a run of 2,000. The folder records each extension, and
    keeps the earlier result as ``result-NNNNNNNN.json``, with the old number of meta-steps in its name.

    If JAX runs in several processes, each process must call this function. The tasks are then divided among the
    processes, a signal to any of them stops all at the same step, and only process 0 writes to the folder.

    Args:
        preset: the settings. A checkpoint in ``directory`` must have been saved with the same settings, except that
            ``outer.steps`` may be larger now, and with the same types of the preset and of its components, such as
            ``network``.
        directory: the run's folder, created if it does not exist.
        data: the folder of the dataset's files, for a dataset that is read from files.
        dataset: another dataset than the preset's: an :class:`imaml.ImageDataset`, another object with ``name``,
            ``train``, ``test`` and ``fingerprint()``, the name of a dataset of this package or of a registered one, or
            ``"folder"`` to read the images in ``data``. The settings of the run have the name of this dataset in
            place of the name in ``preset``. To resume, pass the ``preset`` of the returned :class:`imaml.Run`: a folder
            of images or a registered dataset is then read again. Any other dataset must be passed again.
        start: the parameters to start from, for fine-tuning: a run's folder, a file that :meth:`TrainedLearner.save`
            wrote, the name of a record whose parameters come with the package, a :class:`imaml.Run`, a
            :class:`imaml.TrainedLearner` or a pytree of arrays. Adam's state is new, and ``directory`` must be another
            folder than that of the run to start from. The new run records where θ came from with a SHA-256 of the
            arrays, and resumes only with a start of the same contents. By default, θ is drawn with the seed.
        devices: number of devices of each process that the tasks are spread over, or ``"all"``; by default the largest
            number that divides the tasks.
        on_event: called with a message before reading data, compiling and evaluating, and after a stop was requested.
        on_warning: called with a message if classes have too few images and are left out, if a file is damaged, if a
            checkpoint was saved with other versions, if ``result.json`` is not replaced, if outputs in a validation or
            the evaluation are not finite, if a run is extended, if the loss at the end of the meta-steps is more than
            1.5 times its least value, or if ``start`` may have been trained on test classes of these data; by default
            ``on_event``, which does nothing unless it is given or ``progress`` is True.
        on_progress: called after every meta-step.
        progress: whether to print the events, and a progress bar with loss, accuracy and the time left. In a notebook
            or a file, there is a line every ten seconds instead of the bar.
        loggers: where else to send the progress, such as :class:`imaml.TensorBoard`. The log in the folder is written
            in any case.
        evaluation_tasks: number of held-out tasks in the evaluation at the end, at least 2. If ``result.json`` has an
            evaluation of the same run on more tasks, it is not replaced. 0 for no evaluation: the test classes are then
            not looked at.
        checkpoint_seconds: least time between two checkpoints. The checkpoint at the end, and one after each validation
            that is the best so far, are saved in any case.
        keep_checkpoints: number of last checkpoints that are kept, at least 1. The best one is kept in addition: the
            one with the best validation or, without validation, the one with the least mean query loss, on training
            classes, over the 100 meta-steps before it.

    Raises:
        InputError: if data, settings or ``start`` cannot be used or differ between processes, if the dataset has no
            validation classes and none are held out, if the tasks cannot be divided among the devices, if another
            process trains in the folder, if the folder holds another run, if training diverges, or if 100 meta-steps in
            a row have no task with a usable gradient.
        OSError: if the disk is full or the folder cannot be written; the last checkpoint is then left unchanged.

    Source: Rajeswaran et al. (2019), algorithm 1.
    """
    log = Loggers(tuple(loggers) if is_first() else ())
    reporter = Reporter() if progress and is_first() else None
    if reporter is not None:
        on_event, on_progress = _both(reporter.event, on_event), _both(reporter.step, on_progress)
    run = None
    try:
        run = _train(
            preset, Path(directory), data, dataset=dataset, start=start, devices=devices, on_event=on_event,
            on_warning=on_warning or on_event, on_progress=_both(on_progress, log.step), on_begin=log.begin,
            evaluation_tasks=evaluation_tasks, checkpoint_seconds=checkpoint_seconds,
            keep_checkpoints=keep_checkpoints,
        )  # fmt: skip
        return run
    finally:
        if reporter is not None:
            reporter.finish()
        log.end(None if run is None else run.evaluation)


def _both(one, other):
    """Return a function that calls two functions with its argument."""

    def call(argument):
        one(argument)
        other(argument)

    return call


def _train(
    preset, directory, data, *, dataset, start, devices, on_event, on_warning, on_progress, on_begin, evaluation_tasks,
    checkpoint_seconds, keep_checkpoints,
) -> Run:  # fmt: skip
    """Train as :func:`train` does, and call ``on_begin(directory, description, step)`` before the first meta-step."""
    check(
        evaluation_tasks == 0 or evaluation_tasks >= 2,
        f"an evaluation needs at least 2 tasks, got {evaluation_tasks}: pass 0 for none",
    )
    if keep_checkpoints < 1:
        raise InputError(f"at least 1 checkpoint must be kept, got {keep_checkpoints}")
    mesh = global_mesh(preset.outer.tasks, devices)
    compiler = StepCompiler(preset, mesh, on_event)
    on_event(f"reading {run_data.name_of(preset, dataset)}")
    meanwhile = partial(_compile_ahead, preset, compiler)
    preset, present, source = run_data.choose(preset, data, dataset, directory, meanwhile, on_warning)
    parts = ["train"] + ["validation"] * bool(preset.validation.every) + ["test"] * bool(evaluation_tasks)
    classes = {part: run_data.usable(preset, present, part, on_warning) for part in parts}
    validator = Validator(preset, classes.get("validation"), on_warning)
    theta, origin = read_start(preset, start, on_warning)
    description = {
        "preset": preset.name,
        "config": preset.config(),
        "types": preset.types(),
        "data": present.fingerprint(),
        "versions": versions() | {"devices": f"{mesh.size} {jax.default_backend()}"},
    }
    description |= origin | ({} if source is None else {"source": source})
    _check_alike({name: description[name] for name in ("config", "types", "data", *origin)})
    _warn_of_test_classes(origin.get("start", {}), preset, description["data"], on_warning)
    evaluation = None
    with (
        RunFolder(directory, description, keep_checkpoints, checkpoint_seconds, on_warning, partial(completed, preset))
        if is_first()
        else NullRunFolder()
    ) as folder:
        first = initial_state(preset)
        begun = state = from_first(folder.resume(first if theta is None else replace(first, theta=theta)))
        selection = validator.begin(folder.saved.get("validation"))
        if is_first():
            on_begin(directory, description, int(begun.step))
        with stop_on_signals(lambda: on_event("stopping after this meta-step; a second signal stops at once")) as stop:
            started, idle = time.monotonic(), 0
            steps = 0 if validator.ends(selection) else preset.outer.steps - int(begun.step)
            for state, report in _steps(preset, mesh, begun, classes["train"].source, compiler, steps):
                progress = _progress(preset, state, report, time.monotonic() - started)
                progress = validator.validated(progress, state.theta)
                selection = validator.chosen(selection, progress)
                folder.record(progress, state, *validator.saved(selection, progress.step))
                on_progress(progress)
                idle = 0 if progress.tasks else idle + 1
                if idle == PATIENCE:
                    raise TrainingFailed(_without_gradients(preset, progress))
                if number := gathered(np.array(stop.received or 0, np.int32)).max():
                    stop.received = Signals(number)
                    break
                if validator.ends(selection):
                    break
            done = int(state.step)
            facts, loss = validator.saved(selection, done)
            folder.save(done, state, facts, loss)
            if is_first():
                if source is None:
                    run_data.keep(directory, present)
                if message := _worsened(preset, directory, done):
                    on_warning(message)
        theta = from_first(folder.best(state)).theta if selection.step else state.theta
        finished = done == preset.outer.steps or validator.ends(selection)
        if finished and not stop and evaluation_tasks:
            on_event(f"evaluating on {evaluation_tasks} tasks of held-out {preset.episode.kind}")
            evaluation = evaluate_classes(theta, preset, classes["test"], evaluation_tasks, on_warning)
            folder.finish(evaluation.records(), facts and facts | {"meta_steps": done})
    own = None if source is None else present
    best_step = selection.step or None
    return Run(directory, preset, theta, done, finished, stop.received, evaluation, own, best_step)


def _check_alike(facts):
    """Raise InputError if another process has other settings, data or parameters to start from than this one."""
    digest = np.frombuffer(sha256(json.dumps(facts, sort_keys=True).encode()).digest(), np.uint8)
    others = [number for number, other in enumerate(gathered(digest)) if (other != digest).any()]
    if others:
        raise InputError(f"processes {others} were started with other settings, data or start than this process")


def _warn_of_test_classes(start, preset, data, on_warning):
    """Call ``on_warning`` if the parameters were trained on another split of the data, or on others of that name."""
    if is_other_split(start.get("dataset", ""), preset.dataset):
        on_warning(
            f"{start['from']} was trained on {start['dataset']}, which splits the same characters in another way: test "
            f"characters of {preset.dataset} are among its training characters"
        )
    if start.get("dataset") == preset.dataset and start.get("data", data) != data:
        on_warning(
            f"{start['from']} was trained on other data that are called {preset.dataset} too: test classes of the "
            "present data may be among its training classes"
        )


def _compile_ahead(preset, compiler, expected):
    """Start to compile the step for the expected shapes of the data; other shapes will need another compilation."""
    try:
        if preset.validation.held_out:
            expected, _ = run_data.without_held_out(preset, expected, preset.dataset)
        preset.training_episode.check(expected, preset.dataset)
    except InputError:  # The check of the real data raises this error too, and names the part of the data.
        return
    # Delay signals until the trace is done: an exception during a trace may be swallowed by JAX's callbacks.
    with stop_on_signals() as stop:
        compiler.begin(expected.source)
    if stop.received:
        raise_signal(stop.received)


def _steps(preset, mesh, state, source, compiler, remaining) -> Iterator[tuple[TrainState, MetaGradient]]:
    """Yield state and report of each of the remaining steps, after dispatching the next step, if there is one."""
    if remaining <= 0:
        return
    step = compiler.step(source)
    state, source = on_all((state, source), mesh)
    done = step(state, source)
    for _ in range(remaining - 1):
        under_way = step(done[0], source)
        if jax.process_count() > 1:  # gloo sums across CPU processes and must not run two programs at once.
            jax.block_until_ready(under_way)
        yield here(done)
        done = under_way
    yield here(done)


def _progress(preset, state, report, seconds):
    """Return the log entry of a meta-step; raise TrainingFailed if no task had finite numbers."""
    if (np.asarray(report.status) == bl.Status.NONFINITE).all():
        raise TrainingFailed(
            f"meta-step {int(state.step)} had no task with finite numbers, so θ was not updated: training has "
            f"diverged; lower {_likely_causes(preset)}"
        )
    statuses = Counter(bl.Status(int(status)).name for status in np.asarray(report.status))
    return Progress(
        step=int(state.step),
        steps=preset.outer.steps,
        loss=float(report.value),
        accuracy=float(report.accuracy) if preset.episode.metric == "accuracy" else None,
        tasks=int(report.tasks),
        inner_residual=_median(report.inner_residual),
        linear_residual=_median(report.linear_residual),
        statuses=dict(statuses),
        seconds=seconds,
    )


def _likely_causes(preset):
    """Return the changes of settings that may prevent a divergence, as words that follow "lower"."""
    inner = "inner.step_size or " if isinstance(preset.inner, bl.GradientDescent) else ""
    return f"{inner}outer.learning_rate" + (", or raise strength" if preset.algorithm == "imaml" else "")


def _without_gradients(preset, progress):
    """Return the message for a run whose θ does not move, because the adjoint system of no task could be solved."""
    remedy = "raise linear.max_steps or strength" if preset.algorithm == "imaml" else _likely_causes(preset)
    return (
        f"none of the tasks of the last {PATIENCE} meta-steps had a usable gradient, so θ did not move: in the last "
        f"one, the median relative residual of the adjoint systems is {progress.linear_residual:.1f}, and a residual "
        f"above 1 is larger than that of the zero vector; {remedy}"
    )


def _worsened(preset, directory, done):
    """Return a message if the loss at the end of a run's log is far above its least value, otherwise None."""
    losses = losses_of(read_log(directory))
    if losses is None or losses[2] <= WORSENED * losses[0]:
        return None
    least, step, last = losses
    kept, best = checkpoints.best(directory), ""
    if kept is not None and kept.step != done:
        best = f" 'imaml evaluate RUN --best' takes θ of meta-step {kept.step}."
    return (
        f"training became unstable: the mean query loss over {RECENT} meta-steps was {least:.3g} at meta-step {step}, "
        f"and is {last:.3g} now.{best} In a new run, lower {_likely_causes(preset)}"
    )


def _median(values):
    """Return the median of the finite values, infinity if there are none."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("inf")
