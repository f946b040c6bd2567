"""Timing of several contenders, each in its own process, in alternating rounds.

Every round times every contender once. The load of the machine changes from second to second, but it affects two times
of the same round alike. The result is therefore the ratio of two times within a round: its median over rounds, with the
smallest and largest ratio as a measure of the load's variation.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.children import ROOT, Child, Missing

PEERS = ROOT / ".venv-peers" / "bin" / "python"
"""The Python that has the other libraries installed; docs/speed.md says how to make it."""


@dataclass(frozen=True)
class Contender:
    """One program to time. Contenders with the same module, cores, changes and environment share a process.

    Args:
        label: name in records and tables.
        module: name of the module in :mod:`benchmarks.speed.peers`.
        program: name of the program in that module.
        cores: the CPU cores that the process is pinned to.
        ours: whether the process runs this library, in this Python. Otherwise it runs the Python that the variable
            ``SPEED_PEERS_PYTHON`` names, or ``PEERS``.
        changes: fields of the workload that are changed for this contender, with their new values.
        calls: number of calls in a timed run. Short programs need several: the first call of a run finds CPU caches
            that other processes have filled, and takes longer.
        environment: variables of the process in addition to this process's.
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
        """Key of the process that runs this contender."""
        return self.module, self.cores, self.changes, self.environment


class Process(Child):
    """The process of a contender. As a context manager, this object ends the process when the block ends.

    Args:
        item: the workload, of :mod:`benchmarks.speed.workloads`.
        contender: module, cores, changes and environment of the process.
        dtype: ``"float32"`` or ``"float64"``.

    Raises:
        Missing: if there is no Python for the contender's library, or if the process ends at once.
    """

    def __init__(self, item, contender: Contender, dtype: str = "float32"):
        python = Path(sys.executable) if contender.ours else Path(os.environ.get("SPEED_PEERS_PYTHON", PEERS))
        if not python.exists():
            raise Missing(f"{contender.module}: there is no {python}; docs/speed.md says how to make it")
        fields = dataclasses.asdict(item) | dict(contender.changes)
        words = [contender.module, json.dumps(fields), dtype, ",".join(map(str, contender.cores))]
        threads = str(len(contender.cores))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | dict(contender.environment)
        super().__init__(contender.module, [python, "-m", "benchmarks.speed.serve", *words], environment)
        self.versions = self.answer()["versions"]

    def gradient(self, program: str, folder: Path) -> dict[str, np.ndarray]:
        """Run a program once, and return its gradient by the names of the parameters.

        Args:
            program: name of the program.
            folder: folder for the file that carries the arrays.
        """
        path = folder / f"{self._name}-{program}.npz"
        self.versions |= self.ask(program=program, save=str(path))["versions"]
        with np.load(path) as found:
            return dict(found)


def alternate(item, contenders: list[Contender], rounds: int) -> dict:
    """Time every contender in every round. One run of each before the first round is not counted, because it compiles.

    Args:
        item: the workload.
        contenders: the programs to time.
        rounds: number of rounds.

    Returns:
        A record with wall-clock and CPU seconds by label and round, ratios to the first contender's seconds, and
        versions.
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
        for number in range(rounds):
            # Alternate the order, so that a contender does not always run after the same one.
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
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
    """Return the median, least and largest of the ratios of two times in the same round."""
    found = [time / of for time, of in zip(times, reference, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "largest": max(found)}


def machine() -> dict[str, object]:
    """Return the properties of the machine that times depend on: processor, number of cores, system, load."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    return {"processor": model, "cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()[0]}


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
