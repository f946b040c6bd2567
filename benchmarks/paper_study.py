"""Why does the paper's setting, taken literally, train badly? Short runs that differ from it in one factor each.

    python -m benchmarks.paper_study --data DIR [VARIANT …] [--steps 400] [--certify] [--minutes M] [--out DIR]

Omniglot 5-way 1-shot with the 64-filter network. The base is what the paper's text and tables say, read to the letter:
λ = 2 on the *mean* support loss, 16 steps of gradient descent at rate 0.1 (the rate of the authors' code; the paper
names none), 5 steps of conjugate gradients, as many query images as shots, Adam at 0.001. Each variant changes one
factor, the last all that the preset ``omniglot-5way-1shot-gd`` does.

A variant is one record in ``benchmarks/results/paper_study``, written when it ends. One that is there is not run
again, so the study can be run in pieces: with ``--minutes`` no variant is begun after so many.

What is recorded, each ``EVERY`` meta-steps: the mean over the training tasks of that stretch (query accuracy on
*training* classes, loss, residuals, how tasks ended), and a probe of four training tasks that are always the same:
extreme Ritz values of H, the Hessian of the support loss at φ (true eigenvalues lie outside of them), how far the inner
solve came; with ``--certify`` also what ``bl.certify`` says of one task's hypergradient. At the end, accuracy on tasks
of held-out classes.
Batch normalisation is over the query batch, as published.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel import tree
from bilevel.spectrum import ritz_values
from imaml import datasets
from imaml.datasets.cache import cache_directory
from imaml.learning import networks
from imaml.learning.algorithms import MetaGradient, meta_gradient
from imaml.learning.problem import cross_entropy, support_loss, task_problem
from imaml.learning.tasks import Episode, Task
from imaml.parallel.devices import AXIS, SHARED, SPREAD, local_mesh, on_all, over_tasks, use_all_cores
from imaml.runs.versions import versions
from imaml.storage.files import write_whole

RESULTS = Path(__file__).parent / "results" / "paper_study"
WAYS, FILTERS = 5, 64
EVERY = 25
"""Meta-steps between two probes, and in a stretch of the curve."""
CERTIFIED = 100
"""Meta-steps between two certificates, a multiple of ``EVERY``."""
CERTIFYING_STEPS = 30
"""CG steps of each linear solve in a certificate."""
PROBED = 4
"""Tasks of a probe."""
TESTED = 300
"""Tasks of held-out classes at the end."""


@dataclass(frozen=True)
class Variant:
    """One setting.

    Args:
        factor: what it changes of the base, in words.
        strength: λ, on the mean support loss.
        inner: the inner solver.
        linear: the solver of the adjoint system.
        epsilon: Adam's.
        learning_rate: Adam's.
        tasks: in a meta-step.
        queries: query images of each class in training; evaluation takes one.
        kernel_gain: factor on Glorot's initial kernels.
    """

    factor: str
    strength: float = 2.0
    inner: Any = bl.GradientDescent(0.1, 16)  # noqa: RUF009  (frozen)
    linear: bl.CG = bl.CG(5, engine="watched")  # noqa: RUF009
    epsilon: float = 1e-8
    learning_rate: float = 1e-3
    tasks: int = 4
    queries: int = 1
    kernel_gain: float = 1.0

    @property
    def knobs(self) -> "Knobs":
        """The numbers that a compiled program takes as arguments."""
        rate = getattr(self.inner, "step_size", 0.0)
        return Knobs(*map(jnp.float32, (self.strength, rate, self.learning_rate, self.epsilon)))


class Knobs(NamedTuple):
    """What variants of one shape differ in: with it as an argument they share their compiled programs."""

    strength: Any
    inner_rate: Any
    learning_rate: Any
    epsilon: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TunedTask(Task):
    """A task that brings λ and the inner rate along; see :class:`imaml.Task`."""

    strength: jax.Array
    inner_rate: jax.Array


def tuned(tasks: Task, knobs: Knobs) -> TunedTask:
    """A batch of tasks with the knobs in each."""
    numbers = (jnp.broadcast_to(knob, tasks.support_x.shape[:1]) for knob in (knobs.strength, knobs.inner_rate))
    return TunedTask(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, *numbers)


@dataclass(frozen=True)
class Descent:
    """:class:`bilevel.GradientDescent` from θ, at the task's own inner rate."""

    max_steps: int
    momentum: float

    def __call__(self, condition, init, theta, data):
        def move(_, state):
            w, memory = state
            memory = tree.add(tree.scale(self.momentum, memory), condition.residual(w, theta, data))
            return tree.subtract(w, tree.scale(data.inner_rate, memory)), memory

        return jax.lax.fori_loop(0, self.max_steps, move, (init, jax.tree.map(jnp.zeros_like, init)))[0]


@dataclass(frozen=True)
class TunedLearner:
    """An :class:`imaml.Learner` whose λ and inner rate come with the task: the same problem, network and loss."""

    inner: Any
    linear: bl.CG

    @property
    def problem(self) -> bl.Problem:
        return PROBLEM

    @property
    def solver(self) -> Any:
        inner = self.inner
        return Descent(inner.max_steps, inner.momentum) if isinstance(inner, bl.GradientDescent) else inner

    @property
    def method(self) -> bl.Method:
        return bl.Implicit(self.linear)

    def adapt(self, theta: dict, task: TunedTask) -> Any:
        return bl.solve(self.solver, PROBLEM.condition, theta, theta, task)


APPLY = networks.conv4(WAYS, FILTERS).apply
OBJECTIVE = support_loss(APPLY, cross_entropy)
PROBLEM = bl.Problem(
    bl.Proximal(OBJECTIVE, lambda theta, task: task.strength),
    task_problem(APPLY, cross_entropy, 1.0).outer,
    has_aux=True,
)
"""One for all variants: the task's λ in place of the 1, which the outer function does not see."""


MOMENTUM = bl.GradientDescent(0.01, 16, momentum=0.8)
BASE = Variant("nothing: the paper's numbers, read to the letter")
VARIANTS = {
    "literal": BASE,
    "summed-loss": replace(BASE, factor="λ = 2 on the summed loss (0.4 on the mean)", strength=0.4),
    "weak-proximity": replace(BASE, factor="λ = 0.1", strength=0.1),
    "strong-proximity": replace(
        BASE,
        factor="λ = 10 (at inner rate 0.05: at 0.1 descent diverges)",
        strength=10.0,
        inner=bl.GradientDescent(0.05, 16),
    ),
    "small-inner-rate": replace(BASE, factor="inner rate 0.02", inner=bl.GradientDescent(0.02, 16)),
    "momentum": replace(BASE, factor="inner rate 0.01, momentum 0.8", inner=MOMENTUM),
    "hessian-free": replace(BASE, factor="inner solver Hessian-free, 3 steps of 5 CG", inner=bl.HessianFree(3, 5)),
    "more-cg": replace(BASE, factor="20 CG steps", linear=bl.CG(20, engine="watched")),
    "damped-cg": replace(BASE, factor="CG on (I + H/λ) + I", linear=bl.CG(5, ridge=1.0, engine="watched")),
    "adam-epsilon": replace(BASE, factor="Adam's ε = 0.001", epsilon=1e-3),
    "larger-batch": replace(BASE, factor="16 tasks in a meta-step", tasks=16),
    "kernel-gain": replace(BASE, factor="kernels start 10 times as large", kernel_gain=10.0),
    "more-queries": replace(BASE, factor="15 query images of each class", queries=15),
    "slower-outer": replace(BASE, factor="Adam at 0.0003", learning_rate=3e-4),
    "preset": Variant(
        factor="all that the preset changes: λ, momentum, kernels, tasks, queries, Adam",
        strength=0.1,
        inner=MOMENTUM,
        learning_rate=3e-3,
        tasks=8,
        queries=15,
        kernel_gain=10.0,
    ),
}


def settings(variant: Variant) -> dict:
    """The numbers of a variant as JSON-able words."""
    return {field.name: _plain(getattr(variant, field.name)) for field in fields(variant)}


def _plain(value):
    return value if isinstance(value, str | int | float) else {"kind": type(value).__name__} | asdict(value)


# --- Training ------------------------------------------------------------------------------------------------------


def learner_of(variant: Variant) -> TunedLearner:
    """Equal for variants that differ in knobs alone, with one rate standing for all."""
    inner = variant.inner
    return TunedLearner(
        replace(inner, step_size=1.0) if isinstance(inner, bl.GradientDescent) else inner, variant.linear
    )


@cache
def step_of(learner: TunedLearner, tasks: int, queries: int) -> Callable:
    """``step((θ, memory), pixels, keys, knobs) -> ((θ, memory), report)``, over all devices that divide the tasks."""
    episode = Episode(WAYS, 1, queries)
    gradient = meta_gradient(learner, axis=AXIS)  # type: ignore[arg-type]  # it has what is asked of a Learner

    def on_each_device(fixed, keys):
        theta, pixels, knobs = fixed
        return gradient(theta, tuned(episode.batch(pixels, keys, True), knobs))

    layout = MetaGradient(SHARED, SHARED, SHARED, SHARED, SPREAD, SPREAD, SPREAD)
    spread = over_tasks(on_each_device, local_mesh(tasks), layout)

    @jax.jit
    def step(state, pixels, keys, knobs):
        theta, memory = state
        report = spread((theta, pixels, knobs), keys)
        adam = optax.adam(knobs.learning_rate, eps=knobs.epsilon)
        updates, new = adam.update(report.gradient, memory, theta)
        usable = report.tasks > 0
        return jax.tree.map(
            lambda a, b: jnp.where(usable, a, b), (optax.apply_updates(theta, updates), new), state
        ), report

    return step


def stretch(reports: list[MetaGradient], step: int) -> dict:
    """One point of the curve: what the tasks of the last meta-steps reported."""

    def column(name):
        return np.stack([np.asarray(getattr(report, name)) for report in reports])

    status, tasks = column("status"), column("status").size
    finite = np.isfinite(column("value"))
    return {
        "step": step,
        "accuracy": float(column("accuracy")[finite].mean()),
        "loss": float(column("value")[finite].mean()),
        "inner_residual": float(np.nanmedian(column("inner_residual"))),
        "linear_residual": float(np.nanmedian(column("linear_residual"))),
        "counted": float(column("tasks").sum() / tasks),
        "statuses": {bl.Status(int(s)).name: float(np.mean(status == s)) for s in np.unique(status)},
    }


# --- Probes --------------------------------------------------------------------------------------------------------


@cache
def _hypergradient(learner):
    hypergradient = bl.value_and_hypergradient(PROBLEM, learner.solver, learner.method, on_failure="ignore")
    return jax.jit(lambda theta, task: hypergradient(theta, bl.identity_center, task))


@jax.jit
def _curvature(phi, theta, task):
    """Extreme Ritz values of H at φ, and ‖F(θ)‖, where the inner solve began."""
    product = jax.linearize(jax.grad(lambda phi: OBJECTIVE(phi, theta, task)), phi)[1]
    values = ritz_values(product, phi)
    return values[0], values[-1], tree.norm(PROBLEM.condition.residual(theta, theta, task))


def probe(learner: TunedLearner, theta: dict, tasks: TunedTask, certified: bool) -> dict:
    """Curvature at φ, how far the inner solve came, and a certificate of the first task's hypergradient."""
    each = [jax.tree.map(lambda array, i=i: array[i], tasks) for i in range(PROBED)]
    outs = [_hypergradient(learner)(theta, task) for task in each]
    seen = [
        [float(value) for value in _curvature(out.inner.w, theta, task)] for out, task in zip(outs, each, strict=True)
    ]
    found: dict[str, Any] = {
        "lowest_ritz": [lowest for lowest, _, _ in seen],
        "highest_ritz": [highest for _, highest, _ in seen],
        "inner_residual_left": [
            float(out.inner.residual_norm) / before for out, (*_, before) in zip(outs, seen, strict=True)
        ],
    }
    if certified:
        # What the linear solves leave over is judged by the certificate itself.
        certificate = bl.certify(PROBLEM, theta, outs[0], each[0], linear=bl.CG(CERTIFYING_STEPS))
        found |= {
            "gradient": float(certificate.norm),
            # Certificate.estimate without its floor for rounding: constants that are probed here make that infinite.
            "correction": float(tree.norm(tree.subtract(outs[0].gradient, certificate.gradient))),
            "first_order": bool(certificate.first_order),
        }
    return found


@cache
def _accuracies(learner):
    episode = Episode(WAYS, 1, 1)

    def accuracy(fixed, key):
        theta, pixels, knobs = fixed
        task = episode.batch(pixels, key[None], True)
        one = jax.tree.map(lambda array: array[0], tuned(task, knobs))
        outputs = APPLY(learner.adapt(theta, one).w, one.query_x)
        return (outputs.argmax(-1) == one.query_y).mean(dtype=jnp.float32)

    spread = lambda fixed, keys: jax.lax.map(partial(accuracy, fixed), keys)  # noqa: E731
    return jax.jit(over_tasks(spread, local_mesh(TESTED), SPREAD))


def test_accuracy(variant: Variant, theta: dict, pixels: np.ndarray, key: jax.Array) -> dict:
    """Accuracy on ``TESTED`` tasks of held-out classes with one query image of each class, and its 95 % interval."""
    fixed = on_all((theta, pixels, variant.knobs), local_mesh(TESTED))
    values = np.asarray(_accuracies(learner_of(variant))(fixed, jax.random.split(key, TESTED)))
    return {"accuracy": float(values.mean()), "interval": float(1.96 * values.std(ddof=1) / np.sqrt(TESTED))}


# --- The study -----------------------------------------------------------------------------------------------------


def run(variant: Variant, dataset: datasets.ImageDataset, steps: int, seed: int, certify: bool = False) -> dict:
    """Train one variant and say what happened."""
    began = time.monotonic()
    init_key, train_key, test_key, probe_key = jax.random.split(jax.random.key(seed), 4)
    learner, knobs = learner_of(variant), variant.knobs
    step, mesh = step_of(learner, variant.tasks, variant.queries), local_mesh(variant.tasks)
    probed = Episode(WAYS, 1, 1).batch(jnp.asarray(dataset.train.pixels), jax.random.split(probe_key, PROBED), True)
    look = partial(probe, learner, tasks=tuned(probed, knobs))
    theta = networks.conv4(WAYS, FILTERS, kernel_gain=variant.kernel_gain).init(init_key)
    pixels, knobs = on_all((dataset.train.pixels, knobs), mesh)
    state = on_all((theta, optax.adam(1.0).init(theta)), mesh)
    curve, probes, reports, seconds = [], [{"step": 0} | look(theta, certified=certify)], [], 0.0
    for number in range(1, steps + 1):
        started = time.monotonic()
        keys = jax.random.split(jax.random.fold_in(train_key, number), variant.tasks)
        state, report = step(state, pixels, keys, knobs)
        reports.append(jax.block_until_ready(replace(report, gradient={})))
        seconds += time.monotonic() - started
        if number % EVERY == 0 or number == steps:
            curve.append(stretch(reports, number))
            certified = certify and (number % CERTIFIED == 0 or number == steps)
            probes.append({"step": number} | look(_here(state[0]), certified=certified))
            reports = []
            print(f"  {number}: {_line(curve[-1], probes[-1])}", file=sys.stderr, flush=True)
    return {
        "settings": settings(variant),
        "steps": steps,
        "tasks_seen": steps * variant.tasks,
        "test": test_accuracy(variant, _here(state[0]), dataset.test.pixels, test_key) | {"tasks": TESTED},
        "curve": curve,
        "probes": probes,
        "split": dataset.fingerprint(),
        "seed": seed,
        "training_seconds": round(seconds, 1),  # with the compilation of the step where this was the first
        "seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
        "machine": f"{platform.machine()}, {jax.local_device_count()} {jax.default_backend()} devices",
    }


def _here(theta):
    """θ on the first device: the probes' programs are for one."""
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
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"default: all of {', '.join(VARIANTS)}")
    parser.add_argument("--data", help="the folder of Omniglot's archives; default: where imaml keeps them")
    parser.add_argument("--steps", type=int, default=400, help="meta-steps of each (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--certify", action="store_true", help="certificates too, whose program takes minutes to compile"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no variant after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.variants) - set(VARIANTS)):
        parser.error(f"there is no variant {', '.join(unknown)}: known are {', '.join(VARIANTS)}")
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
