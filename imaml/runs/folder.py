"""The folder of a run: checkpoints, log and result, written by the one process that holds the folder's lock.

The log is flushed to disk before each checkpoint. On resuming, log lines after the checkpoint's step are dropped, so
the log contains each meta-step once. docs/architecture.md lists the files.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any

from imaml.errors import InputError
from imaml.runs import checkpoints
from imaml.runs.checkpoints import Checkpoint
from imaml.runs.log import LogWriter, Progress
from imaml.storage.files import alone_in, sweep, write_whole

RESULT = "result.json"
_NOTHING: dict[str, Any] = {}  # never changed


class RunFolder:
    """Exclusive writer of one run's folder; a context manager that holds the folder's lock.

    Args:
        directory: the folder, created if it does not exist.
        description: JSON-serialisable facts about the run. :meth:`resume` requires an existing checkpoint to have the
            same ``config``, ``types``, ``data`` and ``start``, and reports ``versions`` that differ. A larger number of
            meta-steps extends the run. A checkpoint of an earlier version, which did not save ``types``, is accepted
            without them.
        keep: number of last checkpoints that are kept; the best one is kept in addition.
        seconds: :meth:`record` saves a checkpoint if more than this time has passed since the last one or since
            :meth:`resume`. A state with a finite ``loss`` is saved at once.
        on_warning: called with a message if a damaged checkpoint is renamed, if the checkpoint was saved with other
            versions, if the run is extended, or if an existing ``result.json`` is not replaced because it was evaluated
            on more tasks.
        completed: converts the ``config`` of an earlier version's checkpoint to the settings of this version.

    Attributes:
        saved: the description in the checkpoint from which the run is resumed; ``{}`` in a new run.

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
        on_warning: Callable[[str], None],
        completed: Callable[[dict], dict] = lambda config: config,
    ):
        self._directory, self._description, self._keep = directory, description, keep
        self._seconds, self._on_warning, self._completed = seconds, on_warning, completed
        self.saved: dict[str, Any] = {}

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

        Damaged checkpoints that are newer than the last intact one are renamed. The log is opened, and its lines
        after the step of the returned state are dropped. If the run is extended, its result so far is renamed.

        Args:
            initial: the state of a new run; its structure is the one that a checkpoint must have.

        Raises:
            InputError: if the folder holds a run with another ``config``, ``types``, ``data`` or ``start``, if its
                state has other leaves than ``initial``, or as :func:`.checkpoints.newest` does.
        """
        damaged = []
        found = checkpoints.newest(self._directory, lambda path, message: damaged.append((path, message)))
        state, self._saved_step = (self._restored(found, initial), found.step) if found else (initial, 0)
        for path, message in damaged:  # Rename files only now: a folder whose run is refused above stays unchanged.
            self._on_warning(f"{message}; it is renamed, and an older checkpoint is used")
            checkpoints.set_aside(path)
        if found and (extension := self._extension(found)):
            self._extend(found.step, *extension)
        self._log = self._open.enter_context(LogWriter(self._directory, self._saved_step))
        self._saved_at = time.monotonic()
        return state

    def record(
        self, progress: Progress, state: Any, facts: dict[str, Any] = _NOTHING, loss: float | None = None
    ) -> None:
        """Log a meta-step. Save ``state``, the state after it, if ``seconds`` have passed since the last save.

        Args:
            progress: the entry of the log.
            state: the state after the meta-step.
            facts, loss: as in :meth:`save`. A finite ``loss`` saves the state in any case.
        """
        self._log.write(progress)
        if (loss is not None and isfinite(loss)) or time.monotonic() - self._saved_at > self._seconds:
            self.save(progress.step, state, facts, loss)

    def save(self, step: int, state: Any, facts: dict[str, Any] = _NOTHING, loss: float | None = None) -> None:
        """Flush the log, and write a checkpoint of ``state``, unless the last checkpoint was saved at the same step.

        Args:
            step: number of meta-steps done.
            state: the state after them.
            facts: JSON-serialisable facts about the run at this step, such as the best validation so far.
            loss: the number by which the best checkpoint is chosen. None for the mean query loss on training classes
                over the last 100 meta-steps, which is infinite after fewer meta-steps.
        """
        if step == self._saved_step:
            return
        self._log.sync()
        loss = self._log.recent_loss if loss is None else loss
        checkpoints.save(self._directory, step, state, self._description | facts, loss=loss, keep=self._keep)
        self._saved_step, self._saved_at = step, time.monotonic()

    def best(self, like: Any) -> Any:
        """Return the state in the best checkpoint, in the structure of ``like``; ``like`` if there is no checkpoint."""
        found = checkpoints.best(self._directory)
        return like if found is None else found.restore(like)

    def finish(self, evaluations: list[dict[str, Any]], facts: dict[str, Any] = _NOTHING) -> None:
        """Write ``result.json``: the description of the run together with its evaluations.

        A result of the same run with more tasks is not replaced. ``on_warning`` is then called.

        Args:
            evaluations: the evaluations, in JSON types.
            facts: as in :meth:`save`.
        """
        path = self._directory / RESULT
        tasks, kept = evaluations[0]["tasks"], self._evaluated_tasks(path)
        if kept > tasks:
            self._on_warning(f"{path} keeps its evaluation on {kept} tasks, because the new one has only {tasks}")
            return
        record = json.dumps(self._description | facts | {"evaluations": evaluations}, indent=2) + "\n"
        write_whole(path, lambda stream: stream.write(record.encode()))

    def _evaluated_tasks(self, path):
        """Return the number of tasks in an existing result of this run; 0 without a readable result of this run."""
        try:
            result = json.loads(path.read_text())
            evaluations = result.get("evaluations") or [result["evaluation"]]  # earlier versions wrote a single one
            config = self._completed(result["config"])
            same = config == self._description["config"] and result["data"] == self._description["data"]
            same = same and not self._other_types(result)
            return int(evaluations[0]["tasks"]) if same else 0
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return 0

    def _other_types(self, saved):
        """Return the differences between saved types and those of this run; none if no types were saved."""
        return differences(saved.get("types", self._description["types"]), self._description["types"])

    def _restored(self, found: Checkpoint, initial):
        """Check that the checkpoint belongs to this run, and return its state."""
        saved, wanted = found.description, self._description
        other_settings = differences(self._completed(saved["config"]), wanted["config"])
        if other_settings and not self._extension(found):
            own_data = "source" in saved and saved["config"]["dataset"] != wanted["config"]["dataset"]
            hint = "pass the same dataset as before (dataset=, or --dataset), " if own_data else ""
            raise InputError(
                f"{self._directory} holds a run with other settings ({'; '.join(other_settings)}): "
                f"{hint}use another --out, or delete the folder"
            )
        if other_types := self._other_types(saved):
            raise InputError(
                f"{self._directory} holds a run whose preset, or a component of it, has another type "
                f"({'; '.join(other_types)}): use another --out, or train with a preset of those types"
            )
        if saved["data"] != wanted["data"]:
            place = saved.get("source", {}).get("directory")
            origin = f" (the run's data were read from {place})" if place else ""
            raise InputError(
                f"{self._directory} holds a run on other data than the present ones{origin}: use another --out, or "
                "delete the folder"
            )
        if saved.get("start", {}).get("sha256") != wanted.get("start", {}).get("sha256"):
            begun = "whose initial parameters were drawn at random: resume it without start= or --start"
            if "start" in saved:
                begun = f"that started from {saved['start']['from']}: resume it with the same start= or --start"
            raise InputError(f"{self._directory} holds a run {begun}, or use another --out")
        self._description = wanted | {fact: saved[fact] for fact in ("start", "extended") if fact in saved}
        self.saved = saved
        if other_versions := differences(saved["versions"], wanted["versions"]):
            self._on_warning(f"resuming with other versions, so last bits may differ ({'; '.join(other_versions)})")
        return found.restore(initial)

    def _extension(self, found: Checkpoint) -> tuple[int, int] | None:
        """Return the old and the new number of meta-steps if the run is to be extended, and None otherwise."""
        saved, wanted = self._completed(found.description["config"]), self._description["config"]
        before, after = saved["outer"]["steps"], wanted["outer"]["steps"]
        same = differences(saved | {"outer": saved["outer"] | {"steps": after}}, wanted) == []
        return (before, after) if same and after > before else None

    def _extend(self, step, before, after):
        """Record that the run is extended, and rename the result of the shorter run."""
        entry = {"step": step, "from": before, "to": after}
        self._description["extended"] = [*self._description.get("extended", []), entry]
        if "validation" in self.saved:  # the run goes on even if it had stopped early
            self.saved = self.saved | {"validation": self.saved["validation"] | {"waited": 0}}
        if (result := self._directory / RESULT).exists():
            result.replace(result.with_name(f"result-{before:08}.json"))
        self._on_warning(
            f"the run is extended after {step} meta-steps, from {before} to {after}; the learning rate goes on "
            f"as in a run of {after}, so it may be higher now than before"
        )


class NullRunFolder:
    """Stand-in for :class:`RunFolder` that writes nothing. All processes but process 0 use it."""

    saved: dict[str, Any] = _NOTHING

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def resume(self, initial: Any) -> Any:
        """Return ``initial``, the structure into which the state of process 0 is received."""
        return initial

    def record(
        self, progress: Progress, state: Any, facts: dict[str, Any] = _NOTHING, loss: float | None = None
    ) -> None:
        """Do nothing."""

    def save(self, step: int, state: Any, facts: dict[str, Any] = _NOTHING, loss: float | None = None) -> None:
        """Do nothing."""

    def best(self, like: Any) -> Any:
        """Return ``like``, the structure into which the state of process 0 is received."""
        return like

    def finish(self, evaluations: list[dict[str, Any]], facts: dict[str, Any] = _NOTHING) -> None:
        """Do nothing."""


def differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the entries in which two nested dictionaries differ, such as ``inner.max_steps: 16 → 32``."""
    found = []
    for name in sorted(set(saved) | set(wanted)):
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} → {new}")
    return found
