"""Compare training recipes for Omniglot by their accuracy on validation classes, after equal CPU time.

    python -m benchmarks.recipes --data OMNIGLOT [--seconds 120] [--seeds 2] [--recipes NAME ...] [--out FILE]

A recipe says how many tasks and queries a meta-step has, and how the learning rate falls. Each run trains the preset
omniglot-5way-1shot-gd with 32 filters, λ = 0.5 and inner steps of 0.02, in a process that is pinned to one core. With
the preset's λ = 0.1, hardly any task has a usable gradient at this number of filters. Before the run, 20 meta-steps are
timed, and the run gets as many meta-steps as fit into the given seconds. A tenth of the training characters is held out
for validation, and every θ is evaluated on the same 600 tasks of these. The test characters are not looked at.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

import imaml
from imaml.errors import InputError
from imaml.runs import checkpoints
from imaml.runs.log import read_log
from imaml.runs.meta_step import initial_state
from imaml.settings.overrides import override
from imaml.settings.preset import Preset
from imaml.storage.files import write_whole

PRESET = "omniglot-5way-1shot-gd"
CHANGED = {"network.filters": 32, "strength": 0.5, "inner.step_size": 0.02}
"""The settings of all recipes that differ from those of the preset."""
HELD_OUT, VALIDATION_TASKS = 0.1, 600
AVERAGED = 20
"""Number of checkpoints whose mean is evaluated by a recipe that averages θ."""


@dataclass(frozen=True)
class Stage:
    """A part of a recipe, which starts with the θ of the part before it and a new state of Adam.

    Attributes:
        share: the part's share of the time.
        tasks: tasks in a meta-step.
        queries: query images of each class in training.
        final_fraction: the last learning rate relative to the first one; 1 for a constant rate.
    """

    share: float = 1.0
    tasks: int = 8
    queries: int = 15
    final_fraction: float = 0.0

    def preset(self, seed: int, steps: int) -> Preset:
        """Return the preset for ``steps`` meta-steps."""
        changed = {
            **CHANGED, "outer.tasks": self.tasks, "outer.queries": self.queries, "outer.steps": steps,
            "outer.final_fraction": self.final_fraction, "seed": seed, "validation.held_out": HELD_OUT,
            "validation.every": steps, "validation.tasks": 2,  # Classes are held out only from runs that validate.
        }  # fmt: skip
        chosen = imaml.preset(PRESET)
        for path, value in changed.items():
            chosen = override(chosen, path, str(value))
        return chosen


@dataclass(frozen=True)
class Recipe:
    """The stages of a recipe, and whether the mean of θ over the end of the last stage is evaluated."""

    stages: tuple[Stage, ...]
    average: bool = False


CONSTANT = 1.0
RECIPES = {
    "as the preset: 8 tasks, 15 queries": Recipe((Stage(),)),
    "4 tasks": Recipe((Stage(tasks=4),)),
    "16 tasks": Recipe((Stage(tasks=16),)),
    "4 tasks, then 16": Recipe((Stage(0.5, tasks=4, final_fraction=CONSTANT), Stage(0.5, tasks=16))),
    "5 queries": Recipe((Stage(queries=5),)),
    "15 queries, then 5": Recipe((Stage(0.5, final_fraction=CONSTANT), Stage(0.5, queries=5))),
    "constant rate": Recipe((Stage(final_fraction=CONSTANT),)),
    "constant rate, mean of θ": Recipe((Stage(final_fraction=CONSTANT),), average=True),
}


def run(recipe: Recipe, seed: int, seconds: float, data: Path) -> dict:
    """Train by a recipe, and return its numbers of meta-steps and tasks, its seconds and its validation accuracy.

    Args:
        recipe: the recipe.
        seed: the seed of the first stage. A later stage has another one, so that it draws other tasks.
        seconds: time for the meta-steps.
        data: the folder of Omniglot's archives.
    """
    theta, found = None, {"meta_steps": 0, "tasks": 0, "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for number, stage in enumerate(recipe.stages):
            stage_seed, share = seed + 1000 * number, stage.share * seconds
            steps = max(2, round(share / _seconds_of_a_step(stage, stage_seed, data)))
            # The checkpoints that are averaged span the last fifth of the time.
            kept = {"checkpoint_seconds": 0.2 * share / AVERAGED, "keep_checkpoints": AVERAGED}
            trained = _trained(
                stage.preset(stage_seed, steps), Path(folder) / str(number), data, theta,
                **kept if recipe.average else {},
            )  # fmt: skip
            theta, log = trained.theta, read_log(trained.directory)
            found["meta_steps"] += steps
            found["tasks"] += steps * stage.tasks
            # The time of the first step includes the compilation.
            found["seconds"] += (log[-1].seconds - log[0].seconds) * steps / (steps - 1)
        if recipe.average:
            theta = _mean_theta(trained.directory, trained.preset)
    settings = stage.preset(0, 1)  # The seed determines the validation tasks.
    validation = imaml.evaluate(theta, settings, VALIDATION_TASKS, data, part="validation")
    return found | {"accuracy": validation.value, "interval": validation.interval}


def _trained(preset, directory, data, start=None, **options):
    """Return a finished run without evaluation."""
    done = imaml.train(preset, directory, data, start=start, devices=1, evaluation_tasks=0, **options)
    if not done.finished:
        raise KeyboardInterrupt
    return done


def _seconds_of_a_step(stage, seed, data):
    """Return the seconds of a meta-step, as a mean over 20 of them after the compilation."""
    with tempfile.TemporaryDirectory() as folder:
        _trained(stage.preset(seed, 25), Path(folder), data)
        log = read_log(Path(folder))
    return (log[24].seconds - log[4].seconds) / 20


def _mean_theta(directory, preset):
    """Return the mean of θ over the last checkpoints of a run."""
    paths = sorted(directory.glob("checkpoint-*.npz"))[-AVERAGED:]
    thetas = [checkpoints.read(path).restore(initial_state(preset)).theta for path in paths]
    return jax.tree.map(lambda *leaves: np.mean(leaves, 0, dtype=np.float32), *thetas)


def main(words: list[str] | None = None) -> int:
    """Run every recipe with every seed, one process on each core at a time; print a table and write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder of Omniglot's archives")
    parser.add_argument("--seconds", type=float, default=120.0, help="training time of each run (default: 120)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each recipe (default: 2)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # for a child: run one recipe with this seed
    options = parser.parse_args(words)
    if options.seed is not None:
        print(json.dumps(run(RECIPES[options.recipes[0]], options.seed, options.seconds, options.data)))
        return 0
    rows: list[dict] = []
    try:
        _run_all(options, rows)
    except (InputError, KeyboardInterrupt) as error:
        print(f"recipes: {error or 'stopped'}", file=sys.stderr)
        return 2
    finally:
        if rows:
            print(table(rows))
        if rows and options.out:
            content = json.dumps({"preset": PRESET, "changed": CHANGED, "runs": rows}, indent=1) + "\n"
            write_whole(options.out, lambda stream: stream.write(content.encode()))
    return 0


def _run_all(options, rows):
    """Run every recipe with every seed in child processes, one on each core, and append the results to ``rows``.

    Raises:
        InputError: if a child fails. The others are then finished first.
    """
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.recipes]
    cores = list(os.sched_getaffinity(0))

    def pin():
        os.sched_setaffinity(0, {cores.pop()})  # of this thread; its child processes inherit it

    def child(job):
        name, seed = job
        command = [sys.executable, "-m", "benchmarks.recipes", "--data", str(options.data)]
        command += ["--seconds", str(options.seconds), "--recipes", name, "--seed", str(seed)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{name}, seed {seed}: {done.stderr[-500:]}")
        row = {"recipe": name, "seed": seed} | json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(f"{name}, seed {seed}: {100 * row['accuracy']:.2f} %", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(len(cores), initializer=pin) as threads:
        for done in [threads.submit(child, job) for job in jobs]:
            done.result()


def table(rows: list[dict]) -> str:
    """Return one line for each recipe, the best one first."""
    names = dict.fromkeys(row["recipe"] for row in rows)
    runs = {name: [row for row in rows if row["recipe"] == name] for name in names}
    fields = ("accuracy", "meta_steps", "tasks", "seconds")
    means = {name: {field: statistics.mean(row[field] for row in runs[name]) for field in fields} for name in names}
    lines = []
    for name in sorted(names, key=lambda name: means[name]["accuracy"], reverse=True):
        mean = means[name]
        seeds = ", ".join(f"{100 * row['accuracy']:.1f} ± {100 * row['interval']:.1f}" for row in runs[name])
        lines.append(
            f"{name:36}{100 * mean['accuracy']:6.1f} %  ({seeds}){mean['meta_steps']:8.0f} meta-steps"
            f"{mean['tasks']:8.0f} tasks{mean['seconds']:7.0f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
