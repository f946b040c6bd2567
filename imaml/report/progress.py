"""How a run is shown: a bar that renews itself on a terminal, a plain line now and then elsewhere."""

import shutil
import sys
import time
from typing import TextIO

from imaml.runs.log import Progress

BAR_SECONDS = 0.1
LINE_SECONDS = 10.0
MEMORY = 0.95
"""Of the running means that are shown: a single step of a few tasks is mostly noise."""


class Reporter:
    """Shows events, meta-steps and transfers on ``stream``."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._bar = self._stream.isatty()
        self._shown = float("-inf")
        self._unfinished = False
        self._first: Progress | None = None
        self._loss = self._accuracy = 0.0

    def event(self, message: str) -> None:
        """A phrase about what comes next, on a line of its own."""
        self.finish()
        print(f"{message} …", file=self._stream, flush=True)

    def step(self, progress: Progress) -> None:
        """One meta-step; shown if the last one was shown long enough ago, or it is the last."""
        memory = MEMORY if self._first else 0.0
        self._loss += (1 - memory) * (progress.loss - self._loss)
        if progress.accuracy is not None:
            self._accuracy += (1 - memory) * (progress.accuracy - self._accuracy)
        self._first = self._first or progress
        now = time.monotonic()
        if progress.step == progress.steps or now - self._shown >= (BAR_SECONDS if self._bar else LINE_SECONDS):
            self._shown = now
            self._show(progress)

    def transfer(self, done: int, total: int | None) -> None:
        """Bytes that are there; only a terminal is shown them, and the last ones always."""
        now = time.monotonic()
        if self._bar and (done == total or now - self._shown >= BAR_SECONDS):
            self._shown = now
            self._renew(f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f} MB" if total else ""))

    def finish(self) -> None:
        """Leave the bar as it is and go to a new line."""
        if self._unfinished:
            print(file=self._stream, flush=True)
        self._unfinished = False
        self._first = None

    def _show(self, progress):
        time_left = _time_left(self._first, progress)
        accuracy = "" if progress.accuracy is None else f"  accuracy {self._accuracy:.1%}"
        text = f"step {progress.step}/{progress.steps}  loss {self._loss:.3f}{accuracy}{time_left}"
        if not self._bar:
            print(text, file=self._stream, flush=True)
            return
        width = min(30, shutil.get_terminal_size().columns - len(text) - 4)
        filled = round(width * progress.step / progress.steps)
        bar = f"[{'━' * filled}{' ' * (width - filled)}] " if width > 4 else ""
        self._renew(f"{bar}{text}")

    def _renew(self, line):
        print(f"\r{line}\x1b[K", end="", file=self._stream, flush=True)
        self._unfinished = True


def _time_left(first, progress):
    """By the pace since the first step seen, which carried the compilation; nothing where it is the only one."""
    steps = progress.step - first.step
    if not steps:
        return ""
    pace = (progress.seconds - first.seconds) / steps
    return f"  {duration(pace * (progress.steps - progress.step))} left"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: ``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
