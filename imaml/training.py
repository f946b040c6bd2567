"""Training: the loop around the meta-step that logs, saves, and stops when it is told to.

The loop asks for the numbers of a step only when the next one is under way, so that writing them costs
nothing.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals

import jax
import numpy as np

import bilevel as bl
from imaml import checkpoints, datasets
from imaml.algorithms import MetaGradient
from imaml.datasets.images import ImageDataset
from imaml.devices import devices_for, on_all
from imaml.errors import InputError
from imaml.evaluation import Evaluation, evaluate_classes
from imaml.interruption import stop_on_signals
from imaml.meta_step import TrainState, initial_state, meta_step
from imaml.presets import Preset
from imaml.runlog import LogWriter, Progress

RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """A run that has come to an end or was stopped.

    Attributes:
        directory: its folder: the checkpoint, ``metrics.jsonl``, ``result.json``.
        preset: its settings.
        theta: the learned parameters.
        step: meta-steps done.
        finished: whether all meta-steps were done; if not, the same call resumes.
        stopped_by: the signal that stopped it, or None.
        evaluation: accuracy on held-out classes, where it finished.
    """

    directory: Path
    preset: Preset
    theta: dict
    step: int
    finished: bool
    stopped_by: Signals | None
    evaluation: Evaluation | None


def train(
    preset: Preset,
    directory: str | Path,
    data: str | Path | None = None,
    *,
    on_event: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    evaluation_tasks: int = 600,
    checkpoint_seconds: float = 30.0,
) -> Run:
    """Train, or go on from the checkpoint in ``directory``; at the end evaluate on held-out classes.

    SIGINT and SIGTERM end the step, save, and return an unfinished :class:`Run`.

    Args:
        preset: the settings; a checkpoint made with others is refused.
        directory: the run's folder, made where it does not exist.
        data: the folder of the dataset's archives, for a dataset that is not embedded.
        on_event: told in a phrase what takes time: reading data, compiling, evaluating.
        on_progress: called after every meta-step.
        evaluation_tasks: held-out tasks at the end.
        checkpoint_seconds: save no more often than this.

    Raises:
        InputError: for data or settings that cannot be used, or training that diverged.
        OSError: for a folder that cannot be written.
    """
    directory = Path(directory)
    on_event(f"reading {preset.dataset}")
    dataset = datasets.load(preset.dataset, data)
    check(preset, dataset)
    description = {"preset": preset.name, "config": preset.config(), "data": dataset.fingerprint()}
    start = state = _resume(directory, initial_state(preset), description)
    directory.mkdir(parents=True, exist_ok=True)
    with (
        stop_on_signals(lambda: on_event("stopping after this meta-step; once more stops at once")) as stop,
        LogWriter(directory, int(start.step)) as log,
    ):
        started = saved = time.monotonic()
        for state, report in _steps(preset, start, dataset.train.pixels, on_event):
            now = time.monotonic()
            progress = _progress(preset, state, report, now - started)
            log.write(progress)
            on_progress(progress)
            if now - saved > checkpoint_seconds:
                checkpoints.save(directory, state, description)
                saved = now
            if stop:
                break
        checkpoints.save(directory, state, description)
    finished = int(state.step) == preset.outer.steps
    evaluation = None
    if finished and not stop:
        on_event(f"evaluating on {evaluation_tasks} tasks of held-out classes")
        evaluation = evaluate_classes(state.theta, preset, dataset.test, evaluation_tasks)
        _write_result(directory, description | {"evaluation": asdict(evaluation)})
    return Run(directory, preset, state.theta, int(state.step), finished, stop.received, evaluation)


def check(preset: Preset, dataset: ImageDataset) -> None:
    """Raise InputError where the dataset cannot fill the preset's tasks, in training or in evaluation."""
    preset.training_episode.check(dataset.train, f"{dataset.name}'s training set")
    preset.episode.check(dataset.test, f"{dataset.name}'s test set")


def _resume(directory, initial, description):
    """The state to go on from: the checkpoint's if there is one and it is of this very run."""
    found = checkpoints.describe(directory)
    if found is None:
        return initial
    differences = _differences(found["config"], description["config"])
    if differences:
        raise InputError(
            f"{directory} holds a run with other settings ({'; '.join(differences)}): use another --out, or delete it"
        )
    if found["data"] != description["data"]:
        raise InputError(f"{directory} holds a run on other data than this: use another --out, or delete it")
    return checkpoints.load(directory, initial)[0]


def _differences(saved, wanted, prefix=""):
    found = []
    for name in sorted(set(saved) | set(wanted)):
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: there {old}, here {new}")
    return found


def _steps(preset, state, pixels, on_event) -> Iterator[tuple[TrainState, MetaGradient]]:
    """The state and report after each remaining step, handed on when the next one is under way."""
    remaining = preset.outer.steps - int(state.step)
    if remaining <= 0:
        return
    on_event("compiling the meta-step")
    state, pixels = on_all((state, pixels), devices_for(preset.outer.tasks))
    step = jax.jit(meta_step(preset))
    done = step(state, pixels)
    for _ in range(remaining - 1):
        under_way = step(done[0], pixels)
        yield done
        done = under_way
    yield done


def _progress(preset, state, report, seconds):
    if not int(report.tasks):
        raise InputError(
            f"meta-step {int(state.step)} had no task with finite numbers, so θ was not updated: training has "
            "diverged; lower inner.step_size or outer.learning_rate, or raise strength"
        )
    statuses = Counter(bl.Status(int(status)).name for status in np.asarray(report.status))
    return Progress(
        step=int(state.step),
        steps=preset.outer.steps,
        loss=float(report.value),
        accuracy=float(report.accuracy),
        tasks=int(report.tasks),
        inner_residual=_median(report.inner_residual),
        linear_residual=_median(report.linear_residual),
        statuses=dict(statuses),
        seconds=seconds,
    )


def _median(values):
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("inf")


def _write_result(directory, record):
    temporary = directory / f"{RESULT}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(directory / RESULT)
