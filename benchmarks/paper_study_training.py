"""Training, probes and evaluation of one variant of :mod:`benchmarks.paper_study`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from benchmarks.paper_study_variants import Knobs, Variant
from bilevel import tree
from bilevel.spectrum import ritz_values
from imaml.learning import networks
from imaml.learning.meta_gradient import MetaGradient, meta_gradient
from imaml.learning.problem import cross_entropy, support_loss, task_problem
from imaml.learning.tasks import Episode, Task
from imaml.parallel.devices import AXIS, SHARED, SPREAD, local_mesh, on_all, over_tasks

WAYS, FILTERS = 5, 64
CERTIFYING_STEPS = 30
"""CG budget of each linear solve in a certificate."""
PROBED = 4
"""Number of training tasks in a probe."""
TESTED = 300
"""Number of held-out tasks in the test at the end of a run."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TunedTask(Task):
    """A :class:`imaml.Task` that also holds λ and the inner learning rate.

    Compiled programs then take both as arguments, and variants that differ only in them share one program.

    Attributes:
        strength: λ, a float32 scalar.
        inner_rate: step size of the inner gradient descent, a float32 scalar.
    """

    strength: jax.Array
    inner_rate: jax.Array


def tuned(tasks: Task, knobs: Knobs) -> TunedTask:
    """Return a batch of tasks with λ and the inner rate of ``knobs`` in each task."""
    numbers = (jnp.broadcast_to(knob, tasks.support_x.shape[:1]) for knob in (knobs.strength, knobs.inner_rate))
    return TunedTask(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, *numbers)


@dataclass(frozen=True)
class Descent:
    """Gradient descent like :class:`bilevel.GradientDescent`, with the step size ``data.inner_rate`` of the task.

    Args:
        max_steps: number of steps.
        momentum: the factor in m ← momentum·m + F, w ← w − inner_rate·m (Polyak's heavy ball).
    """

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
    """A learner like :class:`imaml.Learner`, except that λ and the inner rate are part of a :class:`TunedTask`.

    Args:
        inner: the inner solver; the step size of gradient descent is ignored.
        linear: the solver of the adjoint system.
    """

    inner: Any
    linear: bl.CG

    @property
    def problem(self) -> bl.Problem:
        """The bilevel problem of one task."""
        return PROBLEM

    @property
    def solver(self) -> Any:
        """The inner solver, with the task's step size in place of a fixed one."""
        inner = self.inner
        return Descent(inner.max_steps, inner.momentum) if isinstance(inner, bl.GradientDescent) else inner

    @property
    def method(self) -> bl.Method:
        """The implicit method with the learner's linear solver."""
        return bl.Implicit(self.linear)

    def adapt(self, theta: dict, task: TunedTask) -> Any:
        """Solve the inner problem of a task from θ; return a :class:`bilevel.Solution`."""
        return bl.solve(self.solver, PROBLEM.condition, theta, theta, task)


APPLY = networks.conv4(WAYS, FILTERS).apply
OBJECTIVE = support_loss(APPLY, cross_entropy)
PROBLEM = bl.Problem(
    bl.Proximal(OBJECTIVE, lambda theta, task: task.strength),
    task_problem(APPLY, cross_entropy, 1.0).outer,
    has_aux=True,
)
"""The problem of all variants, with λ from the task. Only its outer objective comes from ``task_problem``."""


def learner_of(variant: Variant) -> TunedLearner:
    """Return the learner of a variant; variants that differ only in their knobs have equal learners.

    The step size of the variant is one of its knobs, so the learner has the step size 1 instead.
    """
    inner = variant.inner
    return TunedLearner(
        replace(inner, step_size=1.0) if isinstance(inner, bl.GradientDescent) else inner, variant.linear
    )


@cache
def step_of(learner: TunedLearner, tasks: int, queries: int) -> Callable:
    """Return the meta-step ``step((θ, adam), pixels, keys, knobs) -> ((θ, adam), report)``.

    The tasks are spread over the largest number of devices that divides ``tasks``. If no task has a usable gradient,
    θ and Adam's state stay unchanged.

    Args:
        learner: the learner.
        tasks: number of tasks in a meta-step.
        queries: number of query images of each class.
    """
    episode = Episode(WAYS, 1, queries)
    gradient = meta_gradient(learner, axis=AXIS)  # type: ignore[arg-type]  # has problem, solver and method

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
    """Return one point of the learning curve, from the reports of the meta-steps since the previous point.

    Accuracy and loss are means over the meta-steps with a finite loss. The residuals are medians over the tasks.

    Args:
        reports: reports of these meta-steps.
        step: number of meta-steps done.
    """

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
    """Return the smallest and the largest Ritz value of H at φ, and the norm of the inner residual at the start w = θ.

    H is the Hessian of the support loss without the proximal term, and φ the adapted parameters.
    """
    product = jax.linearize(jax.grad(lambda phi: OBJECTIVE(phi, theta, task)), phi)[1]
    values = ritz_values(product, phi)
    return values[0], values[-1], tree.norm(PROBLEM.condition.residual(theta, theta, task))


def probe(learner: TunedLearner, theta: dict, tasks: TunedTask, certified: bool) -> dict:
    """Return, for each probed task, the extreme Ritz values of H, and the inner residual at φ divided by that at θ.

    With ``certified``, add three results of :func:`bilevel.certify` for the first task.

    Args:
        learner: the learner.
        theta: θ, on one device.
        tasks: the probed tasks, with the variant's knobs.
        certified: add the certificate.
    """
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
        # The budget need not suffice to solve the systems: the certificate accounts for their residuals.
        certificate = bl.certify(PROBLEM, theta, outs[0], each[0], linear=bl.CG(CERTIFYING_STEPS))
        found |= {
            "gradient": float(certificate.norm),
            # Certificate.estimate is not used, because it is at least Certificate.rounding. That number may be infinite
            # even if the distance between the two gradients is finite.
            "correction": float(tree.distance(outs[0].gradient, certificate.gradient)),
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
    """Return the accuracy on ``TESTED`` tasks of held-out classes, and half the width of its 95 % interval.

    Args:
        variant: the setting.
        theta: θ, on one device.
        pixels: images of the held-out classes, uint8 ``[classes, samples, height, width, channels]``.
        key: random key of the tasks; each has one query image of each class.
    """
    fixed = on_all((theta, pixels, variant.knobs), local_mesh(TESTED))
    values = np.asarray(_accuracies(learner_of(variant))(fixed, jax.random.split(key, TESTED)))
    return {"accuracy": float(values.mean()), "interval": float(1.96 * values.std(ddof=1) / np.sqrt(TESTED))}
