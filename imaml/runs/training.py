"""Training: the loop around the meta-step that logs, saves, and stops when it is told to.

The loop asks for the numbers of a step only when the next one is under way, so that writing them costs
nothing.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from signal import Signals, raise_signal

import jax
import numpy as np

import bilevel as bl
from imaml import datasets
from imaml.datasets import ImageDataset, SinusoidDataset
from imaml.errors import InputError
from imaml.learning.algorithms import MetaGradient
from imaml.parallel.devices import from_first, gathered, global_mesh, here, is_first, on_all
from imaml.runs.checkpoints import KEEP
from imaml.runs.compilation import StepCompiler
from imaml.runs.evaluation import evaluate_classes
from imaml.runs.folder import NullRunFolder, RunFolder
from imaml.runs.interruption import stop_on_signals
from imaml.runs.log import Progress
from imaml.runs.meta_step import TrainState, initial_state
from imaml.runs.results import Run
from imaml.runs.versions import versions
from imaml.settings.preset import Preset
from imaml.settings.saved import completed


def train(
    preset: Preset,
    directory: str | Path,
    data: str | Path | None = None,
    *,
    devices: int | str | None = None,
    on_event: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    evaluation_tasks: int = 600,
    checkpoint_seconds: float = 30.0,
    keep_checkpoints: int = KEEP,
) -> Run:
    """Train, or go on from the last whole checkpoint in ``directory``; at the end evaluate on held-out classes.

    A run that was stopped or killed and gone on with gives the same bits as one that was not, on the same machine.
    SIGINT and SIGTERM end the step, save, and return an unfinished :class:`Run`. Where JAX runs in several processes,
    each calls this: they share out the tasks, stop at the same step whichever of them is told to, and process 0 alone
    reads and writes the folder.

    Args:
        preset: the settings; a checkpoint made with others is refused.
        directory: the run's folder, made where it does not exist.
        data: the folder of the dataset's archives, for a dataset that is not embedded.
        devices: of each process, over which tasks are spread, or ``"all"``; default: as many as divide the tasks.
        on_event: told in a phrase what takes time: reading data, compiling, evaluating.
        on_progress: called after every meta-step.
        evaluation_tasks: held-out tasks at the end.
        checkpoint_seconds: save no more often than this.
        keep_checkpoints: how many of the last checkpoints stay; the best one, by its mean query loss over the last
            meta-steps on training classes, stays besides.

    Raises:
        InputError: for data or settings that cannot be used or that differ between processes, tasks that cannot be
            shared out, a folder that another process is training in, or training that diverged.
        OSError: for a disk that is full or a folder that cannot be written; the last checkpoint stands.
    """
    directory = Path(directory)
    if keep_checkpoints < 1:
        raise InputError(f"at least 1 checkpoint must be kept, got {keep_checkpoints}")
    mesh = global_mesh(preset.outer.tasks, devices)
    compiler = StepCompiler(preset, mesh, on_event)
    on_event(f"reading {preset.dataset}")
    dataset = datasets.load(preset.dataset, data, partial(_compile_ahead, preset, compiler))
    check(preset, dataset)
    description = {
        "preset": preset.name,
        "config": preset.config(),
        "data": dataset.fingerprint(),
        "versions": versions() | {"devices": f"{mesh.size} {jax.default_backend()}"},
    }
    _check_alike({name: description[name] for name in ("config", "data")})
    evaluation = None
    first = is_first()
    with (
        RunFolder(directory, description, keep_checkpoints, checkpoint_seconds, on_event, partial(completed, preset))
        if first
        else NullRunFolder()
    ) as folder:
        start = state = from_first(folder.resume(initial_state(preset)))
        with stop_on_signals(lambda: on_event("stopping after this meta-step; once more stops at once")) as stop:
            started = time.monotonic()
            for state, report in _steps(preset, mesh, start, dataset.train.source, compiler):
                progress = _progress(preset, state, report, time.monotonic() - started)
                folder.record(progress, state)
                on_progress(progress)
                if number := gathered(np.array(stop.received or 0, np.int32)).max():
                    stop.received = Signals(number)
                    break
            folder.save(int(state.step), state)
        finished = int(state.step) == preset.outer.steps
        if finished and not stop:
            on_event(f"evaluating on {evaluation_tasks} tasks of held-out {preset.episode.kind}")
            evaluation = evaluate_classes(state.theta, preset, dataset.test, evaluation_tasks)
            folder.finish({"evaluations": evaluation.records()})
    return Run(directory, preset, state.theta, int(state.step), finished, stop.received, evaluation)


def check(preset: Preset, dataset: ImageDataset | SinusoidDataset) -> None:
    """Raise InputError where the dataset cannot fill the preset's tasks, in training or in evaluation."""
    preset.training_episode.check(dataset.train, f"{dataset.name}'s training set")
    preset.episode.check(dataset.test, f"{dataset.name}'s test set")


def _check_alike(facts):
    """Raise InputError where another process has other facts: it would compute another run's share."""
    digest = np.frombuffer(sha256(json.dumps(facts, sort_keys=True).encode()).digest(), np.uint8)
    others = [number for number, other in enumerate(gathered(digest)) if (other != digest).any()]
    if others:
        raise InputError(f"processes {others} were started with other settings or data than this one")


def _compile_ahead(preset, compiler, expected):
    """Have the step compiled for classes like the ``expected`` ones; where it will be for others, that was in vain."""
    try:
        preset.training_episode.check(expected, preset.dataset)
    except InputError:  # what cannot be drawn is refused when the data are there
        return
    with stop_on_signals() as stop:  # raised amid a trace, an interruption may be lost in JAX's own callbacks
        compiler.begin(expected.source)
    if stop.received:
        raise_signal(stop.received)


def _steps(preset, mesh, state, source, compiler) -> Iterator[tuple[TrainState, MetaGradient]]:
    """The state and report after each remaining step, handed on when the next one is under way."""
    remaining = preset.outer.steps - int(state.step)
    if remaining <= 0:
        return
    step = compiler.step(source)
    state, source = on_all((state, source), mesh)
    done = step(state, source)
    for _ in range(remaining - 1):
        under_way = step(done[0], source)
        if jax.process_count() > 1:  # what processes do together, gloo wants done one after another
            jax.block_until_ready(under_way)
        yield here(done)
        done = under_way
    yield here(done)


def _progress(preset, state, report, seconds):
    if (np.asarray(report.status) == bl.Status.NONFINITE).all():
        raise InputError(
            f"meta-step {int(state.step)} had no task with finite numbers, so θ was not updated: training has "
            f"diverged; lower {_suspects(preset)}"
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


def _suspects(preset):
    inner = "inner.step_size or " if isinstance(preset.inner, bl.GradientDescent) else ""
    return f"{inner}outer.learning_rate" + (", or raise strength" if preset.algorithm == "imaml" else "")


def _median(values):
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("inf")
