"""Compare our stochastic bilevel algorithms with those of benchopt/benchmark_bilevel, the peer, on one core.

    python -m benchmarks.bilevel tune --peer DIR --peer-python PATH    choose the rates on grids; see the function tune
    python -m benchmarks.bilevel run --peer DIR --peer-python PATH     run both libraries in alternating turns
    python -m benchmarks.bilevel table                                 print the records as Markdown tables
    python -m benchmarks.bilevel plot                                  draw docs/images/stochastic-PROBLEM.png
    python -m benchmarks.bilevel docs                                  put the tables into docs/stochastic-benchmark.md

DIR is a clone of github.com/benchopt/benchmark_bilevel, and PATH a Python that has benchopt and JAX. Without them,
`run` runs our algorithms alone, and `tune` ends with status 2. docs/stochastic-benchmark.md describes the benchmark. No
other program should run on the machine during a measurement.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.bilevel import report
from benchmarks.bilevel.contenders import PLANS, contender, grid, oracles_of_a_step
from benchmarks.bilevel.problems import PROBLEMS, Data, make
from benchmarks.bilevel.race import Contender, Peer, Worker, race
from benchmarks.children import Missing
from benchmarks.speed.harness import machine


def tune(problem: str, folder: Path, options, peer: Peer, known: dict) -> dict:
    """Return the chosen rates of each algorithm, and the measures of all rates that were tried.

    The chosen rates have the fewest runs that diverge and, among these, the least median over the seeds of the plan's
    ``metric`` after ``options.seconds``. The peer's solvers choose the rates of the stochastic algorithms, which both
    libraries then use. The rates of the full-batch methods are chosen by runs of these methods. With
    ``options.algorithms``, only these algorithms are tuned, and the rates of the others are taken from ``known``, an
    earlier result.
    """
    plan, arrays = PLANS[problem], make(problem, folder)
    reference = PROBLEMS[problem].reference(Data.load(arrays))
    tried: dict[str, list] = {}
    jobs = [(name, rates, False) for name in options.algorithms or plan.blocks for rates in grid(plan)]
    jobs += [("full batch", rates, True) for rates in plan.full_batch if not options.algorithms]
    with Worker(False, peer) as theirs, Worker(True, peer) as ours:
        for name, rates, is_ours in jobs:
            one, worker = contender(problem, name, rates, is_ours), ours if is_ours else theirs
            found = [_last(reference, worker, problem, arrays, one, seed, options) for seed in _seeds(options)]
            diverged = sum(measures is None for measures in found)
            median = {
                name: None if diverged else float(np.median([measures[name] for measures in found]))
                for name in reference.metrics
            }
            key = f"full batch {rates['optimizer']}" if is_ours else name
            tried.setdefault(key, []).append(rates | median | {"runs": len(found), "diverged": diverged})
            print(problem, key, tried[key][-1], flush=True)
    chosen = {}
    for name, results in tried.items():
        # With a run that diverged, there is no median.
        best = min(results, key=lambda result: (result["diverged"], result[plan.metric] or 0.0))
        chosen[name] = {key: best[key] for key in best if key not in (*reference.metrics, "runs", "diverged")}
    kept = known if options.algorithms else {}
    return {
        "chosen": kept.get("chosen", {}) | chosen,
        "tried": kept.get("tried", {}) | tried,
        "seconds": options.seconds,
        "machine": machine(),
    }


def _last(reference, worker: Worker, problem: str, arrays: Path, one: Contender, seed: int, options) -> dict | None:
    """Return the measures of the last point of a run, or None if the run diverged."""
    worker.begin(problem, arrays, one, seed)
    worker.ask(seconds=options.seconds)
    points = worker.end()
    z, x = points["z"][-1], points["x"][-1]
    return reference.measure(z, x) if _is_finite(z, x) else None


def _is_finite(z: np.ndarray, x: np.ndarray) -> bool:
    return bool(np.isfinite(z).all() and np.isfinite(x).all())


def _seeds(options) -> list[int]:
    """Return the seeds of the runs. A seed gives the order of the samples and of the batches."""
    return list(range(1, options.seeds + 1))


def run(problem: str, folder: Path, options, peer: Peer, peers: bool) -> None:
    """Race each algorithm against the peer's of the same name, and our full-batch methods against each other.

    The record is written after each race. With ``options.algorithms``, only these algorithms run, and the other
    contenders of an existing record are kept.
    """
    plan, arrays = PLANS[problem], make(problem, folder)
    recorded = report.load(options.rates, "rates")
    if problem not in recorded:
        raise Missing(f"no rates are recorded for {problem}: run tune --problems {problem} first")
    rates = recorded[problem]["chosen"]
    names = [name for name in rates if not name.startswith("full batch")]
    sides = (True, False)[: 1 + peers]
    groups = [[contender(problem, name, rates[name], ours, options.block) for ours in sides] for name in names]
    full = [contender(problem, "full batch", rates[name], True) for name in rates if name.startswith("full batch")]
    data = Data.load(arrays)
    reference, seeds = PROBLEMS[problem].reference(data), _seeds(options)
    record = {"problem": problem, "metric": plan.metric, "metrics": list(reference.metrics), "contenders": {}}
    record |= {"seconds": options.seconds, "seeds": seeds, "machine": machine()}
    if options.algorithms:
        groups = [group for group in groups if group[0].algorithm in options.algorithms]
        full = full if "full batch" in options.algorithms else []
        if problem in report.recorded(options.out):
            record["contenders"] = report.load(options.out, problem)["contenders"]
    for group in groups + ([full] if full else []):
        found = race(problem, arrays, group, seeds, options.seconds, peer)
        for one in group:
            runs = [_measured(points, reference, one, data.sizes) for points in found[one.label]]
            settings = {"algorithm": one.algorithm, "options": one.options, "block": one.block, "ours": one.ours}
            record["contenders"][one.label] = settings | {"runs": runs}
            print(problem, one.label, {k: v[-1] for k, v in runs[0].items()}, flush=True)
        report.save(options.out, problem, record)


def _measured(points, reference, one, sizes):
    """Return a run's times, steps, oracle calls and measures at its finite points, as lists for a record."""
    pairs = zip(points["z"], points["x"], strict=True)
    kept = [number for number, (z, x) in enumerate(pairs) if _is_finite(z, x)]
    measures = [reference.measure(points["z"][number], points["x"][number]) for number in kept]
    steps = points["steps"][kept]
    calls = (
        points["oracles"][kept] if one.algorithm == "full batch" else steps * oracles_of_a_step(one.algorithm, *sizes)
    )
    columns = {name: [float(f"{measure[name]:.6g}") for measure in measures] for name in reference.metrics}
    return {
        "seconds": [round(float(t), 5) for t in points["seconds"][kept]],
        "steps": [int(s) for s in steps],
        "oracles": [int(c) for c in calls],
    } | columns


def main(arguments: list[str] | None = None) -> int:
    """Run a suite; return 2 if the peer is needed and missing, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bilevel", description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", nargs="?", choices=("tune", "run", "table", "plot", "docs"), default="run")
    parser.add_argument("--peer", type=Path, help="clone of github.com/benchopt/benchmark_bilevel")
    parser.add_argument("--peer-python", type=Path, help="a Python that has benchopt and JAX")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["quadratic", "logistic", "cleaning"])
    parser.add_argument(
        "--algorithms", nargs="+", help='algorithms to tune or run, such as SOBA or "full batch" (default: all)'
    )
    parser.add_argument("--seconds", type=float, help="length of a run (default: 8, and 3 for tune)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument(
        "--block",
        type=int,
        help="number of steps between two looks at the clock in a run (default: the problem's); needs --out",
    )
    parser.add_argument("--core", type=int, default=0, help="CPU core to which both sides are pinned (default: 0)")
    parser.add_argument("--arrays", type=Path, help="folder to keep the problems' arrays (default: a temporary one)")
    parser.add_argument("--rates", type=Path, default=report.RESULTS, help="folder of the chosen rates")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the records")
    parser.add_argument("--images", type=Path, default=report.IMAGES, help="folder of the pictures")
    options = parser.parse_args(arguments)
    if options.block is not None and (options.block < 1 or options.out == report.RESULTS):
        parser.error(
            "--block needs a positive number, and --out, because the records here have blocks of other lengths"
        )
    if options.suite in ("tune", "run"):
        options.seconds = options.seconds or {"tune": 3.0, "run": 8.0}[options.suite]
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.arrays or Path(temporary)
            peer = Peer(options.peer, options.peer_python, options.core, Path(temporary) / "compiled")
            try:
                peer.check()
                peers = True
            except Missing as error:
                print(error, file=sys.stderr)
                if options.suite == "tune":
                    return 2
                peers = False
            for problem in options.problems:
                if options.suite == "tune":
                    path = options.out / "bilevel-rates.json"
                    known = report.load(options.out, "rates") if path.exists() else {}
                    tuned = tune(problem, folder, options, peer, known.get(problem, {}))
                    report.save(options.out, "rates", known | {problem: tuned})
                else:
                    try:
                        run(problem, folder, options, peer, peers)
                    except Missing as error:
                        print(error, file=sys.stderr)
                        return 2
    if options.suite in ("run", "table"):
        print(report.table(options.out))
    if options.suite == "docs":
        report.PAGE.write_text(report.fill(report.PAGE.read_text(), report.table(options.out)))
    if options.suite in ("run", "plot"):
        print(*report.plot(options.out, options.images), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
