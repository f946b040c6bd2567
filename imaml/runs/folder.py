"""The folder of a run: checkpoints, log and result, written by the one process that holds the folder's lock.

The log is flushed to disk before each checkpoint. On resuming, log lines after the checkpoint's step are dropped, so
the log contains each meta-step once. docs/architecture.md lists the files.
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
    """Exclusive writer of one run's folder; a context manager that holds the folder's lock.

    Args:
        directory: the folder, created if it does not exist.
        description: JSON-serialisable facts about the run. :meth:`resume` requires an existing checkpoint to have the
            same ``config`` and ``data``, and reports ``versions`` that differ.
        keep: number of last checkpoints that are kept; the best one is kept in addition.
        seconds: least time between two checkpoints that :meth:`record` saves.
        on_event: called with a message about a damaged checkpoint or about other versions.
        completed: updates the ``config`` of a checkpoint that an earlier version of the settings wrote.

    Raises:
        InputError: on entering, if another process holds the lock.
        OSError: on entering, if the folder cannot be written.
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
        """Return the state of the last intact checkpoint, or ``initial`` if there is no checkpoint.

        Damaged checkpoints that are newer than the last intact one are renamed. The log is opened, and its lines of
        steps after the returned state are dropped.

        Args:
            initial: the state of a new run; its structure is the one that a checkpoint must have.

        Raises:
            InputError: if the folder holds a run with other settings or data, or only damaged checkpoints.
        """
        damaged = []
        found = checkpoints.newest(self._directory, lambda path, message: damaged.append((path, message)))
        state, self._saved_step = (self._restored(found, initial), found.step) if found else (initial, 0)
        for path, message in damaged:  # Rename files only now: a folder whose run is refused above stays unchanged.
            self._on_event(f"{message}; it is renamed, and an older checkpoint is used")
            checkpoints.set_aside(path)
        self._log = self._open.enter_context(LogWriter(self._directory, self._saved_step))
        self._saved_at = time.monotonic()
        return state

    def record(self, progress: Progress, state: Any) -> None:
        """Log a meta-step. Save ``state``, its result, if ``seconds`` have passed since the last save."""
        self._log.write(progress)
        if time.monotonic() - self._saved_at > self._seconds:
            self.save(progress.step, state)

    def save(self, step: int, state: Any) -> None:
        """Flush the log, and write a checkpoint of ``state`` after ``step`` meta-steps, unless that step is saved."""
        if step == self._saved_step:
            return
        self._log.sync()
        loss = self._log.recent_loss
        checkpoints.save(self._directory, step, state, self._description, loss=loss, keep=self._keep)
        self._saved_step, self._saved_at = step, time.monotonic()

    def finish(self, result: dict) -> None:
        """Write ``result.json``: the description of the run together with ``result``."""
        record = json.dumps(self._description | result, indent=2) + "\n"
        write_whole(self._directory / RESULT, lambda stream: stream.write(record.encode()))

    def _restored(self, found: Checkpoint, initial):
        """Check that the checkpoint belongs to this run, and return its state."""
        saved, wanted = found.description, self._description
        if differences := _differences(self._completed(saved["config"]), wanted["config"]):
            raise InputError(
                f"{self._directory} holds a run with other settings ({'; '.join(differences)}): "
                "use another --out, or delete it"
            )
        if saved["data"] != wanted["data"]:
            raise InputError(f"{self._directory} holds a run on other data: use another --out, or delete it")
        if differences := _differences(saved["versions"], wanted["versions"]):
            self._on_event(f"resuming with other versions, so last bits may differ ({'; '.join(differences)})")
        return found.restore(initial)


class NullRunFolder:
    """Stand-in for :class:`RunFolder` that writes nothing. All processes but process 0 use it."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def resume(self, initial: Any) -> Any:
        """Return ``initial``, the structure into which the state of process 0 is received."""
        return initial

    def record(self, progress: Progress, state: Any) -> None:
        """Do nothing."""

    def save(self, step: int, state: Any) -> None:
        """Do nothing."""

    def finish(self, result: dict) -> None:
        """Do nothing."""


def _differences(saved, wanted, prefix=""):
    """Return the entries in which two nested dictionaries differ, such as ``inner.max_steps: 16 → 32``."""
    found = []
    for name in sorted(set(saved) | set(wanted)):
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} → {new}")
    return found
