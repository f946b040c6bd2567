"""The suites of the speed benchmark; each writes a record to benchmarks/results/ and prints its ratios.

    python -m benchmarks.speed agree             float64: our gradient against PyTorch's of the same operator
    python -m benchmarks.speed few-shot          W1 and W2 on one core, against the PyTorch libraries
    python -m benchmarks.speed linear            ridge and logistic hypergradients, against JAX libraries and torchopt
    python -m benchmarks.speed floor             the meta-gradient against the sum of what it cannot do without
    python -m benchmarks.speed tasks             its time over 1 to 64 tasks
    python -m benchmarks.speed devices           two devices against one core
    python -m benchmarks.speed memory            its scratch memory over inner steps
    python -m benchmarks.speed start             seconds from `imaml train` to the first meta-step
    python -m benchmarks.speed host              the meta-step's share of a training run's time
    python -m benchmarks.speed table, plot       from the records

docs/speed.md says what each shows. Nothing else should run meanwhile.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.speed import report, runs
from benchmarks.speed.harness import Contender, Missing, Process, alternate, machine, ratio
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
TASKS = (1, 4, 16, 64)
KEPT = (("MALLOC_MMAP_THRESHOLD_", "1000000000"), ("MALLOC_TRIM_THRESHOLD_", "1000000000"))
"""So that glibc keeps a call's scratch for the next one: to page it in again takes as long as a tenth of a task."""


def agree(options) -> bool:
    """Our meta-gradient and PyTorch's of the same operator, in float64; what the others compute, for information."""
    item = dataclasses.replace(ITEMS["W1"], tasks=2)
    apart = {}
    ours = _gradient(item, OURS, "float64")
    for module, program in (
        ("reference_torch", "paper's operator"),
        ("reference_torch", "meta-gradient"),
        ("torchopt_implicit", "meta-gradient"),
        ("higher_maml", "meta-gradient"),
    ):
        theirs = _gradient(item, Contender(module, module, program), "float64")
        apart[f"{module}: {program}"] = _relative(theirs, ours)
    report.save("speed-agree", {"relative_difference": apart, "machine": machine()})
    print("\n".join(f"{label:40} {value:.1e} from ours" for label, value in apart.items()))
    return apart["reference_torch: paper's operator"] <= TOLERANCE


def few_shot(options) -> bool:
    """Seconds for W1 and W2 on one core."""
    for name in options.items or ("W1", "W2"):
        record = alternate(ITEMS[name], list(FEW_SHOT), options.rounds)
        report.save(f"speed-{name}", record)
        report.show(name, record)
    return True


def linear(options) -> bool:
    """Seconds and errors of two hypergradients in 10,000 unknowns."""
    for name in options.items or ("ridge", "logistic"):
        item = ITEMS[name]
        exact = {"theta": item.exact()}
        errors = {c.label: _relative(_gradient(item, c, "float32"), exact) for c in LINEAR}
        record = alternate(item, list(LINEAR), 3 * options.rounds) | {"relative_error": errors}
        report.save(f"speed-{name}", record)
        report.show(name, record)
    return True


def floor(options) -> bool:
    """The meta-gradient's time per task beside the sum of its parts, each timed alone."""
    item = ITEMS["W1"]
    names = ("meta-gradient", "20 gradients", "20 outer gradients", "linearise, 1", "linearise, 21")
    record = alternate(item, [Contender(name, "ours", name, ours=True) for name in names], 3 * options.rounds)
    record["floor"] = report.floor(item, record["seconds"])
    report.save("speed-floor", record)
    print(json.dumps(record["floor"], indent=1))
    return True


def tasks(options) -> bool:
    """Seconds per task over their number."""
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
    report.show("seconds a task", record)
    return True


def devices(options) -> bool:
    """32 tasks on two devices, on one device with two threads, on one core."""
    item = dataclasses.replace(ITEMS["W1"], tasks=32)
    two = dataclasses.replace(OURS, label="two devices", program="on all devices", cores=(0, 1))
    record = alternate(item, [two, dataclasses.replace(OURS, label="one core")], options.rounds)
    report.save("speed-devices", record)
    report.show("devices", record)
    return True


def memory(options) -> bool:
    """Scratch bytes of the compiled meta-gradient; nothing is run."""
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
    """Seconds until the first meta-step, with nothing kept from before and with everything."""
    record = runs.starts(options.rounds) | {"machine": machine()}
    report.save("speed-start", record)
    print(json.dumps(record, indent=1))
    return True


def host(options) -> bool:
    """The share of a training run that its meta-steps would take alone."""
    record = runs.host_share(options.rounds) | {"machine": machine()}
    report.save("speed-host", record)
    print(json.dumps(record, indent=1))
    return True


def table(options) -> bool:
    """The tables of docs/speed.md."""
    print(report.table())
    return True


def plot(options) -> bool:
    """docs/images/speed.png."""
    print(report.plot())
    return True


SUITES = {
    "agree": agree, "few-shot": few_shot, "linear": linear, "floor": floor, "tasks": tasks, "devices": devices,
    "memory": memory, "start": start, "host": host, "table": table, "plot": plot,
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="of few-shot (W1, W2) or linear (ridge, logistic)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if unknown := set(options.items) - set(ITEMS):
        parser.error(f"there is no item {', '.join(unknown)}; known: {', '.join(ITEMS)}")
    try:
        return 0 if SUITES[options.suite](options) else 1
    except Missing as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
