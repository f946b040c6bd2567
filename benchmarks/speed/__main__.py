"""Run a suite of the speed benchmark, write its record to benchmarks/results/, and print its results.

    python -m benchmarks.speed agree             compare our gradient with PyTorch's for the same operator, in float64
    python -m benchmarks.speed few-shot          time W1 and W2 on one core, against the PyTorch libraries
    python -m benchmarks.speed gpu               time W1 and W2 on a GPU, against the authors' computation in PyTorch
    python -m benchmarks.speed linear            time hypergradients of two linear models, against other libraries
    python -m benchmarks.speed floor             time the meta-gradient and each of its parts
    python -m benchmarks.speed tasks             time the meta-gradient for 1 to 64 tasks
    python -m benchmarks.speed devices           time the meta-gradient on two devices and on one core
    python -m benchmarks.speed memory            read the meta-gradient's temporary memory for 16 and 1000 inner steps
    python -m benchmarks.speed start             time from `imaml train` to the first meta-step
    python -m benchmarks.speed host              measure the meta-steps' share of a training run's time
    python -m benchmarks.speed table             print the records as Markdown tables
    python -m benchmarks.speed plot              draw docs/images/speed.png from the records

docs/speed.md describes the workloads and the contenders. No other program should run on the machine during a suite.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.children import Missing
from benchmarks.speed import report, runs
from benchmarks.speed.harness import Contender, Process, alternate, machine, ratio
from benchmarks.speed.workloads import ITEMS

OURS = Contender("bilevel and imaml", "ours", "meta-gradient", ours=True)
FEW_SHOT = (
    OURS,
    Contender("authors' computation, PyTorch", "reference_torch", "meta-gradient"),
    Contender("torchopt, solve_cg", "torchopt_implicit", "meta-gradient"),
    Contender("higher, unrolled MAML", "higher_maml", "meta-gradient"),
)
LINEAR = (
    Contender("bilevel", "ours", "hypergradient", ours=True),
    Contender("jaxopt, custom_root", "jaxopt_root", "hypergradient"),
    Contender("optimistix, ImplicitAdjoint", "optimistix_adjoint", "hypergradient"),
    Contender("torchopt, solve_cg", "torchopt_implicit", "hypergradient"),
)
TOLERANCE = 1e-10
"""Largest relative difference between our gradient and PyTorch's in float64 that counts as agreement."""
TASKS = (1, 4, 16, 64)
GPU_TASKS = {"W1": 32, "W2": 8}
"""Numbers of tasks on a GPU, which computes many small tasks at once."""
KEPT = (("MALLOC_MMAP_THRESHOLD_", "1000000000"), ("MALLOC_TRIM_THRESHOLD_", "1000000000"))
"""Environment variables that make glibc keep freed memory, because page faults take a tenth of a task's time."""


def agree(options) -> bool:
    """Compare our meta-gradient with PyTorch's for the same linear operator, in float64.

    The suite fails if the relative difference is above ``TOLERANCE``. For the other programs the difference is only
    printed, because the authors' operator and unrolled MAML give other gradients.
    """
    item = dataclasses.replace(ITEMS["W1"], tasks=2)
    differences = {}
    ours = _gradient(item, OURS, "float64")
    for module, program in (
        ("reference_torch", "paper's operator"),
        ("reference_torch", "meta-gradient"),
        ("torchopt_implicit", "meta-gradient"),
        ("higher_maml", "meta-gradient"),
    ):
        theirs = _gradient(item, Contender(module, module, program), "float64")
        differences[f"{module}: {program}"] = _relative(theirs, ours)
    report.save("speed-agree", {"relative_difference": differences, "machine": machine()})
    print("\n".join(f"{label:40} {value:.1e} from ours" for label, value in differences.items()))
    return differences["reference_torch: paper's operator"] <= TOLERANCE


def few_shot(options) -> bool:
    """Time meta-gradients of W1 and W2 on one core."""
    for name in options.items or ("W1", "W2"):
        record = alternate(ITEMS[name], list(FEW_SHOT), options.rounds)
        report.save(f"speed-{name}", record)
        report.show(name, record)
    return True


def gpu(options) -> bool:
    """Time meta-gradients of 32 tasks of W1 and of 8 tasks of W2 on a GPU, in float32."""
    environment = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"), ("SPEED_TORCH_DEVICE", "cuda"))
    fields = {"cores": tuple(range(min(4, os.cpu_count() or 1))), "environment": environment}
    contenders = [
        Contender("all tasks at once", "ours", "all tasks at once", ours=True, **fields),
        Contender("one task after another", "ours", "meta-gradient", ours=True, **fields),
        Contender("authors' computation, PyTorch", "reference_torch", "meta-gradient", **fields),
    ]
    for name in options.items or GPU_TASKS:
        record = alternate(dataclasses.replace(ITEMS[name], tasks=GPU_TASKS[name]), contenders, options.rounds)
        report.save(f"speed-gpu-{name}", record)
        report.show(name, record)
    return True


def linear(options) -> bool:
    """Time two hypergradients in 10,000 unknowns, and compute their errors."""
    for name in options.items or ("ridge", "logistic"):
        item = ITEMS[name]
        exact = {"theta": item.exact()}
        errors = {c.label: _relative(_gradient(item, c, "float32"), exact) for c in LINEAR}
        record = alternate(item, list(LINEAR), 3 * options.rounds) | {"relative_error": errors}
        report.save(f"speed-{name}", record)
        report.show(name, record)
    return True


def floor(options) -> bool:
    """Time the meta-gradient and each of its parts alone, and print the sum of the parts relative to the whole."""
    item = ITEMS["W1"]
    names = ("meta-gradient", "20 gradients", "20 outer gradients", "linearise, 1", "linearise, 21")
    record = alternate(item, [Contender(name, "ours", name, ours=True) for name in names], 3 * options.rounds)
    record["floor"] = report.floor(item, record["seconds"])
    report.save("speed-floor", record)
    print(json.dumps(record["floor"], indent=1))
    return True


def tasks(options) -> bool:
    """Time the meta-gradient per task for several numbers of tasks."""
    changes = {f"{count} tasks": (("tasks", count),) for count in TASKS}
    contenders = [
        dataclasses.replace(OURS, label=label, changes=change, calls=max(TASKS) // change[0][1], environment=KEPT)
        for label, change in changes.items()
    ]
    record = alternate(ITEMS["W1"], contenders, options.rounds)
    seconds = {label: [s / changes[label][0][1] for s in times] for label, times in record["seconds"].items()}
    reference = seconds[contenders[0].label]
    ratios = {label: ratio(times, reference) for label, times in seconds.items()}
    record |= {"seconds": seconds, "ratios": ratios, "seconds_are": "per task"}
    report.save("speed-tasks", record)
    report.show("seconds per task", record)
    return True


def devices(options) -> bool:
    """Time 32 tasks on two devices, one core each, and on one device with one core."""
    item = dataclasses.replace(ITEMS["W1"], tasks=32)
    two = dataclasses.replace(OURS, label="two devices", program="on all devices", cores=(0, 1))
    record = alternate(item, [two, dataclasses.replace(OURS, label="one core")], options.rounds)
    report.save("speed-devices", record)
    report.show("devices", record)
    return True


def memory(options) -> bool:
    """Read the temporary memory of the compiled meta-gradient from XLA, without running the program."""
    from benchmarks.speed.peers import ours

    found = {
        name: {steps: ours.memory(dataclasses.replace(ITEMS[name], steps=steps)) for steps in (16, 1000)}
        for name in ("W1", "W2")
    }
    report.save("speed-memory", {"bytes": found, "machine": machine()})
    for name, sizes in found.items():
        print(name, {steps: f"{size / 2**20:.2f} MiB" for steps, size in sizes.items()})
    return True


def start(options) -> bool:
    """Time `imaml train` until its first meta-step, with an empty cache and with a full one."""
    record = runs.starts(options.rounds) | {"machine": machine()}
    report.save("speed-start", record)
    print(json.dumps(record, indent=1))
    return True


def host(options) -> bool:
    """Measure the time of meta-steps alone relative to the time of the same steps in a training run."""
    record = runs.host_share(options.rounds) | {"machine": machine()}
    report.save("speed-host", record)
    print(json.dumps(record, indent=1))
    return True


def table(options) -> bool:
    """Print the records as Markdown tables."""
    print(report.table())
    return True


def plot(options) -> bool:
    """Draw docs/images/speed.png."""
    print(report.plot())
    return True


SUITES = {
    "agree": agree, "few-shot": few_shot, "gpu": gpu, "linear": linear, "floor": floor, "tasks": tasks,
    "devices": devices, "memory": memory, "start": start, "host": host, "table": table, "plot": plot,
}  # fmt: skip


def _gradient(item, contender, dtype):
    with tempfile.TemporaryDirectory() as folder, Process(item, contender, dtype) as process:
        return process.gradient(contender.program, Path(folder))


def _relative(found, exact):
    difference, size = (
        np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in values))
        for values in ([found[name] - exact[name] for name in exact], exact.values())
    )
    return float(difference / size)


def main(arguments: list[str] | None = None) -> int:
    """Run a suite; return 1 if it fails, 2 if a contender's process cannot start or has ended, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument(
        "items", nargs="*", metavar="ITEM", help="items of few-shot and gpu (W1, W2) or of linear (ridge, logistic)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    options = parser.parse_args(arguments)
    if unknown := set(options.items) - set(ITEMS):
        parser.error(f"there is no item {', '.join(unknown)}; the items are {', '.join(ITEMS)}")
    try:
        return 0 if SUITES[options.suite](options) else 1
    except Missing as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
