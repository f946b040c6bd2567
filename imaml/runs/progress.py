"""Progress output of meta-steps: a bar on a terminal, and a plain line about every ten seconds in a file or a pipe."""

import shutil
import sys
import time
from typing import TextIO

from imaml.runs.log import Progress

BAR_SECONDS = 0.1
"""Least time between two updates of the bar, in seconds. The last meta-step is shown in any case."""
LINE_SECONDS = 10.0
"""Least time between two plain lines about meta-steps, in seconds. The last meta-step is shown in any case."""
MEMORY = 0.95
"""Weight of earlier steps in the displayed running means of loss and accuracy. A single step is mostly noise."""


class Reporter:
    """Output of events, meta-steps and downloads on a stream.

    Args:
        stream: where to write; ``sys.stdout`` by default. A terminal gets a progress bar. Any other stream gets
            plain lines.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._bar = self._stream.isatty()
        self._shown = float("-inf")
        self._unfinished = False
        self._first: Progress | None = None
        self._loss = self._accuracy = 0.0
        self._validation: float | None = None

    def event(self, message: str) -> None:
        """Print a message, such as ``"evaluating"``, followed by an ellipsis, on a line of its own."""
        self.finish()
        print(f"{message} …", file=self._stream, flush=True)

    def step(self, progress: Progress) -> None:
        """Show a meta-step if enough time has passed since the last output, or if it is the last meta-step."""
        memory = MEMORY if self._first else 0.0
        self._loss += (1 - memory) * (progress.loss - self._loss)
        if progress.accuracy is not None:
            self._accuracy += (1 - memory) * (progress.accuracy - self._accuracy)
        self._first = self._first or progress
        self._validation = self._validation if progress.validation is None else progress.validation
        now = time.monotonic()
        if progress.step == progress.steps or now - self._shown >= (BAR_SECONDS if self._bar else LINE_SECONDS):
            self._shown = now
            self._show(progress)

    def transfer(self, done: int, total: int | None) -> None:
        """Show the progress of a download on a terminal; other streams get no output.

        Args:
            done: bytes received.
            total: size of the file in bytes, or None if it is not known.
        """
        now = time.monotonic()
        if self._bar and (done == total or now - self._shown >= BAR_SECONDS):
            self._shown = now
            self._redraw(f"{done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f} MB" if total else ""))

    def part(self, done: int, total: int) -> None:
        """Show the progress of the work that the last event announced: ``done`` of ``total`` parts.

        A stream that is no terminal gets at most one line in :data:`LINE_SECONDS`, and none for the last part.
        """
        now = time.monotonic()
        if done < total and now - self._shown < (BAR_SECONDS if self._bar else LINE_SECONDS):
            return
        self._shown = now
        if self._bar:
            self._redraw(f"  {done} of {total} done")
        elif done < total:
            print(f"  {done} of {total} done", file=self._stream, flush=True)

    def finish(self) -> None:
        """End the line of the bar. The next step starts new running means and a new estimate of the time left."""
        if self._unfinished:
            print(file=self._stream, flush=True)
        self._unfinished = False
        self._first = self._validation = None

    def _show(self, progress):
        time_left = _time_left(self._first, progress)
        accuracy = "" if progress.accuracy is None else f"  accuracy {self._accuracy:.1%}"
        validation = ""
        if self._validation is not None:
            validation = f"  validation {self._validation:{'.3f' if progress.accuracy is None else '.1%'}}"
        text = f"step {progress.step}/{progress.steps}  loss {self._loss:.3f}{accuracy}{validation}{time_left}"
        if not self._bar:
            print(text, file=self._stream, flush=True)
            return
        width = min(30, shutil.get_terminal_size().columns - len(text) - 4)
        filled = round(width * progress.step / progress.steps)
        bar = f"[{'━' * filled}{' ' * (width - filled)}] " if width > 4 else ""
        self._redraw(f"{bar}{text}")

    def _redraw(self, line):
        print(f"\r{line}\x1b[K", end="", file=self._stream, flush=True)
        self._unfinished = True


def _time_left(first, progress):
    """Return the estimated time left as text, or an empty string if ``progress`` is the first step.

    The mean time of a step is measured from the end of the first one, because that step includes the compilation.
    """
    steps = progress.step - first.step
    if not steps:
        return ""
    pace = (progress.seconds - first.seconds) / steps
    return f"  {duration(pace * (progress.steps - progress.step))} left"


def duration(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, ``"1:02:03"``, or as minutes and seconds, ``"2:03"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
