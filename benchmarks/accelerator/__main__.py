"""Find the fastest accurate way to compute meta-gradients on this machine, then train for the cells of table 2.

    python -m benchmarks.accelerator --minutes 9 --out DIR --data OMNIGLOT
    python -m benchmarks.accelerator --minutes 1 --out DIR --cells glyphs-5way-1shot-gd:12:4 -- --network.filters 4

The cells are those of the implicit MAML paper. Each call of the command resumes the runs in DIR, and tells them to stop
15 seconds before the given minutes are over. On a CPU, several short calls give the same bits as one long call.
docs/scaling.md says what a bare machine needs.
"""

import argparse
import sys
import time
from pathlib import Path

import jax

from benchmarks.accelerator import comparison
from benchmarks.accelerator.training import Cell, report, train
from imaml import datasets
from imaml.arguments import parse
from imaml.errors import InputError
from imaml.runs.interruption import exit_on_sigterm

CELLS = [f"omniglot-{ways}way-{shots}shot-{solver}" for solver in ("gd", "hf") for ways in (5, 20) for shots in (1, 5)]
"""The presets of implicit MAML for the cells of the paper's table 2."""
RESERVE = 15.0
"""Seconds before the time limit at which training is stopped, so that the last checkpoints can be saved."""


def main(words: list[str] | None = None) -> int:
    """Compare, train and report; return 0, 2 for arguments or data that cannot be used, or 130 after Ctrl-C."""
    begun = time.monotonic()
    words = sys.argv[1:] if words is None else words
    words, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = _parser().parse_args(words)
    try:
        with exit_on_sigterm():
            _run(options, extra, begun)
    except InputError as error:
        print(f"accelerator: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def _way(text):
    """Return the way that a word describes, for argparse."""
    try:
        return comparison.Way.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Options after -- are options of 'imaml train' for all runs, such as --network.filters 32.",
    )
    parser.add_argument("--minutes", type=float, required=True, help="time limit of the command, in minutes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of all runs")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of Omniglot's archives")
    parser.add_argument(
        "--cells",
        nargs="+",
        type=Cell.parse,
        default=[Cell(name) for name in CELLS],
        metavar="PRESET[:STEPS[:TASKS]]",
        help="the runs and their lengths (default: the eight cells of table 2, at the length of their presets)",
    )
    parser.add_argument(
        "--way",
        type=_way,
        metavar="TOGETHER:CONVOLUTIONS:PRODUCTS",
        help="compute the meta-gradients of new runs in this way, such as all:patches:tensorfloat32; do not compare",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="processes at a time, of which one trains (default: 3 on an accelerator, 1 on a CPU)",
    )
    return parser


def _run(options, extra, begun):
    cells, out = options.cells, options.out
    out.mkdir(parents=True, exist_ok=True)
    for device in jax.devices():
        memory = device.memory_stats() or {}
        limit = f", {memory['bytes_limit'] / 2**30:.0f} GiB" if "bytes_limit" in memory else ""
        print(f"{device.platform}: {device.device_kind}{limit}", flush=True)
    presets = {cell.preset: parse(["train", cell.preset, *cell.options(), *extra]).chosen for cell in cells}
    first = presets[cells[0].preset]
    dataset = datasets.load(first.dataset, options.data)
    way = options.way or comparison.saved(out / "comparison.json", first, dataset.train.source)
    print(f"{time.monotonic() - begun:.0f} s: training with {way}", flush=True)
    data = ["--data", str(options.data)] if options.data else []
    commands = {
        cell.preset: [*data, *cell.options(), *way.options(presets[cell.preset].outer.tasks), *extra] for cell in cells
    }
    jobs = options.jobs or (1 if jax.default_backend() == "cpu" else 3)
    try:
        train(cells, commands, out, begun + 60 * options.minutes - RESERVE, jobs)
    finally:
        print(report(cells, out), flush=True)


if __name__ == "__main__":
    sys.exit(main())
