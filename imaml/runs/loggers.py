"""Loggers, which send the progress of a training run to another program: TensorBoard, or Weights & Biases.

A run writes its log to ``metrics.jsonl`` in its folder in any case. The libraries of the loggers are optional, and are
imported when training begins.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from imaml.errors import InputError
from imaml.runs.log import Progress
from imaml.runs.results import Evaluation


class Logger(Protocol):
    """The methods of a logger that :func:`imaml.train` calls. With several processes, only process 0 calls them."""

    def begin(self, directory: Path, description: dict[str, Any], step: int) -> None:
        """Start to log.

        Args:
            directory: the run's folder.
            description: facts about the run in JSON types: its preset, its settings as ``config``, and versions.
            step: number of meta-steps that are already done; 0 for a new run.
        """

    def step(self, progress: Progress) -> None:
        """Log a meta-step."""

    def end(self, evaluation: Evaluation | None) -> None:
        """Log the evaluation of a finished run, and close the logger.

        Args:
            evaluation: None if the run was stopped, failed or is not evaluated.
        """


def scalars(progress: Progress) -> dict[str, float]:
    """Return the numbers of a meta-step by name, such as ``train/loss``, and the fraction of tasks with each status.

    >>> found = scalars(Progress(1, 10, 1.5, 0.25, 4, 0.1, 0.2, {"BUDGET_USED": 3, "MAX_STEPS": 1}, 2.0))
    >>> found["train/loss"], found["status/MAX_STEPS"], "validation/value" in found
    (1.5, 0.25, False)
    """
    total = sum(progress.statuses.values())
    found = {
        "train/loss": progress.loss,
        "train/accuracy": progress.accuracy,
        "train/tasks": progress.tasks,
        "residual/inner": progress.inner_residual,
        "residual/linear": progress.linear_residual,
        "validation/value": progress.validation,
        "validation/interval": progress.validation_interval,
        "time/seconds": progress.seconds,
    }
    found |= {f"status/{name}": count / total for name, count in progress.statuses.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def results(evaluation: Evaluation) -> dict[str, float]:
    """Return the values and intervals of an evaluation by name, such as ``test/query batch/accuracy``.

    >>> results(Evaluation("accuracy", 0.8, 0.01, 0.2, 600, "none"))
    {'test/none/accuracy': 0.8, 'test/none/interval': 0.01}
    """
    found = {}
    for each in evaluation.each:
        found[f"test/{each.normalisation}/{each.metric}"] = each.value
        found[f"test/{each.normalisation}/interval"] = each.interval
    return found


@dataclass
class TensorBoard:
    """Logger that writes event files for TensorBoard, by the library tensorboardX.

    Args:
        directory: the folder of the event files. By default ``tensorboard`` in the run's folder.

    ``imaml.train(preset, "runs/first", loggers=[imaml.TensorBoard()])`` writes to ``runs/first/tensorboard``, and
    ``tensorboard --logdir runs`` shows it.
    """

    directory: str | Path | None = None
    _writer: Any = field(default=None, init=False, repr=False)
    _last: int = field(default=0, init=False, repr=False)

    def begin(self, directory: Path, description: dict[str, Any], step: int) -> None:
        """Open the event file.

        If ``step`` is not 0, TensorBoard hides the events that an earlier process wrote for later meta-steps.
        """
        library = _imported("tensorboardX")
        folder = directory / "tensorboard" if self.directory is None else Path(self.directory)
        self._last = step
        self._writer = library.SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        lines = [f"    {name}: {value}" for name, value in description["config"].items()]
        self._writer.add_text("settings", "\n".join(lines), step)

    def step(self, progress: Progress) -> None:
        """Write the numbers of a meta-step."""
        self._last = progress.step
        for name, value in scalars(progress).items():
            self._writer.add_scalar(name, value, progress.step)

    def end(self, evaluation: Evaluation | None) -> None:
        """Write the evaluation, and close the file."""
        for name, value in {} if evaluation is None else results(evaluation).items():
            self._writer.add_scalar(name.replace(" ", "_"), value, self._last)
        self._writer.close()


@dataclass
class WeightsAndBiases:
    """Logger that sends a run to Weights & Biases, by the library wandb.

    A resumed run continues its run at Weights & Biases. The file ``wandb-id`` in the run's folder has the id of that
    run, unless ``options`` has an ``id``.

    Args:
        project: the name of the project.
        options: further arguments of ``wandb.init``, such as ``{"mode": "offline"}``.
    """

    project: str = "imaml"
    options: dict[str, Any] = field(default_factory=dict)
    _run: Any = field(default=None, init=False, repr=False)

    def begin(self, directory: Path, description: dict[str, Any], step: int) -> None:
        """Start a run at Weights & Biases. If ``step`` is not 0, continue the run whose id is in the folder."""
        library = _imported("wandb")
        path = directory / "wandb-id"
        identity = path.read_text().strip() if step and path.exists() else uuid4().hex
        path.write_text(f"{identity}\n")
        options = {"name": directory.name, "dir": str(directory), "id": identity, "resume": "allow"} | self.options
        self._run = library.init(project=self.project, config=description, **options)

    def step(self, progress: Progress) -> None:
        """Send the numbers of a meta-step."""
        self._run.log(scalars(progress), step=progress.step)

    def end(self, evaluation: Evaluation | None) -> None:
        """Send the evaluation as the summary of the run, and finish it."""
        if evaluation is not None:
            self._run.summary.update(results(evaluation))
        self._run.finish()


class Loggers:
    """Several loggers as one. A logger gets meta-steps and is ended only if its ``begin`` raised no error."""

    def __init__(self, loggers: Sequence[Logger]):
        self._loggers, self._begun = loggers, []

    def begin(self, directory: Path, description: dict[str, Any], step: int) -> None:
        """Begin each logger."""
        for logger in self._loggers:
            logger.begin(directory, description, step)
            self._begun.append(logger)

    def step(self, progress: Progress) -> None:
        """Pass a meta-step to each logger."""
        for logger in self._begun:
            logger.step(progress)

    def end(self, evaluation: Evaluation | None) -> None:
        """End each logger."""
        while self._begun:
            self._begun.pop().end(evaluation)


def _imported(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this logger needs {module}, which cannot be imported ({error}): pip install {module}"
        ) from error
