"""At random moments, kill a process that writes checkpoints, and check that no finished checkpoint is lost.

    python -m benchmarks.kill_nine --kills 200

A child process saves checkpoints as fast as it can, and reports each finished save. After some saves it is killed by
SIGKILL at a random moment, mostly during a further save. The newest intact checkpoint in the folder must then be at
least as new as the last one that the child reported, and must equal the state of its step bit for bit. No newer
checkpoint may be damaged. The next child resumes in the same folder.

A kill does not simulate a loss of power. Flushing the files protects against it, and
tests/imaml/storage/test_files.py tests the order of the flushes.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imaml.runs import checkpoints
from imaml.storage import files

DESCRIPTION = {"preset": "kill-nine"}
MOST_SAVES = 4
"""A child is killed after a random number of saves, from 0 to this number."""


def state(step: int) -> dict:
    """Return the state of a step: about 100 kB of random numbers that depend on the step."""
    return {"theta": np.random.default_rng(step).random(12_000), "step": np.int64(step)}


def write_for_ever(directory: Path, acknowledged: int) -> None:
    """Save checkpoints without end, starting from the folder's newest one; this is what the child process runs.

    Args:
        directory: the folder of the checkpoints.
        acknowledged: file descriptor to which the number of each saved step is written, as 8 bytes.
    """
    with files.alone_in(directory):
        files.sweep(directory)
        found = checkpoints.newest(directory)
        step = found.step if found else 0
        while True:
            step += 1
            # With this loss the best checkpoint is mostly an older one, so that different files are kept and deleted.
            checkpoints.save(directory, step, state(step), DESCRIPTION, loss=float(step * 7 % 11))
            os.write(acknowledged, step.to_bytes(8, "little"))


def killed(directory: Path, saves: int, fraction: float) -> int:
    """Start a child, kill it, and return the last step that it had saved, or 0 if there is none.

    Args:
        directory: the folder of the checkpoints.
        saves: number of finished saves to wait for.
        fraction: time from the last finished save to the kill, as a fraction of the mean time of a save. If ``saves``
            is 0, it is a fraction of 10 ms.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            write_for_ever(directory, writing)
        finally:  # Reached only after an error: write_for_ever does not return.
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        started = time.monotonic()
        words = stream.read(8 * saves)
        time.sleep(fraction * (time.monotonic() - started) / saves if saves else fraction * 0.01)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        words += stream.read()
    if not os.WIFSIGNALED(status):
        raise SystemExit(f"the child ended before it was killed, with status {status}")
    return int.from_bytes(words[-8:], "little")


@dataclass
class Tally:
    """Counts over all kills.

    Attributes:
        kills: children killed.
        saves: saves that the children finished.
        amid_a_save: kills during a save. Such a kill leaves a temporary file.
        lost: kills after which the last finished checkpoint was missing, or a checkpoint was damaged.
    """

    kills: int = 0
    saves: int = 0
    amid_a_save: int = 0
    lost: int = 0


def kill(directory: Path, kills: int, source: random.Random) -> Tally:
    """Kill children one after another, and check the folder after each.

    Args:
        directory: the folder of the checkpoints, empty at first.
        kills: number of children.
        source: random numbers.
    """
    tally, last = Tally(), 0
    while tally.kills < kills:
        finished = max(last, killed(directory, source.randint(0, MOST_SAVES), source.uniform(0, 1.5)))
        tally.kills += 1
        tally.saves += finished - last
        tally.amid_a_save += any(path.name.endswith(".imaml-tmp") for path in directory.iterdir())
        last, intact = examined(directory)
        tally.lost += last < finished or not intact
    return tally


def examined(directory: Path) -> tuple[int, bool]:
    """Return the step of the newest intact checkpoint, or 0 if there is none, and whether the folder passes the check.

    It passes if that checkpoint equals the state of its step bit for bit, and if no newer checkpoint is damaged.
    """
    damaged: list[str] = []
    found = checkpoints.newest(directory, lambda path, message: damaged.append(message))
    if found is None:
        return 0, True
    expected = state(found.step)
    wanted = [expected["step"], expected["theta"]]  # JAX orders a dictionary's leaves by their names.
    same = all(np.array_equal(a, b) for a, b in zip(found.leaves, wanted, strict=True))
    return found.step, same and not damaged


def main() -> int:
    """Kill the children, print the counts, and return 1 if a checkpoint was lost, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="number of children to kill (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill(Path(folder), options.kills, random.Random(options.seed))
    print(
        f"{tally.kills} kills, {tally.amid_a_save} of them amid a save, after {tally.saves} finished saves: "
        f"{tally.lost} checkpoints lost"
    )
    return int(tally.lost > 0)


if __name__ == "__main__":
    sys.exit(main())
