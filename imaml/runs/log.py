"""The log of a run: one JSON line for each meta-step, which plots and tables are made from."""

import json
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from imaml.storage.files import write_whole

FILE = "metrics.jsonl"
RECENT = 100
"""Meta-steps whose mean loss is called the recent one."""


@dataclass(frozen=True)
class Progress:
    """One meta-step, as it is shown and logged.

    Attributes:
        step: meta-steps done, this one included.
        steps: meta-steps of the run.
        loss: mean query loss, in nats, or the mean squared error.
        accuracy: mean query accuracy after adaptation, on training classes, in [0, 1]; None of a regression.
        tasks: tasks whose gradient counted: finite, and of a linear solve that is no worse than none.
        inner_residual: median over tasks (those where it is finite) of ‖∇loss + λ(φ − θ)‖, or of ‖∇loss‖ where the
            algorithm has no λ.
        linear_residual: the same of the adjoint system's true relative residual; 0 where there is no such system.
        statuses: how many tasks ended with which :class:`bilevel.Status`.
        seconds: wall time since this process began to train.
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


class LogWriter:
    """Appends to the log; on resuming, what the log holds beyond the checkpoint's step is dropped first."""

    def __init__(self, directory: Path, step: int):
        path = directory / FILE
        kept = [entry for entry in read_log(directory) if entry.step <= step]
        write_whole(path, lambda stream: stream.write("".join(map(_line, kept)).encode()))
        self._losses = deque((entry.loss for entry in kept), maxlen=RECENT)
        self._stream = path.open("a", buffering=1)

    def write(self, progress: Progress) -> None:
        """Append one line."""
        self._stream.write(_line(progress))
        self._losses.append(progress.loss)

    def sync(self) -> None:
        """All lines are on disk when this returns."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last ``RECENT`` steps; infinite before so many are done, when it is mostly noise."""
        return sum(self._losses) / RECENT if len(self._losses) == RECENT else float("inf")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stream.close()


def read_log(directory: Path) -> list[Progress]:
    """All steps in the log, in order; lines that were cut off or damaged are left out."""
    path = directory / FILE
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    entries = (_parsed(line) for line in lines)
    return [entry for entry in entries if entry is not None]


def _line(progress):
    return json.dumps(asdict(progress)) + "\n"


def _parsed(line):
    try:
        return Progress(**json.loads(line))
    except (ValueError, TypeError):
        return None
