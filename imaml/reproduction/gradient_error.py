"""Figure 2a: the error of the meta-gradients of implicit MAML and MAML on a problem with a closed-form meta-gradient.

Each task is a linear regression. With meta-parameters θ, n support samples, inputs X and targets y, the inner objective
of the parameters φ is ½‖Xφ − y‖²/n + ½λ‖φ − θ‖². The outer objective is half the mean squared error on a
query set. Gradient descent from θ stops after a given number of steps, and both methods use the φ that it reaches.
Implicit MAML solves (I + H/λ)g = v for the meta-gradient g by a given number of CG steps, with H = XᵀX/n and the query
loss's gradient v at φ. MAML differentiates the descent. NumPy computes the exact gradient from its closed form, without
code of either method.

All numbers are float64. Errors are relative to the exact gradient's norm and averaged over tasks.

Source: Rajeswaran et al. (2019), figure 2a.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from imaml.learning.problem import task_problem
from imaml.learning.tasks import Task

TASKS, UNKNOWNS, SAMPLES, STRENGTH, NOISE = 16, 100, 10, 0.05, 0.1
"""There are fewer samples than unknowns, as in few-shot learning. The rank of H is at most ``SAMPLES``, so CG needs few
steps."""
DECAY = 30.0
"""Ratio of the largest to the smallest scale of a feature."""
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CG_STEPS = (2, 5, 11)
"""I + H/λ has 11 different eigenvalues: ten that depend on the samples, and the number 1. In exact arithmetic, 11 CG
steps suffice."""


class Curve(NamedTuple):
    """Relative errors of one method, one for each entry of ``GradientErrors.steps``."""

    method: str
    errors: tuple[float, ...]


@dataclass(frozen=True)
class GradientErrors:
    """Relative errors of meta-gradients, averaged over tasks.

    Attributes:
        steps: numbers of inner gradient steps.
        curves: one :class:`Curve` for each method.
        condition_number: condition number of I + H/λ, averaged over tasks.
        problem: description of the problem.
    """

    steps: tuple[int, ...]
    curves: tuple[Curve, ...]
    condition_number: float
    problem: str

    def __getitem__(self, method: str) -> tuple[float, ...]:
        """Return the errors of a method by its name, in the order of ``steps``."""
        return dict(self.curves)[method]


def draw(tasks: int = TASKS, seed: int = 0) -> tuple[np.ndarray, Task]:
    """Draw θ and a batch of linear regressions whose true parameters scatter around θ.

    Args:
        tasks: number of regressions.
        seed: seed of NumPy's generator.

    Returns:
        θ, of shape ``[UNKNOWNS]``, and a batch of tasks, with inputs of shape ``[tasks, SAMPLES, UNKNOWNS]`` and
        targets of shape ``[tasks, SAMPLES]``.
    """
    random = np.random.default_rng(seed)
    scales = DECAY ** -np.linspace(0, 1, UNKNOWNS)
    theta = random.normal(size=UNKNOWNS)
    x: Any = random.normal(size=(tasks, 2 * SAMPLES, UNKNOWNS)) * scales
    truths = theta + random.normal(size=(tasks, UNKNOWNS))
    y: Any = np.einsum("tsu,tu->ts", x, truths) + NOISE * random.normal(size=x.shape[:2])
    return theta, Task(x[:, :SAMPLES], y[:, :SAMPLES], x[:, SAMPLES:], y[:, SAMPLES:])


def exact(theta: np.ndarray, task: Task) -> tuple[np.ndarray, float, float]:
    """Return the meta-gradient of one task from its closed form, and the smallest and largest eigenvalue of H + λI.

    With A = XᵀX/n + λI and φ = A⁻¹(Xᵀy/n + λθ), the meta-gradient is λA⁻¹v, where v is the query loss's gradient at φ.

    Args:
        theta: θ, of shape ``[UNKNOWNS]``.
        task: one task of :func:`draw`.
    """
    x, y, x_query, y_query = map(np.asarray, (task.support_x, task.support_y, task.query_x, task.query_y))
    system = x.T @ x / len(x) + STRENGTH * np.eye(len(theta))
    phi = np.linalg.solve(system, x.T @ y / len(x) + STRENGTH * theta)
    v = x_query.T @ (x_query @ phi - y_query) / len(x_query)
    values = np.linalg.eigvalsh(system)
    return STRENGTH * np.linalg.solve(system, v), values[0], values[-1]


def gradient_errors(
    steps: Sequence[int] = STEPS, cg_steps: Sequence[int] = CG_STEPS, tasks: int = TASKS, seed: int = 0
) -> GradientErrors:
    """Compute the errors of MAML and of implicit MAML for each number of inner steps.

    The step size of gradient descent is 2 / (smallest + largest eigenvalue of H + λI over all tasks). With this step
    size, the slowest direction converges as fast as possible.

    Args:
        steps: numbers of inner gradient steps.
        cg_steps: numbers of CG steps of implicit MAML's linear solve; one curve is computed for each.
        tasks: number of tasks that errors are averaged over.
        seed: seed of the tasks.
    """
    with jax.enable_x64(True):
        theta, batch = draw(tasks, seed)
        each = [jax.tree.map(lambda array, i=i: array[i], batch) for i in range(tasks)]
        answers, least, largest = zip(*(exact(theta, task) for task in each), strict=True)
        rate = 2 / (min(least) + max(largest))
        unrolled = [_of_tasks(bl.Unrolled(), bl.GradientDescent(rate, count), theta, theta, batch) for count in steps]
        curves = {"MAML": [_mean_error(out.gradient, answers) for out in unrolled]}
        for count in cg_steps:
            method = bl.Implicit(bl.CG(count))
            found = [_of_tasks(method, _return_init, theta, out.inner.w, batch) for out in unrolled]
            curves[f"iMAML, {count} CG steps"] = [_mean_error(out.gradient, answers) for out in found]
    return GradientErrors(
        tuple(steps),
        tuple(Curve(name, tuple(errors)) for name, errors in curves.items()),
        float(np.mean(np.array(largest) / np.array(least))),
        f"linear regression of {UNKNOWNS} unknowns on {SAMPLES} samples, λ = {STRENGTH}, {tasks} tasks, float64",
    )


def _return_init(condition, init, theta, data):
    """Return ``init``. This is the inner solver if φ has already been computed."""
    return init


@partial(jax.jit, static_argnames=("method", "solver"))
def _of_tasks(method, solver, theta, start, batch):
    """Return the hypergradients of all tasks.

    If ``start`` has the shape of θ, every inner solve starts from θ. Otherwise ``start`` holds a φ for each task.
    """
    hypergradient = bl.value_and_hypergradient(_PROBLEM, solver, method, on_failure="ignore")
    if start.ndim == theta.ndim:
        return jax.vmap(lambda task: hypergradient(theta, bl.identity_center, task))(batch)
    return jax.vmap(lambda phi, task: hypergradient(theta, phi, task))(start, batch)


def _mean_error(found, answers):
    difference = np.linalg.norm(np.asarray(found) - np.stack(answers), axis=1)
    return float(np.mean(difference / np.linalg.norm(answers, axis=1)))


_PROBLEM = task_problem(lambda phi, x: x @ phi, lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2), STRENGTH)


def shown(found: GradientErrors) -> str:
    """Format the errors as a text table with one line for each method."""
    width = max(len(curve.method) for curve in found.curves)
    lines = [f"{'inner steps':{width}}" + "".join(f"{count:>10}" for count in found.steps)]
    lines += [f"{name:{width}}" + "".join(f"{error:10.1e}" for error in errors) for name, errors in found.curves]
    title = f"Relative error of the meta-gradient: {found.problem}, condition number {found.condition_number:.0f}"
    return "\n".join([title, *lines])
