"""Meta-learning algorithms as ways to solve and differentiate one bilevel problem.

There is no gradient code here: a learner is a network, a loss, λ, an inner solver and a method of
:mod:`bilevel`; its meta-gradient is the mean over tasks of that problem's hypergradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import bilevel as bl
from imaml.learning.problem import Apply, Loss, cross_entropy, reptile_problem, task_problem
from imaml.learning.tasks import Task

ALGORITHMS = {"imaml": "implicit MAML", "maml": "MAML", "fomaml": "first-order MAML", "reptile": "Reptile"}
"""What to type for each algorithm, and what it is called."""


@dataclass(frozen=True)
class Learner:
    """What is learned with: adapt φ from θ by ``solver``, differentiate by ``method``.

    Args:
        apply: the network, ``apply(parameters, x) -> outputs``.
        solver: the inner solver; it starts from θ.
        method: ``bl.Implicit(bl.CG(5))`` is implicit MAML.
        strength: λ of the proximal term ½ λ‖φ − θ‖²; None for the support loss alone, as in MAML.
        loss: ``loss(outputs, y) -> scalar``.
        reptile: learn by θ − φ in place of the query loss's gradient; see
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
        """The bilevel problem of one training task."""
        if self.reptile:
            return reptile_problem(self.apply, self.loss)
        return task_problem(self.apply, self.loss, self.strength)

    def adapt(self, theta: dict, task: Task) -> bl.Solution:
        """φ*(θ) for one task, with its residual; the query set is not looked at."""
        condition = task_problem(self.apply, self.loss, self.strength).condition
        return bl.solve(self.solver, condition, theta, theta, task)


def learner_of(
    algorithm: str, apply: Apply, loss: Loss, inner: bl.InnerSolver, linear: bl.LinearSolver, strength: float
) -> Learner:
    """The learner of an algorithm of :data:`ALGORITHMS`; ``linear`` and ``strength`` are implicit MAML's alone."""
    if algorithm == "imaml":
        return Learner(apply, inner, bl.Implicit(linear), strength, loss)
    method = bl.Unrolled(first_order=algorithm != "maml")
    return Learner(apply, inner, method, None, loss, reptile=algorithm == "reptile")


# --- What the authors' public code computes ------------------------------------------------------------------------

REFERENCE_DAMPING = 10.0
"""What the public code adds to λ in its linear system, where it has H/(λ + 10)."""


@dataclass(frozen=True)
class DescendThenPull:
    """The public code's inner loop: descent on the support loss alone, then one step of the proximal term alone.

    Args:
        descent: its steps; the last one, towards θ, is of the same size.
        strength: λ of that last step.
    """

    descent: bl.GradientDescent
    strength: float

    def __call__(self, condition, init, theta, data):
        found = bl.solve(self.descent, bl.Stationary(condition.objective), init, theta, data)
        back = self.descent.step_size * self.strength
        return jax.tree.map(lambda w, center: w - back * (w - center), found.w, condition.center(theta, data))


@dataclass(frozen=True)
class FromZero:
    """A linear solver that starts from zero, as the public code's does, whatever start it is offered."""

    linear: bl.CG

    needs_symmetry = True

    def __call__(self, matvec, b, init=None):
        del init
        return self.linear(matvec, b)


def reference_learner(apply: Apply, loss: Loss, inner: bl.GradientDescent, linear: bl.CG, strength: float) -> Learner:
    """The learner whose meta-gradient is that of the authors' public code, which is not the paper's.

    Its linear system is that of a proximal term of strength λ + 10, (I + H/(λ + 10))g = v, to which ``linear.ridge``
    (the code's damping, 1) is added; the φ that it is taken at solves another problem, if any. ``inner_residual`` is
    how far φ is from where that system would hold.
    """
    solver = DescendThenPull(inner, strength)
    return Learner(apply, solver, bl.Implicit(FromZero(linear)), strength + REFERENCE_DAMPING, loss)


# --- A batch of tasks ----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MetaGradient:
    """The mean over tasks of the hypergradient, with what each task reported.

    Attributes:
        value: mean query loss over the tasks whose numbers are finite.
        gradient: mean hypergradient over the tasks that count, a pytree like θ; zero where none does.
        accuracy: fraction of query examples whose largest output is their label, over the tasks of ``value``; NaN
            where labels are not integers, as in regression.
        tasks: how many tasks count: their numbers are finite, and their linear residual is at most 1, which that of
            no answer at all is; an int32 scalar.
        inner_residual: ‖∇loss + λ(φ − θ)‖ of each task, ``[batch]``.
        linear_residual: the adjoint system's true relative residual, ``[batch]``; zero without a system.
        status: the worse :class:`bilevel.Status` of each task, int32 ``[batch]``.
    """

    value: jax.Array
    gradient: dict
    accuracy: jax.Array
    tasks: jax.Array
    inner_residual: jax.Array
    linear_residual: jax.Array
    status: jax.Array


def meta_gradient(learner: Learner, axis: str | None = None, at_once: int = 1) -> Callable[[dict, Task], MetaGradient]:
    """The meta-gradient of a batch of tasks, for one's own loop.

    Tasks are taken one after another, so memory is that of one task; sums over them are kept in float32 at
    least. A task whose numbers are not finite, or whose adjoint solve went so far astray that zero is a better answer
    (a relative residual above 1), is left out of the gradient and seen in ``status`` and ``linear_residual``; the
    other tasks' numbers are as they would be without it.

    Args:
        learner: network, loss, λ, solver and method.
        axis: the name of a mapped mesh axis over which the tasks are spread, inside ``shard_map``; the
            means are then over all of them.
        at_once: tasks that are computed together, in as much memory, or fewer where they do not divide the batch. For
            a network so small that the time goes into starting its operations; a convolution is slower so.

    Returns:
        ``grad(theta, tasks) -> MetaGradient``; ``tasks`` has a leading batch axis on every array. Pure.

    Source: Rajeswaran et al. (2019), algorithm 1.
    """
    hypergradient = bl.value_and_hypergradient(learner.problem, learner.solver, learner.method, on_failure="ignore")

    def one_task(theta, task):
        """What is summed, each with whether it counts, and the task's own report."""
        out = hypergradient(theta, bl.identity_center, task)
        loss, outputs = out.aux
        linear_residual = jnp.zeros_like(out.value) if out.linear is None else out.linear.relative_residual
        finite = out.status != bl.Status.NONFINITE
        usable = finite & (linear_residual <= 1)
        numbers = (loss, _accuracy(outputs, task.query_y), jnp.int32(1))
        measured = ((numbers, finite), ((out.gradient, jnp.int32(1)), usable))
        return measured, (out.inner.residual_norm, linear_residual, out.status)

    def gradient(theta, tasks):
        wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), theta)
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(wide)))
        totals = ((zero, zero, jnp.int32(0)), (wide, jnp.int32(0)))
        count = len(tasks.query_y)
        together = max(number for number in range(1, min(at_once, count) + 1) if count % number == 0)

        def advance(totals, tasks):
            if together == 1:
                measured, report = one_task(theta, tasks)
                return _added(totals, measured), report
            measured, report = jax.vmap(one_task, in_axes=(None, 0))(theta, tasks)
            return _added(totals, measured, several=True), report

        totals, reports = jax.lax.scan(advance, totals, _in_groups(tasks, together))
        if together > 1:
            reports = jax.tree.map(lambda report: report.reshape(count), reports)
        if axis is not None:
            totals = jax.lax.psum(totals, axis)
        (value, accuracy, finite), (total, usable) = totals
        value, accuracy = (sum / jnp.maximum(finite, 1).astype(sum.dtype) for sum in (value, accuracy))
        mean = jax.tree.map(lambda sum: sum / jnp.maximum(usable, 1).astype(sum.dtype), total)
        mean = jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), mean, theta)
        return MetaGradient(value, mean, accuracy, usable, *reports)

    return gradient


def _in_groups(tasks, size):
    """Tasks along a leading axis, in groups of ``size`` along one more, unless that is one."""
    if size == 1:
        return tasks
    return jax.tree.map(lambda array: array.reshape(-1, size, *array.shape[1:]), tasks)


def _added(totals, measured, several=False):
    """Each total with what was measured of one task, or of several along a leading axis, where that counts."""

    def counted(total, new, counts):
        if several:
            counts = counts.reshape(-1, *[1] * (new.ndim - 1))
        kept = jnp.where(counts, new, 0).astype(total.dtype)
        return total + (kept.sum(0, dtype=total.dtype) if several else kept)

    return tuple(
        jax.tree.map(lambda total, new, counts=counts: counted(total, new, counts), total, new)
        for total, (new, counts) in zip(totals, measured, strict=True)
    )


def _accuracy(outputs, labels):
    if not jnp.issubdtype(labels.dtype, jnp.integer):  # regression
        return jnp.full((), jnp.nan, outputs.dtype)
    return (outputs.argmax(-1) == labels).mean(dtype=outputs.dtype)
