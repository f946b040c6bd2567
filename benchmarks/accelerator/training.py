"""Training of several cells until a deadline, each by ``imaml train`` in a process of its own.

The processes take turns: one trains, while the others compile, evaluate, or are stopped by SIGSTOP. A GPU divides its
time between processes, and loses some of it when two of them train at once.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from imaml.reproduction import records
from imaml.runs.folder import RESULT
from imaml.runs.log import FILE, read_log, time_of
from imaml.storage.files import write_whole

GRACE = 60.0
"""Seconds that a process gets to finish its meta-step and to save a checkpoint, before it is killed."""
STOPPED = "stopped.json"
"""The file of a run's folder with the seconds for which the run was stopped while others trained."""
POLL = 0.1
"""Seconds between two looks at the processes."""
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
"""The option of XLA with which a GPU starts all operations of a loop by one command.

Without it, XLA starts each operation of each inner step by a command of its own. For many of these operations, the
command takes longer than the operation.
"""
LAUNCH = """import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
runpy.run_module("imaml", run_name="__main__", alter_sys=True)
"""
"""Python code that is ``python -m imaml``, but ends if the process that started it ends.

Otherwise, a run that is stopped would stay so for ever if this command is killed. 1 is ``PR_SET_PDEATHSIG``.
"""


@dataclass(frozen=True)
class Cell:
    """A run to train: a preset, with its number of meta-steps and of tasks in a meta-step.

    Attributes:
        preset: the preset's name.
        steps: number of meta-steps; None for the preset's.
        tasks: tasks in a meta-step; None for the preset's.
    """

    preset: str
    steps: int | None = None
    tasks: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Return the cell that ``PRESET[:STEPS[:TASKS]]`` describes."""
        name, *numbers = text.split(":")
        return cls(name, *map(int, numbers))

    def options(self) -> list[str]:
        """Return the options of ``imaml train`` for the numbers of meta-steps and of tasks, unless they are None."""
        numbers = {"--outer.steps": self.steps, "--outer.tasks": self.tasks}
        return [word for path, number in numbers.items() if number is not None for word in (path, str(number))]


class _Job:
    """A process that trains a cell.

    Args:
        folder: the run's folder.
        words: the arguments of ``imaml train`` for a new run. A run that exists is resumed with those that began it.
    """

    def __init__(self, folder: Path, words: list[str]):
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "command.json"
        if kept.exists():
            words = json.loads(kept.read_text())
        else:
            write_whole(kept, lambda stream: stream.write(json.dumps(words).encode()))
        # With preallocation, the first JAX process would reserve most of the device's memory for itself.
        defaults = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if jax.default_backend() == "gpu":
            defaults["XLA_FLAGS"] = COMMAND_BUFFERS
        self.folder = folder
        self._least_step: float = math.inf
        self._stopped_at: float | None = None
        with open(folder / "output.log", "a") as output:
            arguments = ["train", *words, "--out", str(folder)]
            print("imaml", *arguments, file=output, flush=True)
            # In a session of its own, the process does not get the terminal's Ctrl-C.
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, *arguments],
                stdout=output, stderr=output, env=defaults | os.environ, start_new_session=True,
            )  # fmt: skip

    def trains(self) -> bool:
        """Return whether this process has done a meta-step, and the log does not have the last one yet."""
        step, steps = _steps_done(self.folder / FILE)
        self._least_step = min(self._least_step, step)  # A resumed run's log begins with the steps of earlier calls.
        return self._least_step < step < steps

    def go_on(self) -> None:
        """Let the process go on. If it was stopped, add the time since then to the file ``STOPPED``."""
        self.process.send_signal(signal.SIGCONT)
        if self._stopped_at is not None:
            total = _seconds_stopped(self.folder) + time.monotonic() - self._stopped_at
            write_whole(self.folder / STOPPED, lambda stream: stream.write(json.dumps(total).encode()))
            self._stopped_at = None

    def stop(self) -> None:
        """Stop the process until :meth:`go_on`."""
        self.process.send_signal(signal.SIGSTOP)
        self._stopped_at = self._stopped_at or time.monotonic()


def take_turns(jobs: list[_Job]) -> None:
    """Let the first job that trains go on, and stop all others that train."""
    trains = [job for job in jobs if job.trains()]
    for job in jobs:
        if job in trains[1:]:
            job.stop()
        else:
            job.go_on()


def _steps_done(log):
    """Return the numbers of meta-steps done and of all, as the last line of a log says them; 0, 0 without such a line.

    Only the end of the file is read, because this is called ten times a second.
    """
    if not log.exists():
        return 0, 0
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = stream.read().splitlines()
    for line in reversed(lines):
        try:
            entry = json.loads(line)
            return entry["step"], entry["steps"]
        except (ValueError, KeyError):  # a line that is cut off or damaged
            continue
    return 0, 0


def train(cells: list[Cell], commands: dict[str, list[str]], out: Path, deadline: float, jobs: int) -> None:
    """Train cells in their order, until all are finished or the deadline has come.

    Up to ``jobs`` processes run at a time. Only one of them trains, and the others prepare or evaluate. A cell's folder
    is ``out / preset``. A run that exists there is resumed with the command that began it, so its meta-gradients are
    always computed in the same way. The record of a finished run is written to ``out / "records"``.

    Args:
        cells: the runs.
        commands: the options of ``imaml train`` for each preset's name. They are used for a new run only.
        out: the folder of all runs.
        deadline: the time, as of ``time.monotonic()``, when all processes are told to stop.
        jobs: number of processes at a time.
    """
    waiting = [cell for cell in cells if not (out / cell.preset / RESULT).exists()]
    running: list[_Job] = []
    try:
        while (waiting or running) and time.monotonic() < deadline:
            running = [job for job in running if job.process.poll() is None]
            while waiting and len(running) < jobs:
                name = waiting.pop(0).preset
                running.append(_Job(out / name, [name, *commands[name]]))
            take_turns(running)
            time.sleep(POLL)
    finally:  # also after Ctrl-C
        _stop(running)
        for cell in cells:
            _record(out, cell)


def _stop(jobs):
    for job in jobs:
        job.process.send_signal(signal.SIGTERM)
        job.go_on()
    end = time.monotonic() + GRACE
    for process in (job.process for job in jobs):
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()


def _record(out, cell):
    path = out / "records" / f"{cell.preset}.json"
    if (out / cell.preset / RESULT).exists() and not path.exists():
        path.parent.mkdir(exist_ok=True)
        stopped = _seconds_stopped(out / cell.preset)
        note = f"for {stopped:.0f} of the seconds, the run was stopped while others trained" if stopped >= 1 else ""
        record = records.of_run(out / cell.preset, note)
        if jax.default_backend() != "cpu":
            count = record.versions["devices"].split()[0]
            record = replace(record, hardware=f"{count} {jax.devices()[0].device_kind}")
        record.write(path)


def _seconds_stopped(folder):
    """Return the seconds for which a run was stopped until now."""
    path = folder / STOPPED
    return json.loads(path.read_text()) if path.exists() else 0.0


def report(cells: list[Cell], out: Path) -> str:
    """Return one line for each cell: its meta-steps and their time, and the accuracy if the run is finished."""
    return "\n".join(f"{cell.preset:32}{_progress(out / cell.preset)}" for cell in cells)


def _progress(folder):
    if not folder.exists() or not (log := read_log(folder)):
        return "not begun: " + _last_line(folder / "output.log")
    seconds = time_of(log)[0] - _seconds_stopped(folder)
    last = log[-1]
    rate = f"{last.step:,} of {last.steps:,} meta-steps, {seconds:.0f} s, {1e3 * seconds / last.step:.1f} ms each"
    if not (folder / RESULT).exists():
        return f"{rate}; loss {last.loss:.3f}; {_last_line(folder / 'output.log')}"
    found = json.loads((folder / RESULT).read_text())["evaluations"]
    return rate + "".join(f"; {100 * e['value']:.2f} ± {100 * e['interval']:.2f} ({e['normalisation']})" for e in found)


def _last_line(path):
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][-150:] if lines else ""
