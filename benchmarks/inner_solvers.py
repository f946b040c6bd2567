"""Compare inner solvers on tasks of training classes, at the θ of a trained run.

    python -m benchmarks.inner_solvers RUN [--data DIR] [--tasks 24] [--certify N] [--out FILE]

RUN is a run's folder, or the name of a record whose parameters come with the package.

For each inner solver, the command prints the mean query loss and accuracy, the medians of the inner residual and of
CG's relative residual, and the mean cosine between a task's meta-gradient and a nearly exact one. The nearly exact one
is computed with 800 stable inner steps and 60 CG iterations. The second solver is the run's own. At the end, the
command prints the largest Ritz value of H, the Hessian of the support loss, as a median over tasks. It prints one value
for θ, where descent starts, and one for the parameters φ that the run's own inner solver reaches.

With ``--certify N``, the meta-gradients of the first N tasks are certified. The command then also prints the median
correction by ``bl.certify``, relative to the corrected gradient, and the share of corrections that are of first order.
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
import imaml
from bilevel import tree
from bilevel.spectrum import ritz_values
from imaml.errors import InputError
from imaml.learning.algorithms import Learner
from imaml.learning.problem import support_loss
from imaml.learning.tasks import Task
from imaml.runs import data as run_data
from imaml.storage.files import write_whole

NEARLY_EXACT = bl.CG(60)
"""The linear solver of the nearly exact meta-gradient, and of the certificates."""


def solvers(limit: float, learner: Learner) -> dict[str, tuple[bl.InnerSolver, bl.Method]]:
    """Return the compared pairs of inner solver and method, by name: a nearly exact one, the run's own, and others.

    Args:
        limit: 2 / (largest eigenvalue of H at θ), the step size above which plain descent is unstable at θ.
        learner: the learner of the run.
    """
    rows: dict[str, tuple[bl.InnerSolver, bl.Method]] = {
        "near exact": (bl.GradientDescent(limit / 4, 800, momentum=0.8), bl.Implicit(NEARLY_EXACT)),
        "the run's own": (learner.solver, learner.method),
    }
    if isinstance(learner.solver, bl.GradientDescent) and not callable(learner.solver.step_size):
        half = replace(learner.solver, step_size=learner.solver.step_size / 2)
        rows["the run's own, half the step size"] = half, learner.method
    tried = ((5, 16, 0.0), (5, 32, 0.0), (0.5, 16, 0.0), (0.5, 64, 0.0), (0.5, 16, 0.8), (0.5, 16, 0.9))
    for factor, steps, momentum in tried:
        name = f"{factor} × limit, {steps} steps" + (f", momentum {momentum}" if momentum else "")
        rows[name] = bl.GradientDescent(factor * limit, steps, momentum=momentum), bl.Implicit(bl.CG(5))
    return rows


def curvature(learner: Learner, theta: dict, tasks: Task) -> tuple[jax.Array, jax.Array]:
    """Return the largest Ritz value of H at θ and at φ, for each task; both have shape ``[tasks]``.

    Args:
        learner: the learner whose inner solver finds φ.
        theta: the parameters θ.
        tasks: a batch of tasks.
    """
    loss = support_loss(learner.apply, learner.loss)

    def largest(w, task):
        product = jax.linearize(jax.grad(lambda w: loss(w, theta, task)), w)[1]
        return ritz_values(product, w)[-1]

    def both(task):
        return largest(theta, task), largest(learner.adapt(theta, task).w, task)

    return jax.jit(partial(jax.lax.map, both))(tasks)


def measure(learner: Learner, theta: dict, tasks: Task) -> dict[str, np.ndarray]:
    """Return query loss, accuracy, both residuals and the meta-gradient of each task.

    The arrays have a leading axis of tasks. Meta-gradients are flattened, ``[tasks, parameters]``.
    """
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


def certificates(problem: bl.Problem, learner: Learner, theta: dict, tasks: Task, count: int) -> dict[str, float]:
    """Return the median relative correction of the first tasks' meta-gradients, and the share that is of first order.

    Args:
        problem: the problem of a task. All solvers get the same object, for which ``bl.certify`` is compiled once.
        learner: the learner, whose inner solver and method compute the meta-gradients.
        theta: the parameters θ.
        tasks: a batch of tasks.
        count: the number of tasks that are certified.
    """
    function = bl.value_and_hypergradient(problem, learner.solver, learner.method, on_failure="ignore")
    compiled = jax.jit(lambda theta, task: function(theta, bl.identity_center, task))
    corrections, first_order = [], []
    for number in range(count):
        task = jax.tree.map(lambda array, number=number: array[number], tasks)
        out = compiled(theta, task)
        certificate = bl.certify(problem, theta, out, task, linear=NEARLY_EXACT)
        # Certificate.estimate is not used, because it is at least Certificate.rounding, which may be infinite.
        corrections.append(float(tree.distance(out.gradient, certificate.gradient) / certificate.norm))
        first_order.append(bool(certificate.first_order))
    return {"correction": float(np.median(corrections)), "first_order": float(np.mean(first_order))}


def study(learner: Learner, theta: dict, tasks: Task, certified: int = 0) -> dict:
    """Compare all inner solvers, print a line for each, and return the numbers as JSON types.

    Args:
        learner: the learner of the run.
        theta: the parameters θ.
        tasks: a batch of tasks.
        certified: the number of tasks whose meta-gradients are certified.
    """
    at_theta, at_phi = (float(np.median(values)) for values in curvature(learner, theta, tasks))
    rows, exact, problem = {}, None, learner.problem
    for name, (solver, method) in solvers(2 / at_theta, learner).items():
        tried = replace(learner, solver=solver, method=method)
        found = measure(tried, theta, tasks)
        gradient = found.pop("gradient").astype(np.float64)
        exact = gradient if exact is None else exact
        norms = np.linalg.norm(gradient, axis=1) * np.linalg.norm(exact, axis=1)
        numbers = {key: float((np.mean if key in ("loss", "accuracy") else np.median)(v)) for key, v in found.items()}
        rows[name] = numbers | {"cosine": float(np.mean((gradient * exact).sum(1) / norms))}
        if certified:
            rows[name] |= certificates(problem, tried, theta, tasks, certified)
        print(_line(name, rows[name]), flush=True)
    return {"largest_eigenvalue": {"theta": at_theta, "phi": at_phi}, "solvers": rows}


def _line(name, row):
    line = (
        f"{name:36} loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  inner {row['inner_residual']:.3f}  "
        f"CG {row['linear_residual']:.3f}  cosine {row['cosine']:.3f}"
    )
    if "correction" in row:
        line += f"  correction {row['correction']:.0%}, of first order {row['first_order']:.0%}"
    return line


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 2 for a run or data that cannot be used, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_solvers", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a run's folder, or the name of a record in the package")
    parser.add_argument("--data", type=Path, help="the folder of the dataset's archives")
    parser.add_argument("--tasks", type=int, default=24, help="number of tasks (default: 24)")
    parser.add_argument(
        "--certify", type=int, default=0, metavar="N", help="certify the gradients of the first N tasks"
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args(arguments)
    if not 0 <= options.certify <= options.tasks:
        parser.error(f"--certify needs a number between 0 and the {options.tasks} tasks, got {options.certify}")
    try:
        found = imaml.load(options.run, on_event=partial(print, file=sys.stderr))
        preset, theta = found.preset, found.theta
        pixels = run_data.load(Path(options.run), preset.dataset, options.data).train.pixels
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    keys = jax.random.split(jax.random.key(preset.seed + 1), options.tasks)
    draw = jax.jit(lambda pixels, keys: preset.training_episode.batch(pixels, keys, preset.turns(training=True)))
    tasks = draw(jnp.asarray(pixels), keys)
    record = {"meta_steps": int(found.facts["step"]), "tasks": options.tasks}
    record |= study(preset.learner, theta, tasks, options.certify)
    print("largest eigenvalue of H at θ {theta:.0f}, at φ {phi:.1f}".format(**record["largest_eigenvalue"]))
    if options.out:
        write_whole(options.out, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
