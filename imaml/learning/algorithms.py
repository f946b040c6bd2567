"""Meta-learning algorithms, each expressed as a bilevel problem, an inner solver and a differentiation method.

This module has no gradient code of its own. A :class:`Learner` names the parts, and :func:`meta_gradient` averages the
hypergradients that :mod:`bilevel` computes for a batch of tasks.
"""

from dataclasses import dataclass

import jax

import bilevel as bl
from imaml.learning.problem import Apply, Loss, cross_entropy, reptile_problem, task_problem
from imaml.learning.tasks import Task

ALGORITHMS = {"imaml": "implicit MAML", "maml": "MAML", "fomaml": "first-order MAML", "reptile": "Reptile"}
"""The name of each algorithm on the command line, with its title in reports."""


@dataclass(frozen=True)
class Learner:
    """A meta-learning algorithm with its network: how a task is adapted to, and how the result is differentiated.

    Args:
        apply: the network, ``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``.
        solver: the inner solver, which adapts φ to a support set. It starts from θ.
        method: how :mod:`bilevel` differentiates φ*(θ). ``bl.Implicit(bl.CG(5))`` gives implicit MAML, and
            ``bl.Unrolled()`` gives MAML.
        strength: λ of the proximal term ½ λ‖φ − θ‖². None leaves the term out, as in MAML.
        loss: the loss on the support set and on the query set, ``loss(outputs, y) -> scalar``.
        reptile: use θ − φ as the meta-gradient instead of the gradient of the query loss; see
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
        """The bilevel problem of one training task; its ``data`` is a :class:`imaml.Task`."""
        if self.reptile:
            return reptile_problem(self.apply, self.loss)
        return task_problem(self.apply, self.loss, self.strength)

    def adapt(self, theta: dict, task: Task) -> bl.Solution:
        """Solve the inner problem of one task. The query set is not used.

        Args:
            theta: meta-parameters, a pytree of arrays.
            task: one task, without a batch axis.

        Returns:
            The solution with ``w`` = φ, a pytree like ``theta``, and ``residual_norm`` = ‖∇loss + λ(φ − θ)‖.
        """
        condition = task_problem(self.apply, self.loss, self.strength).condition
        return bl.solve(self.solver, condition, theta, theta, task)


def make_learner(
    algorithm: str, apply: Apply, loss: Loss, inner: bl.InnerSolver, linear: bl.LinearSolver, strength: float
) -> Learner:
    """Return the learner of one of the :data:`ALGORITHMS`.

    Args:
        algorithm: a key of :data:`ALGORITHMS`.
        apply: the network, as in :class:`Learner`.
        loss: the loss, as in :class:`Learner`.
        inner: the inner solver.
        linear: the solver of the adjoint system (I + H/λ)g = v. Only implicit MAML uses it.
        strength: λ of the proximal term. Only implicit MAML uses it.
    """
    if algorithm == "imaml":
        return Learner(apply, inner, bl.Implicit(linear), strength, loss)
    method = bl.Unrolled(first_order=algorithm != "maml")
    return Learner(apply, inner, method, None, loss, reptile=algorithm == "reptile")


# --- The authors' public code --------------------------------------------------------------------------------------

REFERENCE_DAMPING = 10.0
"""The constant that the public code adds to λ in its linear system, which contains H/(λ + 10) instead of H/λ."""


@dataclass(frozen=True)
class DescendThenPull:
    """The inner loop of the public code: descent on the support loss, then one step on the proximal term.

    Args:
        descent: gradient descent on the support loss without the proximal term. The step towards θ has the same size.
        strength: λ of the step towards θ.
    """

    descent: bl.GradientDescent
    strength: float

    def __call__(self, condition, init, theta, data):
        descended = bl.solve(self.descent, bl.Stationary(condition.objective), init, theta, data)
        factor = self.descent.step_size * self.strength
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
    """Return the learner whose meta-gradient is the one of the authors' public code, which differs from the paper's.

    The linear system of that code is ((1 + ridge)I + H/(λ + 10))g = v. It belongs to a proximal term of strength
    λ + 10, plus a ridge, which is 1 in the code. The inner loop of the code does not solve the inner problem with that
    term. The ``inner_residual`` of a meta-gradient is therefore the residual of a problem that φ was not computed for.

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
