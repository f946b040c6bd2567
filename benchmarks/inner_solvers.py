"""Which inner solver finds φ, and what meta-gradient is left of it: on a trained run, where curvature is largest.

    python -m benchmarks.inner_solvers RUN [--data DIR] [--tasks 24] [--out FILE]

At the θ of a run's last checkpoint, on tasks of training classes, for each inner solver: mean query loss and accuracy,
the median inner residual and CG's, and the mean cosine of a task's meta-gradient with that of 800 stable steps and 60
CG iterations. Below them the largest eigenvalue of H, a Ritz value, at θ, where descent starts, and at φ.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from bilevel.spectrum import ritz_values
from imaml import datasets
from imaml.errors import InputError
from imaml.learning.algorithms import Learner
from imaml.learning.problem import support_loss
from imaml.learning.tasks import Task
from imaml.runs.evaluation import trained
from imaml.runs.meta_step import initial_state
from imaml.settings.published_presets import restore
from imaml.storage.files import write_whole


def solvers(limit: float) -> dict[str, tuple[bl.InnerSolver, bl.CG]]:
    """By name; ``limit`` is 2 / (largest eigenvalue at θ), which plain descent must stay below to be stable there."""
    rows: dict[str, tuple[bl.InnerSolver, bl.CG]] = {
        "near exact": (bl.GradientDescent(limit / 4, 800, momentum=0.8), bl.CG(60))
    }
    tried = ((5, 16, 0.0), (5, 32, 0.0), (0.5, 16, 0.0), (0.5, 64, 0.0), (0.5, 16, 0.8), (0.5, 16, 0.9))
    for factor, steps, momentum in tried:
        name = f"{factor} × limit, {steps} steps" + (f", momentum {momentum}" if momentum else "")
        rows[name] = bl.GradientDescent(factor * limit, steps, momentum=momentum), bl.CG(5)
    return rows


def curvature(learner: Learner, theta: dict, tasks: Task) -> tuple[jax.Array, jax.Array]:
    """The largest eigenvalue of H at θ and at φ of each task, ``[tasks]`` both."""
    loss = support_loss(learner.apply, learner.loss)

    def largest(w, task):
        product = jax.linearize(jax.grad(lambda w: loss(w, theta, task)), w)[1]
        return ritz_values(product, w)[-1]

    def both(task):
        return largest(theta, task), largest(learner.adapt(theta, task).w, task)

    return jax.jit(partial(jax.lax.map, both))(tasks)


def measure(learner: Learner, theta: dict, tasks: Task) -> dict[str, np.ndarray]:
    """Of each task: query loss, accuracy, both residuals and the meta-gradient as a vector."""
    function = bl.value_and_hypergradient(learner.problem, learner.solver, learner.method, on_failure="ignore")

    def one(task):
        out = function(theta, bl.identity_center, task)
        loss, outputs = out.aux
        accuracy = (outputs.argmax(-1) == task.query_y).mean()
        flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(out.gradient)])
        return {
            "loss": loss, "accuracy": accuracy, "inner_residual": out.inner.residual_norm,
            "linear_residual": out.linear.relative_residual, "gradient": flat,
        }  # fmt: skip

    return jax.tree.map(np.asarray, jax.jit(partial(jax.lax.map, one))(tasks))


def study(learner: Learner, theta: dict, tasks: Task) -> dict:
    """Everything that is printed, as plain numbers."""
    at_theta, at_phi = (float(np.median(values)) for values in curvature(learner, theta, tasks))
    rows, exact = {}, None
    for name, (solver, linear) in solvers(2 / at_theta).items():
        found = measure(replace(learner, solver=solver, method=bl.Implicit(linear)), theta, tasks)
        gradient = found.pop("gradient").astype(np.float64)
        exact = gradient if exact is None else exact
        sizes = np.linalg.norm(gradient, axis=1) * np.linalg.norm(exact, axis=1)
        numbers = {key: float((np.mean if key in ("loss", "accuracy") else np.median)(v)) for key, v in found.items()}
        rows[name] = numbers | {"cosine": float(np.mean((gradient * exact).sum(1) / sizes))}
        print(_line(name, rows[name]), flush=True)
    return {"largest_eigenvalue": {"theta": at_theta, "phi": at_phi}, "solvers": rows}


def _line(name, row):
    return (
        f"{name:36} loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  inner {row['inner_residual']:.3f}  "
        f"CG {row['linear_residual']:.3f}  cosine {row['cosine']:.3f}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_solvers", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--data", type=Path, help="the dataset's archives")
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args(arguments)
    try:
        found = trained(options.run, on_event=partial(print, file=sys.stderr))
        preset = restore(found.description["preset"], found.description["config"])
        pixels = datasets.load(preset.dataset, options.data).train.pixels
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    state = found.restore(initial_state(preset))
    keys = jax.random.split(jax.random.key(preset.seed + 1), options.tasks)
    draw = jax.jit(lambda pixels, keys: preset.training_episode.batch(pixels, keys, preset.turns(training=True)))
    tasks = draw(jnp.asarray(pixels), keys)
    record = {"meta_steps": int(state.step), "tasks": options.tasks} | study(preset.learner, state.theta, tasks)
    print("largest eigenvalue of H at θ {theta:.0f}, at φ {phi:.1f}".format(**record["largest_eigenvalue"]))
    if options.out:
        write_whole(options.out, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
