"""The folder of a run, and all that is ever written to it, by the one process that holds it.

docs/architecture.md lists the files. The log is on disk before the checkpoint that it leads to, and cut back to the
checkpoint that is gone on from: each meta-step stands in it once.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from imaml.errors import InputError
from imaml.runs import checkpoints
from imaml.runs.checkpoints import Checkpoint
from imaml.runs.log import LogWriter, Progress
from imaml.storage.files import alone_in, sweep, write_whole

RESULT = "result.json"


class RunFolder:
    """Holds a run's folder while open, for the state and the log of one run.

    Args:
        directory: made where it does not exist.
        description: facts of the run, JSON-able. Its ``config`` and ``data`` are compared with those of a checkpoint
            that is there, its ``versions`` are told where they differ.
        keep: how many of the last checkpoints stay, besides the best.
        seconds: checkpoint no more often than this.
        on_event: told in a phrase what is worth knowing.
        completed: adds to the ``config`` of a checkpoint what a former version of the settings lacks.
    """

    def __init__(
        self,
        directory: Path,
        description: dict,
        keep: int,
        seconds: float,
        on_event: Callable[[str], None],
        completed: Callable[[dict], dict] = lambda config: config,
    ):
        self._directory, self._description, self._keep = directory, description, keep
        self._seconds, self._on_event, self._completed = seconds, on_event, completed

    def __enter__(self):
        self._directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.enter_context(alone_in(self._directory))
            sweep(self._directory)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exception):
        self._open.close()

    def resume(self, initial: Any) -> Any:
        """The state to go on from: that of the last whole checkpoint, if it is of this very run, else ``initial``.

        Raises:
            InputError: where the folder holds a run with other settings or data, or nothing but damaged checkpoints.
        """
        damaged = []
        found = checkpoints.newest(self._directory, lambda path, message: damaged.append((path, message)))
        state, self._saved_step = (self._restored(found, initial), found.step) if found else (initial, 0)
        for path, message in damaged:  # nothing was touched before it was clear that this run goes on here
            self._on_event(f"{message}; it is set aside, the one before is taken")
            checkpoints.set_aside(path)
        self._log = self._open.enter_context(LogWriter(self._directory, self._saved_step))
        self._saved_at = time.monotonic()
        return state

    def record(self, progress: Progress, state: Any) -> None:
        """Log a meta-step, and save the state that it led to if it is time for it."""
        self._log.write(progress)
        if time.monotonic() - self._saved_at > self._seconds:
            self.save(progress.step, state)

    def save(self, step: int, state: Any) -> None:
        """Put the log and the state on disk, unless the state after so many meta-steps is there."""
        if step == self._saved_step:
            return
        self._log.sync()
        loss = self._log.recent_loss
        checkpoints.save(self._directory, step, state, self._description, loss=loss, keep=self._keep)
        self._saved_step, self._saved_at = step, time.monotonic()

    def finish(self, result: dict) -> None:
        """Write what the run came to."""
        record = json.dumps(self._description | result, indent=2) + "\n"
        write_whole(self._directory / RESULT, lambda stream: stream.write(record.encode()))

    def _restored(self, found: Checkpoint, initial):
        """The checkpoint's state, once it is found to be of this very run."""
        saved, wanted = found.description, self._description
        if differences := _differences(self._completed(saved["config"]), wanted["config"]):
            raise InputError(
                f"{self._directory} holds a run with other settings ({'; '.join(differences)}): "
                "use another --out, or delete it"
            )
        if saved["data"] != wanted["data"]:
            raise InputError(f"{self._directory} holds a run on other data than this: use another --out, or delete it")
        if differences := _differences(saved["versions"], wanted["versions"]):
            self._on_event(f"going on with other versions, so bits may differ ({'; '.join(differences)})")
        return found.restore(initial)


class NullRunFolder:
    """Takes the place of a :class:`RunFolder` in the processes that do not write: process 0 alone holds the folder."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def resume(self, initial: Any) -> Any:
        """``initial``: its structure is what receives the state."""
        return initial

    def record(self, progress: Progress, state: Any) -> None:
        """Nothing."""

    def save(self, step: int, state: Any) -> None:
        """Nothing."""

    def finish(self, result: dict) -> None:
        """Nothing."""


def _differences(saved, wanted, prefix=""):
    """Where two nested dictionaries differ: ``inner.steps: 16 → 32``."""
    found = []
    for name in sorted(set(saved) | set(wanted)):
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} → {new}")
    return found
