"""Time the examples in examples/from_jaxopt/ next to the same programs in jaxopt, and print a table.

    taskset -c 0 python -m benchmarks.jaxopt_examples [NAME…] [--rounds 3] [--theirs FOLDER]

There are four programs for each example: ours, jaxopt's as its examples run it, jaxopt's with a compiled ``update``,
and the compiled updates alone, without ``init_state``. A round runs each program once with empty caches. Then it runs
all programs once more, and each of them three times with what is compiled by now. Still, ``init_state`` evaluates the
outer function outside of ``jit``, and XLA compiles an inner loop in it anew in each run. The order of the programs
alternates. The table has the medians over rounds of the ratios to ours, so a ratio above 1 means that ours is faster.
The process should be pinned to one core.

FOLDER holds jaxopt's examples under their file names. With it, the table also has their lines of code. If no NAME is
given, all examples run. The results are written to benchmarks/results/jaxopt_examples.json, where the results of other
examples are kept.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import numpy as np

import bilevel as bl
from benchmarks.children import ROOT
from benchmarks.code_lines import code_of, count
from benchmarks.jaxopt_examples import peers
from benchmarks.speed.harness import machine, ratio

THEIRS = {
    "ridge": "ridge_reg_implicit_diff.py",
    "lasso": "lasso_implicit_diff.py",
    "svm_dual": "multiclass_linear_svm.py",
    "equilibrium": "deep_equilibrium_model.py",
    "distillation": "dataset_distillation.md",
    "sinusoids": "maml.md",
}
"""The examples, with the file names of jaxopt's."""
CONTENDERS = ("bilevel", peers.PROGRAM, peers.COMPILED, peers.UPDATES)
COMPARED = 5
"""Number of outer steps whose values are compared."""
WARM = 3
"""Number of runs without compilation in a round, of which the median counts."""
STEPS = {"sinusoids": 50, "equilibrium": peers.EQUILIBRIUM_STEPS}
"""Numbers of outer steps of the examples that take fewer steps here than by default."""


def example(name: str):
    """Return the module of an example."""
    path = ROOT / "examples" / "from_jaxopt" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"from_jaxopt_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def programs(name: str):
    """Return, by contender, a function that runs the program and returns its outer values."""
    ours = example(name)
    data = ours.load(STEPS[name]) if name == "sinusoids" else ours.load()
    theirs = getattr(peers, name)(ours, data)

    def run_ours():
        found = ours.learn(data, STEPS[name]) if name == "equilibrium" else ours.learn(data)
        return found.history.value if isinstance(found, bl.Minimum) else found[1]

    return {"bilevel": run_ours} | {variant: functools.partial(theirs, variant) for variant in CONTENDERS[1:]}


def _timed(program):
    began = time.perf_counter()
    values = np.asarray(program())
    return time.perf_counter() - began, values


def measure(name: str, rounds: int) -> dict:
    """Return the seconds of each contender by round, the ratios to ours, and the difference of the outer values."""
    contenders = programs(name)
    seconds: dict = {kind: {label: [] for label in contenders} for kind in ("first", "warm")}
    values = {}
    for number in range(rounds):
        for label in list(contenders)[:: -1 if number % 2 else 1]:
            jax.clear_caches()
            first, values[label] = _timed(contenders[label])
            seconds["first"][label].append(first)
        for program in contenders.values():
            program()
        warm: dict = {label: [] for label in contenders}
        for repeat in range(WARM):
            for label in list(contenders)[:: -1 if (number + repeat) % 2 else 1]:
                warm[label].append(_timed(contenders[label])[0])
        for label, times in warm.items():
            seconds["warm"][label].append(statistics.median(times))
    # Training of a network amplifies rounding errors, so the values of later steps may differ.
    reference = values["bilevel"][:COMPARED]
    differences = [np.abs(found[:COMPARED] - reference) / np.abs(reference) for found in values.values()]
    ratios = {kind: {c: ratio(t, times["bilevel"]) for c, t in times.items()} for kind, times in seconds.items()}
    return {"seconds": seconds, "ratios": ratios, "relative_difference": float(np.max(differences))}


def lines(name: str, folder: Path | None) -> dict[str, int]:
    """Return the number of lines of code of our example and, if ``folder`` is given, of jaxopt's."""
    files = {"bilevel": ROOT / "examples" / "from_jaxopt" / f"{name}.py"}
    if folder:
        files["jaxopt"] = folder / THEIRS[name]
    return {label: count(code_of(path)) for label, path in files.items()}


def table(record: dict) -> str:
    """Return a record as a Markdown table."""
    rows = [
        "| example | lines | jaxopt's lines | seconds | jaxopt | with `jit(update)` | the updates alone | "
        "first run, seconds | jaxopt | with `jit(update)` | the updates alone |",
        "|---" * 11 + "|",
    ]
    for name, found in record["examples"].items():
        cells = [f"`{name}`", *(str(found["lines"].get(label, "–")) for label in ("bilevel", "jaxopt"))]
        for kind in ("warm", "first"):
            cells.append(f"{statistics.median(found['seconds'][kind]['bilevel']):.3g}")
            cells += [f"{found['ratios'][kind][label]['median']:.2f}" for label in CONTENDERS[1:]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jaxopt_examples", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"examples: {', '.join(THEIRS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--theirs", type=Path, metavar="FOLDER", help="a folder with jaxopt's examples")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(THEIRS):
        parser.error(f"there is no example {', '.join(unknown)}; the examples are {', '.join(THEIRS)}")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxopt", "flax", "optax")}
    path = ROOT / "benchmarks" / "results" / "jaxopt_examples.json"
    record = json.loads(path.read_text()) if path.exists() else {"examples": {}}
    for name in options.names or THEIRS:
        facts = {"rounds": options.rounds, "versions": versions, "machine": machine()}
        counted = record["examples"].get(name, {}).get("lines", {}) | lines(name, options.theirs)
        found = facts | measure(name, options.rounds) | {"lines": counted}
        record["examples"][name] = found
        path.write_text(json.dumps(record, indent=1) + "\n")
        shown = {label: f"{statistics.median(times):.3g} s" for label, times in found["seconds"]["warm"].items()}
        print(name, shown, f"values differ by {found['relative_difference']:.1e}", file=sys.stderr, flush=True)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
