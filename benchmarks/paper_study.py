"""Train the setting of the implicit MAML paper, and variants of it, to find why the setting trains badly.

    python -m benchmarks.paper_study --data DIR [VARIANT …] [--steps 400] [--certify] [--minutes M] [--out DIR]

The task is Omniglot, 5-way 1-shot, with the network of 64 filters. The base variant follows the paper's text and tables
literally: proximal strength λ = 2 on the *mean* support loss, 16 steps of gradient descent at rate 0.1 (from the
authors' code, because the paper gives no rate), 5 steps of conjugate gradients, as many query images as shots, Adam at
0.001. Each other variant changes one factor, with three exceptions. ``momentum`` changes the inner rate together with
the momentum. ``strong-proximity`` also lowers the inner rate, because descent at 0.1 diverges. ``preset`` makes all
changes of the preset ``omniglot-5way-1shot-gd``. The variants are in :mod:`benchmarks.paper_study_variants`.

Each variant writes one record to ``benchmarks/results/paper_study`` when it ends. A variant with a record is not run
again, so the study can be run in several calls. With ``--minutes M``, a call starts no variant after M minutes.

After every ``EVERY`` meta-steps, a record gets:

- a point of the learning curve, which summarises the training tasks of these steps: query accuracy on *training*
  classes, loss, residuals, and the fraction of the tasks with each status;
- a probe of four fixed training tasks: the extreme Ritz values of H, the Hessian of the support loss at the adapted
  parameters φ, and the inner residual at φ relative to that at θ. The extreme eigenvalues of H lie at or beyond these
  Ritz values. With ``--certify``, the probe before the first meta-step, every fourth probe after it, and the last one
  also contain the result of ``bl.certify`` for one task's hypergradient.

At the end, a record contains the accuracy on tasks of held-out classes. Batch normalisation uses the statistics of the
query batch, as published.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.paper_study_training import (
    FILTERS,
    PROBED,
    TESTED,
    WAYS,
    learner_of,
    probe,
    step_of,
    stretch,
    test_accuracy,
    tuned,
)
from benchmarks.paper_study_variants import VARIANTS, Variant, settings
from imaml import datasets
from imaml.datasets.cache import cache_directory
from imaml.learning import networks
from imaml.learning.tasks import Episode
from imaml.parallel.devices import local_mesh, on_all, use_all_cores
from imaml.runs.versions import versions
from imaml.storage.files import write_whole

RESULTS = Path(__file__).parent / "results" / "paper_study"
EVERY = 25
"""Number of meta-steps between two probes. A point of the curve summarises the same number of meta-steps."""
CERTIFIED = 100
"""Number of meta-steps between two certificates, a multiple of ``EVERY``."""


def run(variant: Variant, dataset: datasets.ImageDataset, steps: int, seed: int, certify: bool = False) -> dict:
    """Train one variant and return its record.

    Args:
        variant: the setting.
        dataset: Omniglot.
        steps: number of meta-steps.
        seed: seed of parameters, training tasks, test tasks and probed tasks.
        certify: add certificates to the probes; their program takes minutes to compile.
    """
    began = time.monotonic()
    init_key, train_key, test_key, probe_key = jax.random.split(jax.random.key(seed), 4)
    learner, knobs = learner_of(variant), variant.knobs
    step, mesh = step_of(learner, variant.tasks, variant.queries), local_mesh(variant.tasks)
    probed = Episode(WAYS, 1, 1).batch(jnp.asarray(dataset.train.pixels), jax.random.split(probe_key, PROBED), True)
    probe_at = partial(probe, learner, tasks=tuned(probed, knobs))
    theta = networks.conv4(WAYS, FILTERS, kernel_gain=variant.kernel_gain).init(init_key)
    pixels, knobs = on_all((dataset.train.pixels, knobs), mesh)
    state = on_all((theta, optax.adam(1.0).init(theta)), mesh)
    curve, probes, reports, seconds = [], [{"step": 0} | probe_at(theta, certified=certify)], [], 0.0
    for number in range(1, steps + 1):
        started = time.monotonic()
        keys = jax.random.split(jax.random.fold_in(train_key, number), variant.tasks)
        state, report = step(state, pixels, keys, knobs)
        reports.append(jax.block_until_ready(replace(report, gradient={})))
        seconds += time.monotonic() - started
        if number % EVERY == 0 or number == steps:
            curve.append(stretch(reports, number))
            certified = certify and (number % CERTIFIED == 0 or number == steps)
            probes.append({"step": number} | probe_at(_on_one_device(state[0]), certified=certified))
            reports = []
            print(f"  {number}: {_line(curve[-1], probes[-1])}", file=sys.stderr, flush=True)
    return {
        "settings": settings(variant),
        "steps": steps,
        "tasks_seen": steps * variant.tasks,
        "test": test_accuracy(variant, _on_one_device(state[0]), dataset.test.pixels, test_key) | {"tasks": TESTED},
        "curve": curve,
        "probes": probes,
        "split": dataset.fingerprint(),
        "seed": seed,
        # The compilation of the step is included, unless an earlier variant has the same program.
        "training_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
        "machine": f"{platform.machine()}, {jax.local_device_count()} {jax.default_backend()} devices",
    }


def _on_one_device(theta):
    """Return θ on the first device, because the probes are compiled for one device."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), theta)


def _line(point, probe):
    error = f"error {probe['correction'] / probe['gradient']:.0%}, " if "correction" in probe else ""
    return (
        f"accuracy {point['accuracy']:.1%}, inner {point['inner_residual']:.2g}, "
        f"linear {point['linear_residual']:.2g}, "
        f"H in [{min(probe['lowest_ritz']):.2g}, {max(probe['highest_ritz']):.2g}], "
        f"{error}negative {point['statuses'].get('NEGATIVE_CURVATURE', 0):.0%}, counted {point['counted']:.0%}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen variants that have no record yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"default: all of {', '.join(VARIANTS)}")
    parser.add_argument("--data", help="the folder of Omniglot's archives; default: imaml's cache folder")
    parser.add_argument("--steps", type=int, default=400, help="meta-steps of each variant (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and tasks (default: 0)")
    parser.add_argument(
        "--certify", action="store_true", help="add certificates, whose program takes minutes to compile"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no variant after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the records")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.variants) - set(VARIANTS)):
        parser.error(f"unknown variant {', '.join(unknown)}: the variants are {', '.join(VARIANTS)}")
    use_all_cores()
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    began = time.monotonic()
    dataset = datasets.load("omniglot", options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.variants or VARIANTS:
        path = options.out / f"{name}.json"
        if path.exists() or time.monotonic() - began > 60 * options.minutes:
            continue
        print(f"{name}: {VARIANTS[name].factor}", file=sys.stderr, flush=True)
        command = f"python -m benchmarks.paper_study {name} --steps {options.steps} --seed {options.seed}"
        command += " --certify" if options.certify else ""
        found = run(VARIANTS[name], dataset, options.steps, options.seed, options.certify)
        record = {"name": name, "command": command} | found
        content = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_whole(path, lambda stream, content=content: stream.write(content.encode()))
        print(f"{name}: test accuracy {record['test']['accuracy']:.1%} in {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
