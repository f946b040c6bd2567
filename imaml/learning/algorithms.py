"""Meta-learning algorithms, each expressed as a bilevel problem, an inner solver and a differentiation method.

This module does not compute gradients. A :class:`Learner` holds the three parts, and :func:`imaml.meta_gradient`
averages the hypergradients that `bilevel` computes for a batch of tasks. θ denotes the meta-parameters, and φ the
parameters that are adapted to one task.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import bilevel as bl
from imaml.learning.problem import Apply, Loss, cross_entropy, reptile_problem, task_problem
from imaml.learning.tasks import Task

ALGORITHMS = {"imaml": "implicit MAML", "maml": "MAML", "fomaml": "first-order MAML", "reptile": "Reptile"}
"""The name of each algorithm on the command line, with its title in reports."""


@dataclass(frozen=True)
class Learner:
    """A meta-learning algorithm: a network, the inner solver that adapts it, and the method that differentiates φ.

    Args:
        apply: the network, ``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``.
        solver: the inner solver, which starts from θ and computes φ from examples of a task.
        method: how `bilevel` differentiates φ with respect to θ. ``bl.Implicit(bl.CG(5))`` gives implicit MAML,
            ``bl.Unrolled()`` gives MAML.
        strength: λ of the proximal term ½ λ‖φ − θ‖². None leaves the term out, as in MAML.
        loss: the loss on the support set and on the query set, ``loss(outputs, y) -> scalar``.
        reptile: if True, the meta-gradient is θ − φ instead of the gradient of the query loss; see
            :func:`imaml.learning.problem.reptile_problem`.
    """

    apply: Apply
    solver: bl.InnerSolver
    method: bl.Method
    strength: float | None
    loss: Loss = cross_entropy
    reptile: bool = False

    @property
    def problem(self) -> bl.Problem:
        """The bilevel problem of a training task. The ``data`` of the problem is a :class:`imaml.Task`."""
        if self.reptile:
            return reptile_problem(self.apply, self.loss)
        return task_problem(self.apply, self.loss, self.strength)

    def adapt(self, theta: dict, task: Task) -> bl.Solution:
        """Solve the inner problem on the support set of one task. The query set is not used, not even for Reptile.

        Args:
            theta: meta-parameters, a pytree of arrays. A Python number counts as a float.
            task: one task, without a batch axis.

        Returns:
            The solution with ``w`` = φ, a pytree like ``theta``, and ``residual_norm`` = ‖∇loss + λ(φ − θ)‖,
            without the second term if ``strength`` is None.
        """
        theta = float_arrays(theta)
        condition = task_problem(self.apply, self.loss, self.strength).condition
        return bl.solve(self.solver, condition, theta, theta, task)


def float_arrays(theta: Any) -> Any:
    """Return θ with an array for each leaf. A Python number has no dtype of its own, so it becomes a float."""

    def as_array(leaf):
        number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
        return jnp.asarray(leaf, float) if number else jnp.asarray(leaf)

    return jax.tree.map(as_array, theta)


def make_learner(
    algorithm: str, apply: Apply, loss: Loss, inner: bl.InnerSolver, linear: bl.LinearSolver, strength: float
) -> Learner:
    """Return the learner of one of the :data:`ALGORITHMS`.

    Args:
        algorithm: a key of :data:`ALGORITHMS`.
        apply: the network, as in :class:`Learner`.
        loss: the loss, as in :class:`Learner`.
        inner: the inner solver.
        linear: the solver of the adjoint system, see :mod:`imaml.learning.problem`. Only implicit MAML uses it.
        strength: λ of the proximal term. Only implicit MAML uses it.
    """
    if algorithm == "imaml":
        return Learner(apply, inner, bl.Implicit(linear), strength, loss)
    method = bl.Unrolled(first_order=algorithm != "maml")
    return Learner(apply, inner, method, None, loss, reptile=algorithm == "reptile")


# --- The authors' public code --------------------------------------------------------------------------------------

REFERENCE_DAMPING = 10.0
"""The constant that the public code adds to λ in the adjoint system of :mod:`imaml.learning.problem`."""


def constant_step_size(descent: bl.GradientDescent) -> float:
    """Return the step size of gradient descent, or raise ValueError for a schedule."""
    if callable(descent.step_size):
        raise ValueError(f"the step size must be a number here, got the schedule {descent.step_size}")
    return descent.step_size


@dataclass(frozen=True)
class DescendThenPull:
    """The inner loop of the public code: descent on the support loss, then one step on the proximal term.

    Args:
        descent: gradient descent on the support loss. The step on the proximal term has the same step size.
        strength: λ of the proximal term ½ λ‖φ − θ‖².
    """

    descent: bl.GradientDescent
    strength: float

    def __call__(self, condition, init, theta, data):
        descended = bl.solve(self.descent, bl.Stationary(condition.objective), init, theta, data)
        factor = constant_step_size(self.descent) * self.strength
        return jax.tree.map(lambda w, center: w - factor * (w - center), descended.w, condition.center(theta, data))


@dataclass(frozen=True)
class FromZero:
    """A linear solver that ignores ``init`` and starts from zero, as the solver of the public code does."""

    linear: bl.CG

    needs_symmetry = True

    def __call__(self, matvec, b, init=None):
        del init
        return self.linear(matvec, b)


def reference_learner(apply: Apply, loss: Loss, inner: bl.GradientDescent, linear: bl.CG, strength: float) -> Learner:
    """Return a learner with the meta-gradient of the authors' public code, which differs from the paper's equations.

    In the notation of :mod:`imaml.learning.problem`, the adjoint system of that code is
    ((1 + ridge)I + H/(λ + 10))g = v with a ridge of 1. Apart from the ridge, this is the adjoint system of an inner
    problem with λ + 10 in place of λ. The inner loop of the code does not minimise the objective of that problem, so
    the ``inner_residual`` of a meta-gradient does not measure convergence here.

    Args:
        apply: the network, as in :class:`Learner`.
        loss: the loss, as in :class:`Learner`.
        inner: gradient descent on the support loss, see :class:`DescendThenPull`.
        linear: conjugate gradients, with the damping of the code as ``ridge``.
        strength: λ of the inner loop.

    Source: https://github.com/aravindr93/imaml_dev.
    """
    solver = DescendThenPull(inner, strength)
    return Learner(apply, solver, bl.Implicit(FromZero(linear)), strength + REFERENCE_DAMPING, loss)
