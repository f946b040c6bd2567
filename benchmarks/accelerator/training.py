"""Training of several cells at the same time, each by ``imaml train`` in a process of its own, until a deadline."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from imaml.reproduction import records
from imaml.runs.folder import RESULT
from imaml.runs.log import read_log, time_of
from imaml.storage.files import write_whole

GRACE = 60.0
"""Seconds that a stopped process gets to finish its meta-step and to save a checkpoint, before it is killed."""


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


def train(cells: list[Cell], commands: dict[str, list[str]], out: Path, deadline: float, jobs: int) -> None:
    """Train cells in their order, ``jobs`` at a time, until all are finished or the deadline has come.

    A cell's folder is ``out / preset``. A run that exists there is resumed with the command that began it, so its
    meta-gradients are always computed in the same way. The record of a finished run is written to ``out / "records"``.

    Args:
        cells: the runs.
        commands: the options of ``imaml train`` for each preset's name. They are used for a new run only.
        out: the folder of all runs.
        deadline: the time, as of ``time.monotonic()``, when all processes are told to stop.
        jobs: number of processes at a time.
    """
    waiting = [cell for cell in cells if not (out / cell.preset / RESULT).exists()]
    running: list[subprocess.Popen] = []
    try:
        while (waiting or running) and time.monotonic() < deadline:
            running = [process for process in running if process.poll() is None]
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running.append(_start(out / cell.preset, [cell.preset, *commands[cell.preset]]))
            time.sleep(0.1)
    finally:  # also after Ctrl-C
        _stop(running)
        for cell in cells:
            _record(out, cell)


def _start(folder, words):
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "command.json"
    if kept.exists():
        words = json.loads(kept.read_text())
    else:
        write_whole(kept, lambda stream: stream.write(json.dumps(words).encode()))
    # With preallocation, the first JAX process would reserve most of the device's memory for itself.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    with open(folder / "output.log", "a") as output:
        command = [sys.executable, "-m", "imaml", "train", *words, "--out", str(folder)]
        print(" ".join(command), file=output, flush=True)
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def _stop(processes):
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()


def _record(out, cell):
    path = out / "records" / f"{cell.preset}.json"
    if (out / cell.preset / RESULT).exists() and not path.exists():
        path.parent.mkdir(exist_ok=True)
        records.of_run(out / cell.preset).write(path)


def report(cells: list[Cell], out: Path) -> str:
    """Return one line for each cell: its meta-steps and their time, and the accuracy if the run is finished."""
    return "\n".join(f"{cell.preset:32}{_progress(out / cell.preset)}" for cell in cells)


def _progress(folder):
    if not folder.exists() or not (log := read_log(folder)):
        return "not begun: " + _last_line(folder / "output.log")
    seconds, _ = time_of(log)
    last = log[-1]
    rate = f"{last.step:,} of {last.steps:,} meta-steps, {seconds:.0f} s, {1e3 * seconds / last.step:.1f} ms each"
    if not (folder / RESULT).exists():
        return f"{rate}; loss {last.loss:.3f}; {_last_line(folder / 'output.log')}"
    found = json.loads((folder / RESULT).read_text())["evaluations"]
    return rate + "".join(f"; {100 * e['value']:.2f} ± {100 * e['interval']:.2f} ({e['normalisation']})" for e in found)


def _last_line(path):
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][-150:] if lines else ""
