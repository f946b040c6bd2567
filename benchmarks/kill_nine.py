"""Kill a process that writes checkpoints, again and again, without warning: none that was finished may be lost.

A child saves as fast as it can and says so after each save; after some saves it is killed with SIGKILL at a random
moment, which is mostly in the middle of another. The folder must then hold no damaged checkpoint, and a whole one that
is at least as new as the last that the child had finished, with every bit as that step has it. The next child goes on
from there, in the same folder.

    python benchmarks/kill_nine.py --kills 200

What a kill cannot show is a loss of power, which flushing is for: tests/imaml/storage/test_files.py tests its order.
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
"""That a child is given before it is killed in the next one, at random from 0."""


def state(step: int) -> dict:
    """What the checkpoint of a step holds: about a hundred kilobytes, another for each step."""
    return {"theta": np.random.default_rng(step).random(12_000), "step": np.int64(step)}


def write_for_ever(directory: Path, acknowledged: int) -> None:
    """The child: go on from what is there, and write the number of each step that is saved."""
    with files.alone_in(directory):
        files.sweep(directory)
        found = checkpoints.newest(directory)
        step = found.step if found else 0
        while True:
            step += 1
            # A loss with its best in the past, so that what is kept and let go changes.
            checkpoints.save(directory, step, state(step), DESCRIPTION, loss=float(step * 7 % 11))
            os.write(acknowledged, step.to_bytes(8, "little"))


def killed(directory: Path, saves: int, fraction: float) -> int:
    """The last step that a child had saved when it was killed, 0 for none.

    Args:
        directory: where it writes.
        saves: those that it finished at least.
        fraction: of the time of a save, after which it was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            write_for_ever(directory, writing)
        finally:  # only an error leads here
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
        raise SystemExit(f"the child ended by itself, with {status}")
    return int.from_bytes(words[-8:], "little")


@dataclass
class Tally:
    """Over all kills."""

    kills: int = 0
    saves: int = 0
    amid_a_save: int = 0
    lost: int = 0


def kill(directory: Path, kills: int, source: random.Random) -> Tally:
    """Kill so many children in turn, and look at the folder after each."""
    tally, last = Tally(), 0
    while tally.kills < kills:
        finished = max(last, killed(directory, source.randint(0, MOST_SAVES), source.uniform(0, 1.5)))
        tally.kills += 1
        tally.saves += finished - last
        tally.amid_a_save += any(path.name.endswith(".imaml-tmp") for path in directory.iterdir())
        last, whole = examined(directory)
        tally.lost += last < finished or not whole
    return tally


def examined(directory: Path) -> tuple[int, bool]:
    """The step of the newest checkpoint, 0 for none, and whether it and all that are newer are as they were saved."""
    damaged: list[str] = []
    found = checkpoints.newest(directory, lambda path, message: damaged.append(message))
    if found is None:
        return 0, True
    expected = state(found.step)
    wanted = [expected["step"], expected["theta"]]  # leaves are in the order of their names
    same = all(np.array_equal(a, b) for a, b in zip(found.leaves, wanted, strict=True))
    return found.step, same and not damaged


def main() -> int:
    """Print what came of it; 1 where a checkpoint was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
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
