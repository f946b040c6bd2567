"""The progress bar of an outer loop, on standard error if that is a terminal."""

import shutil
import sys
import time

from bilevel.outer.records import StepRecord

SECONDS = 0.1
"""Least time between two updates of the bar, in seconds."""


class Bar:
    """A progress bar of ``steps`` steps. It is not shown if ``visible`` is False or standard error is no terminal."""

    def __init__(self, steps: int, visible: bool):
        self._steps, self._shown, self._started = steps, float("-inf"), time.monotonic()
        self._visible = visible and sys.stderr.isatty()

    def show(self, done: int, record: StepRecord, ended: bool) -> None:
        """Redraw the bar if enough time has passed since the last update, or if the loop has ended."""
        now = time.monotonic()
        if not self._visible or (now - self._shown < SECONDS and not ended):
            return
        self._shown = now
        left = round((now - self._started) / done * (self._steps - done))
        text = f"step {done}/{self._steps}  value {record.value:.4g}  {left} s left"
        width = min(30, shutil.get_terminal_size().columns - len(text) - 4)
        filled = round(width * done / self._steps)
        bar = f"[{'━' * filled}{' ' * (width - filled)}] " if width > 4 else ""
        print(f"\r{bar}{text}\x1b[K", end="\n" if ended else "", file=sys.stderr, flush=True)
