"""The loop of a worker process that runs a solver in turns and records the solver's variables.

Each request names a number of seconds. The worker continues the run until the total processor time of the run reaches
that number.

A solver has the interface of the solvers of benchmark_bilevel. ``run(callback)`` calls ``callback()`` before every
block of steps, and goes on while the callback returns True. ``inner_var`` and ``outer_var`` are the variables after the
last block. The callback of this module waits for the block's arrays, stops the clock, records the point, and waits for
the next request if the turn is over.

The clock counts the processor time of the whole process. A process is pinned to one core and has one thread that
computes, so this is the time that the solver would take on a core of its own. Other programs on the machine do not
count, except through the caches and the memory that they share.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Solver = Any
"""An object with ``run(callback)``, ``inner_var`` and ``outer_var``."""


def schedule(first: float = 0.01, last: float = 1000.0, each_decade: int = 12) -> np.ndarray:
    """Return the seconds at which points are kept: a geometric grid, and the times of the report's tables exactly."""
    count = round(each_decade * np.log10(last / first)) + 1
    return np.union1d(np.geomspace(first, last, count), [0.3, 1.0, 3.0, 8.0])


class Recorder:
    """The points of one run: for each scheduled time, the last point that was reached by then."""

    def __init__(self) -> None:
        self._due = iter(schedule())
        self._next = next(self._due)
        self._last: tuple | None = None
        self.points: list[tuple] = []

    def add(self, seconds: float, steps: int, z: np.ndarray, x: np.ndarray, oracles: float) -> None:
        """Add the point after a block, and keep the one before it if a scheduled time lies between them."""
        if seconds > self._next and self._last is not None:
            self.points.append(self._last)
        while seconds > self._next:
            self._next = next(self._due)
        self._last = (seconds, steps, z, x, oracles)

    def save(self, path: Path) -> None:
        """Write the kept points and the last one as arrays ``seconds``, ``steps``, ``oracles``, ``z`` and ``x``."""
        points = [*self.points, self._last] if self._last is not None else self.points
        names = ("seconds", "steps", "z", "x", "oracles")
        np.savez(
            path, **{name: np.stack(column) for name, column in zip(names, zip(*points, strict=True), strict=True)}
        )


class Turns:
    """The callback of one run, which starts a turn at each request.

    Args:
        solver: the solver, for its variables after each block.
        block: the number of steps in a block.
        receive: returns the next request: ``{"seconds": s}``, to run until the total processor time of the run is s,
            or ``{"save": path}``.
        answer: sends an answer.
    """

    def __init__(self, solver: Solver, block: int, receive: Callable[[], dict], answer: Callable[[dict], None]):
        self._solver, self._block, self._receive, self._answer = solver, block, receive, answer
        self._recorder = Recorder()
        self._total, self._until, self._steps = 0.0, 0.0, -block  # The first call comes before the first block.
        self._resumed = time.process_time()

    def __call__(self) -> bool:
        import jax

        solver = self._solver
        jax.block_until_ready((solver.inner_var, solver.outer_var))
        self._total += time.process_time() - self._resumed
        self._steps += self._block
        z, x = np.array(solver.inner_var), np.array(solver.outer_var)
        self._recorder.add(self._total, self._steps, z, x, getattr(solver, "oracles", np.nan))
        finite = bool(np.isfinite(x).all() and np.isfinite(z).all())
        while self._steps and (self._total >= self._until or not finite):
            self._answer({"seconds": self._total, "steps": self._steps, "finite": finite})
            request = self._receive()
            if "save" in request:
                self._recorder.save(Path(request["save"]))
                return False
            self._until = request["seconds"]
        self._resumed = time.process_time()
        return True

    def start(self) -> None:
        """Wait for the first request, and start the clock, which also counts the solver's initialisation."""
        self._until = self._receive()["seconds"]
        self._resumed = time.process_time()


def serve(build: Callable[[dict], Solver], core: int) -> None:
    """Answer requests until stdin ends. A run has ``{"start": settings}``, then one or more ``{"seconds": s}``, and
    ``{"save": path}``.

    Before a run, the same solver runs two blocks, which compiles its programs.

    Args:
        build: returns a solver for the settings of a request, which have a ``"block"``.
        core: number of the CPU core to which the process has been pinned; the first answer reports it.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Redirect stdout to stderr, so that the output of a library does not mix with the answers.

    def answer(message: dict) -> None:
        print(json.dumps(message), file=answers)

    def receive() -> dict:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    import jax

    answer({"python": sys.version.split()[0], "jax": jax.__version__, "core": core})
    try:
        while True:
            settings = receive()["start"]
            solver = build(settings)
            blocks = iter([True, True])
            solver.run(lambda blocks=blocks: next(blocks, False))
            jax.block_until_ready((solver.inner_var, solver.outer_var))
            turns = Turns(solver, settings["block"], receive, answer)
            answer({"ready": True})
            turns.start()
            solver.run(turns)
            answer({"saved": True})
    except EOFError:
        return
