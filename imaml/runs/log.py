"""The log of a run, from which plots and tables are made: a text file with one JSON line for each meta-step."""

import itertools
import json
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from imaml.storage.files import write_whole

FILE = "metrics.jsonl"
RECENT = 100
"""Number of meta-steps in the mean :attr:`LogWriter.recent_loss`."""


@dataclass(frozen=True)
class Progress:
    """Report of one meta-step, as displayed and logged.

    Attributes:
        step: number of meta-steps done, this one included.
        steps: number of meta-steps of the run.
        loss: mean query loss, in nats, or the mean squared error of a regression.
        accuracy: mean query accuracy after adaptation, on training classes, in [0, 1]; None for a regression.
        tasks: number of tasks in the mean gradient. A task is left out if its numbers are not finite, or if the
            relative residual of its adjoint system is above 1, which is the residual of the zero vector.
        inner_residual: median over tasks, non-finite values excluded, of the inner gradient's norm at the adapted
            parameters φ. This is ‖∇loss + λ(φ − θ)‖, or ‖∇loss‖ if the algorithm has no λ.
        linear_residual: median over tasks, non-finite values excluded, of the true relative residual of the adjoint
            system; 0 if the algorithm solves no such system.
        statuses: how many tasks ended with each :class:`bilevel.Status`, by the name of the status.
        seconds: wall time since this process began to train.
        validation: accuracy or mean squared error on validation tasks after this meta-step; None if the meta-step was
            not validated.
        validation_interval: half the width of the 95 % interval of ``validation``.
    """

    step: int
    steps: int
    loss: float
    accuracy: float | None
    tasks: int
    inner_residual: float
    linear_residual: float
    statuses: dict[str, int]
    seconds: float
    validation: float | None = None
    validation_interval: float | None = None


class LogWriter:
    """Writer that appends to a run's log; a context manager.

    Args:
        directory: the run's folder.
        step: meta-steps done in the checkpoint that the run resumes from; 0 for a new run. The log's lines of later
            steps are dropped.
    """

    def __init__(self, directory: Path, step: int):
        path = directory / FILE
        kept = [entry for entry in read_log(directory) if entry.step <= step]
        write_whole(path, lambda stream: stream.write("".join(map(_line, kept)).encode()))
        self._losses = deque((entry.loss for entry in kept), maxlen=RECENT)
        self._stream = path.open("a", buffering=1)

    def write(self, progress: Progress) -> None:
        """Append one line. Another process can read the line as soon as this method returns."""
        self._stream.write(_line(progress))
        self._losses.append(progress.loss)

    def sync(self) -> None:
        """Flush all lines to disk before returning."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last ``RECENT`` steps; infinite after fewer steps, because a shorter mean is too noisy."""
        return sum(self._losses) / RECENT if len(self._losses) == RECENT else float("inf")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stream.close()


def read_log(directory: Path) -> list[Progress]:
    """Return the log's entries in order, without truncated or damaged lines; an empty list if there is no log."""
    path = directory / FILE
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    entries = (_parsed(line) for line in lines)
    return [entry for entry in entries if entry is not None]


def losses_of(log: list[Progress]) -> tuple[float, int, float] | None:
    """Return the least mean loss over ``RECENT`` meta-steps in a row, its last step, and the mean of the last ones.

    The result is None for a log with fewer than ``RECENT`` entries. A NaN among the losses is counted as infinity.
    """
    if len(log) < RECENT:
        return None
    losses = np.array([np.inf if np.isnan(entry.loss) else entry.loss for entry in log])
    means = np.lib.stride_tricks.sliding_window_view(losses, RECENT).mean(1)
    least = int(means.argmin())
    return float(means[least]), log[least + RECENT - 1].step, float(means[-1])


def time_of(log: list[Progress]) -> tuple[float, int]:
    """Return the seconds of training in a log, and the number of processes that wrote the log one after another.

    Each process measures time from its own start. Where an entry's time is less than that of the entry before it,
    another process has resumed the run. The sum adds the last time of each process. If a process was killed, the steps
    after its last checkpoint are neither in the log nor in the sum. A resumption is overlooked if the first time
    of the new process is not less than the last time of the process before it.
    """
    total, stretches = 0.0, 0
    for entry, following in itertools.zip_longest(log, log[1:]):
        if following is None or following.seconds < entry.seconds:
            total, stretches = total + entry.seconds, stretches + 1
    return total, stretches


def _line(progress):
    """Return the line of an entry. It has no field about validation if the meta-step was not validated."""
    fields = asdict(progress)
    if progress.validation is None:
        del fields["validation"], fields["validation_interval"]
    return json.dumps(fields) + "\n"


def _parsed(line):
    """Return the entry in a line, or None if the line cannot be read."""
    try:
        return Progress(**json.loads(line))
    except (ValueError, TypeError):
        return None
