"""Contenders side by side: a process for each, rounds in which all take their turn, ratios within a round.

What else goes on on the machine changes from second to second. A ratio of two times from one round has seen the same
weather; its median over rounds is the result, and least and largest say what the weather was like.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
"""The Python that has the other libraries; docs/speed.md says how it is made."""


class Missing(Exception):
    """A peer that cannot be started here, with the reason."""


@dataclass(frozen=True)
class Contender:
    """One thing to time: ``program`` of a peer's ``module``; one process for each module, cores and changed item.

    ``calls`` of it are one run, where one is short: what a turn begins with, caches that others filled, then weighs as
    little as on the longest. ``environment`` is of its process, beside the harness's own.
    """

    label: str
    module: str
    program: str
    cores: tuple[int, ...] = (0,)
    ours: bool = False
    changes: tuple[tuple[str, int], ...] = ()
    calls: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def process(self) -> tuple:
        return self.module, self.cores, self.changes


class Process:
    """A peer that waits for requests; use as a context manager."""

    def __init__(self, item, contender: Contender, dtype: str = "float32"):
        python = Path(sys.executable) if contender.ours else Path(os.environ.get("SPEED_PEERS_PYTHON", PEERS))
        if not python.exists():
            raise Missing(f"{contender.module}: there is no {python}; docs/speed.md says how to make it")
        fields = dataclasses.asdict(item) | dict(contender.changes)
        words = [contender.module, json.dumps(fields), dtype, ",".join(map(str, contender.cores))]
        threads = str(len(contender.cores))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment |= dict(contender.environment)
        self._name = contender.module
        self._child = subprocess.Popen(
            [python, "-m", "benchmarks.speed.serve", *words],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.versions = self._answer()["versions"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.stdout.close()
        try:
            self._child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _answer(self) -> dict:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise Missing(f"{self._name} ended with status {self._child.wait()}; what it said stands above")
        return json.loads(line)

    def ask(self, **request) -> dict:
        """The answer to one request."""
        assert self._child.stdin is not None
        print(json.dumps(request), file=self._child.stdin, flush=True)
        return self._answer()

    def gradient(self, program: str, folder: Path) -> dict[str, np.ndarray]:
        """What the program computes, by name."""
        path = folder / f"{self._name}-{program}.npz"
        self.versions |= self.ask(program=program, save=str(path))["versions"]
        with np.load(path) as found:
            return dict(found)


def alternate(item, contenders: list[Contender], rounds: int) -> dict:
    """Time every contender in every round, after one run each that counts for nothing.

    Returns:
        A record: seconds by label and round, of wall clock and processor, ratios to the first contender, versions.
    """
    with ExitStack() as stack:
        processes: dict[tuple, Process] = {}
        for contender in contenders:
            if contender.process not in processes:
                processes[contender.process] = stack.enter_context(Process(item, contender))
        for contender in contenders:
            processes[contender.process].ask(program=contender.program, repeats=1)
        seconds: dict[str, list[float]] = {contender.label: [] for contender in contenders}
        cpu: dict[str, list[float]] = {contender.label: [] for contender in contenders}
        for turn in range(rounds):
            # Forwards and backwards, so that nobody always comes after the same one.
            for contender in contenders if turn % 2 == 0 else contenders[::-1]:
                answer = processes[contender.process].ask(program=contender.program, repeats=contender.calls)
                seconds[contender.label].append(answer["seconds"])
                cpu[contender.label].append(answer["cpu"])
        versions = {contender.label: processes[contender.process].versions for contender in contenders}
    return {
        "item": dataclasses.asdict(item),
        "rounds": rounds,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "ratios": {label: ratio(times, seconds[contenders[0].label]) for label, times in seconds.items()},
        "cores": {contender.label: len(contender.cores) for contender in contenders},
        "calls": {contender.label: contender.calls for contender in contenders},
        "environment": {contender.label: dict(contender.environment) for contender in contenders},
        "versions": versions,
        "machine": machine(),
    }


def ratio(times: list[float], reference: list[float]) -> dict[str, float]:
    """Median, least and largest of the ratios within a round."""
    found = [time / of for time, of in zip(times, reference, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "largest": max(found)}


def machine() -> dict[str, object]:
    """What a time depends on beside the software."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    return {"processor": model, "cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()[0]}


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
