"""Race of several contenders on one problem: turns of equal seconds, one after another, on one core.

A contender is an algorithm of this library or of the peer, benchmark_bilevel; these are the two sides. Each contender
has a process of its own. Only one process runs at a time, so all of them are pinned to the same core. The load of the
machine changes from second to second; short turns let it affect all contenders alike.
"""

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.children import Child, Missing

TURN = 0.2
"""Seconds of processor time in a turn."""


@dataclass(frozen=True)
class Peer:
    """The clone of benchmark_bilevel, its Python, and the core that both sides use.

    Args:
        clone: folder of a clone of github.com/benchopt/benchmark_bilevel, or None to run our side alone.
        python: a Python that has benchopt and JAX.
        core: number of the CPU core.
        cache: folder of JAX's persistent compilation cache for both sides, or None for no such cache.
    """

    clone: Path | None = None
    python: Path | None = None
    core: int = 0
    cache: Path | None = None

    def check(self) -> None:
        """Raise :class:`Missing` if the clone or the Python is not there."""
        for option, path, way in (
            (
                "--peer",
                self.clone and self.clone / "solvers" / "soba.py",
                "git clone the repository, and name the clone",
            ),
            ("--peer-python", self.python, "make a virtual environment with `pip install benchopt jax`"),
        ):
            if path is None or not path.exists():
                found = "" if path is None else f", and {path} does not exist"
                raise Missing(f"benchmark_bilevel needs {option}{found}: {way}; see docs/stochastic-benchmark.md")


@dataclass(frozen=True)
class Contender:
    """One algorithm with its settings, on one side.

    Args:
        label: name in records and tables.
        algorithm: name of a class in ``bl.stochastic``, or ``"full batch"``. The peer's module in ``solvers/`` has the
            name of the class in lower case.
        options: the settings. Those of a stochastic algorithm have the peer's names. Those of a full-batch method are
            ``optimizer``, ``rate`` and ``newton_steps``.
        block: number of steps between two looks at the clock.
        ours: whether this library runs it, and not the peer.
    """

    label: str
    algorithm: str
    options: dict = field(hash=False)
    block: int
    ours: bool


class Worker(Child):
    """A process that runs contenders of one side, one after another; a context manager that ends the process."""

    def __init__(self, ours: bool, peer: Peer):
        if not ours:
            peer.check()
        module = ["benchmarks.bilevel.our_worker"] if ours else ["benchmarks.bilevel.peer_worker", str(peer.clone)]
        environment = {
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
            "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        if peer.cache is not None:
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(peer.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
        python = sys.executable if ours else str(peer.python)
        super().__init__("a worker", [python, "-m", *module, str(peer.core)], environment)
        self.versions = self.answer()

    def begin(self, problem: str, arrays: Path, contender: Contender, seed: int) -> None:
        """Let the worker compile a contender's programs, and return when it is ready for its first turn."""
        settings = {"problem": problem, "arrays": str(arrays), "algorithm": contender.algorithm, "seed": seed}
        self.ask(start=settings | {"options": contender.options, "block": contender.block})

    def end(self) -> dict[str, np.ndarray]:
        """End a run, and return its points: ``seconds``, ``steps``, ``oracles``, ``z`` and ``x``."""
        with tempfile.TemporaryDirectory() as folder:
            self.ask(save=str(Path(folder) / "points.npz"))
            with np.load(Path(folder) / "points.npz") as points:
                return dict(points)


def race(problem: str, arrays: Path, contenders: list[Contender], seeds: list[int], seconds: float, peer: Peer) -> dict:
    """Run every contender for ``seconds`` of processor time, in alternating turns, once for each seed.

    A contender whose variables are no longer finite ends early.

    Args:
        problem: name of the problem.
        arrays: folder of its arrays.
        contenders: the contenders, each with a label of its own.
        seeds: seeds of the samplers.
        seconds: processor time of a run.
        peer: where the peer is.

    Returns:
        by label, a list of the points of each seed, as :meth:`Worker.end` returns them.
    """
    found: dict[str, list] = {contender.label: [] for contender in contenders}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(contender.ours, peer)) for contender in contenders]
        for seed in seeds:
            for contender, worker in zip(contenders, workers, strict=True):
                worker.begin(problem, arrays, contender, seed)
            until, turn, running = TURN, 0, set(range(len(contenders)))
            while running:
                # Alternate the order, so that a contender does not always run after the same one.
                for number in sorted(running, reverse=turn % 2 == 1):
                    answer = workers[number].ask(seconds=min(until, seconds))
                    if answer["seconds"] >= seconds or not answer["finite"]:
                        running.discard(number)
                until, turn = until + TURN, turn + 1
            for contender, worker in zip(contenders, workers, strict=True):
                found[contender.label].append(worker.end())
    return found
