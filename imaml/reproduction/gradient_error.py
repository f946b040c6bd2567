"""Figure 2a: how far a meta-gradient is from the exact one, where the exact one has a closed form.

The inner problem is a linear regression, ½|Xφ − y|²/n + ½λ|φ − θ|², the outer one half the mean square on a query set.
Descent from θ is cut off after so many steps, and both methods are handed the same φ: implicit MAML solves
(I + H/λ)g = v there by so many CG steps, MAML differentiates the steps. The exact gradient is NumPy's, and shares no
code with either.

Everything is float64, the mean is over tasks, and errors are relative to the exact gradient.
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
"""Few samples of many unknowns, as in few-shot learning: most of H is zero, and CG is quick."""
DECAY = 30.0
"""The features' scales fall by this factor in all, so that the eigenvalues of H do by its square."""
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CG_STEPS = (2, 5, 11)
"""The last is as many as I + H/λ has different eigenvalues: one for each sample, and 1."""


class Curve(NamedTuple):
    """The error of one method, in the order of ``GradientErrors.steps``."""

    method: str
    errors: tuple[float, ...]


@dataclass(frozen=True)
class GradientErrors:
    """Mean relative errors over the tasks.

    Attributes:
        steps: inner gradient steps.
        curves: a :class:`Curve` for each method.
        condition_number: of I + H/λ, the mean over tasks.
        problem: in words.
    """

    steps: tuple[int, ...]
    curves: tuple[Curve, ...]
    condition_number: float
    problem: str

    def __getitem__(self, method: str) -> tuple[float, ...]:
        """The errors of a method."""
        return dict(self.curves)[method]


def draw(tasks: int = TASKS, seed: int = 0) -> tuple[np.ndarray, Task]:
    """θ, and linear regressions whose truths scatter around it; arrays with a leading axis of ``tasks``."""
    random = np.random.default_rng(seed)
    scales = DECAY ** -np.linspace(0, 1, UNKNOWNS)
    theta = random.normal(size=UNKNOWNS)
    x: Any = random.normal(size=(tasks, 2 * SAMPLES, UNKNOWNS)) * scales
    truths = theta + random.normal(size=(tasks, UNKNOWNS))
    y: Any = np.einsum("tsu,tu->ts", x, truths) + NOISE * random.normal(size=x.shape[:2])
    return theta, Task(x[:, :SAMPLES], y[:, :SAMPLES], x[:, SAMPLES:], y[:, SAMPLES:])


def exact(theta: np.ndarray, task: Task) -> tuple[np.ndarray, float, float]:
    """The meta-gradient of one task in closed form, with the least and the largest eigenvalue of H + λI."""
    x, y, x_query, y_query = map(np.asarray, (task.support_x, task.support_y, task.query_x, task.query_y))
    system = x.T @ x / len(x) + STRENGTH * np.eye(len(theta))
    phi = np.linalg.solve(system, x.T @ y / len(x) + STRENGTH * theta)
    v = x_query.T @ (x_query @ phi - y_query) / len(x_query)
    values = np.linalg.eigvalsh(system)
    return STRENGTH * np.linalg.solve(system, v), values[0], values[-1]


def gradient_errors(
    steps: Sequence[int] = STEPS, cg_steps: Sequence[int] = CG_STEPS, tasks: int = TASKS, seed: int = 0
) -> GradientErrors:
    """Run both methods on every task at every number of steps.

    Args:
        steps: inner gradient steps, at the rate 2 / (least + largest eigenvalue), the best for its worst direction.
        cg_steps: of implicit MAML's linear solve, a curve for each.
        tasks: over which the mean is taken.
        seed: of the tasks.
    """
    with jax.enable_x64(True):
        theta, batch = draw(tasks, seed)
        each = [jax.tree.map(lambda array, i=i: array[i], batch) for i in range(tasks)]
        answers, least, largest = zip(*(exact(theta, task) for task in each), strict=True)
        rate = 2 / (min(least) + max(largest))
        unrolled = [_outs(bl.Unrolled(), bl.GradientDescent(rate, count), theta, theta, batch) for count in steps]
        curves = {"MAML": [_mean_error(out.gradient, answers) for out in unrolled]}
        for count in cg_steps:
            found = [_outs(bl.Implicit(bl.CG(count)), _stay, theta, out.inner.w, batch) for out in unrolled]
            curves[f"iMAML, {count} CG steps"] = [_mean_error(out.gradient, answers) for out in found]
    return GradientErrors(
        tuple(steps),
        tuple(Curve(name, tuple(errors)) for name, errors in curves.items()),
        float(np.mean(np.array(largest) / np.array(least))),
        f"linear regression of {UNKNOWNS} unknowns on {SAMPLES} samples, λ = {STRENGTH}, {tasks} tasks, float64",
    )


def _stay(condition, init, theta, data):
    """The inner solver that is handed its result."""
    return init


@partial(jax.jit, static_argnames=("method", "solver"))
def _outs(method, solver, theta, start, batch):
    """Of every task, from one start for all or one for each."""
    hypergradient = bl.value_and_hypergradient(_PROBLEM, solver, method, on_failure="ignore")
    if start.ndim == theta.ndim:
        return jax.vmap(lambda task: hypergradient(theta, bl.identity_center, task))(batch)
    return jax.vmap(lambda phi, task: hypergradient(theta, phi, task))(start, batch)


def _mean_error(found, answers):
    difference = np.linalg.norm(np.asarray(found) - np.stack(answers), axis=1)
    return float(np.mean(difference / np.linalg.norm(answers, axis=1)))


_PROBLEM = task_problem(lambda phi, x: x @ phi, lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2), STRENGTH)


def shown(found: GradientErrors) -> str:
    """As a table, a line for each method."""
    width = max(len(curve.method) for curve in found.curves)
    lines = [f"{'inner steps':{width}}" + "".join(f"{count:>10}" for count in found.steps)]
    lines += [f"{name:{width}}" + "".join(f"{error:10.1e}" for error in errors) for name, errors in found.curves]
    title = f"Relative error of the meta-gradient: {found.problem}, condition number {found.condition_number:.0f}"
    return "\n".join([title, *lines])
