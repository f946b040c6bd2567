"""Meta-learning algorithms as ways to solve and differentiate one bilevel problem.

There is no gradient code here: a learner is a network, a loss, λ, an inner solver and a method of
:mod:`bilevel`; its meta-gradient is the mean over tasks of that problem's hypergradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import bilevel as bl
from imaml.problem import Apply, Loss, cross_entropy, task_problem
from imaml.tasks import Task


@dataclass(frozen=True)
class Learner:
    """What is learned with: adapt φ from θ by ``solver``, differentiate by ``method``.

    Args:
        apply: the network, ``apply(parameters, x) -> outputs``.
        solver: the inner solver; it starts from θ.
        method: ``bl.Implicit(bl.CG(5))`` is implicit MAML.
        strength: λ of the proximal term ½ λ‖φ − θ‖².
        loss: ``loss(outputs, y) -> scalar``.
    """

    apply: Apply
    solver: bl.InnerSolver
    method: bl.Method
    strength: float
    loss: Loss = cross_entropy

    @property
    def problem(self) -> bl.Problem:
        """The bilevel problem of one task."""
        return task_problem(self.apply, self.loss, self.strength)

    def adapt(self, theta: dict, task: Task) -> bl.Solution:
        """φ*(θ) for one task, with its residual; the query set is not looked at."""
        return bl.solve(self.solver, self.problem.condition, theta, theta, task)


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


def meta_gradient(learner: Learner, axis: str | None = None) -> Callable[[dict, Task], MetaGradient]:
    """The meta-gradient of a batch of tasks, for one's own loop.

    Tasks are taken one after another, so memory is that of one task; sums over them are kept in float32 at
    least. A task whose numbers are not finite, or whose adjoint solve went so far astray that zero is a better answer
    (a relative residual above 1), is left out of the gradient and seen in ``status`` and ``linear_residual``; the
    other tasks' numbers are as they would be without it.

    Args:
        learner: network, loss, λ, solver and method.
        axis: the name of a mapped mesh axis over which the tasks are spread, inside ``shard_map``; the
            means are then over all of them.

    Returns:
        ``grad(theta, tasks) -> MetaGradient``; ``tasks`` has a leading batch axis on every array. Pure.

    Source: Rajeswaran et al. (2019), algorithm 1.
    """
    hypergradient = bl.value_and_hypergradient(learner.problem, learner.solver, learner.method, on_failure="ignore")

    def one_task(theta, totals, task):
        out = hypergradient(theta, bl.theta_itself, task)
        linear_residual = jnp.zeros_like(out.value) if out.linear is None else out.linear.residual_norm
        finite = out.status != bl.Status.NONFINITE
        usable = finite & (linear_residual <= 1)
        numbers = (out.value, _accuracy(out.aux, task.query_y), jnp.int32(1))
        totals = _added(totals, ((numbers, finite), ((out.gradient, jnp.int32(1)), usable)))
        return totals, (out.inner.residual_norm, linear_residual, out.status)

    def gradient(theta, tasks):
        wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), theta)
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(wide)))
        totals = ((zero, zero, jnp.int32(0)), (wide, jnp.int32(0)))
        totals, reports = jax.lax.scan(lambda totals, task: one_task(theta, totals, task), totals, tasks)
        if axis is not None:
            totals = jax.lax.psum(totals, axis)
        (value, accuracy, finite), (total, usable) = totals
        value, accuracy = (sum / jnp.maximum(finite, 1).astype(sum.dtype) for sum in (value, accuracy))
        mean = jax.tree.map(lambda sum: sum / jnp.maximum(usable, 1).astype(sum.dtype), total)
        mean = jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), mean, theta)
        return MetaGradient(value, mean, accuracy, usable, *reports)

    return gradient


def _added(totals, measured):
    """Each total with what was measured, where that counts."""
    return tuple(
        jax.tree.map(lambda t, new, counts=counts: t + jnp.where(counts, new, 0).astype(t.dtype), total, new)
        for total, (new, counts) in zip(totals, measured, strict=True)
    )


def _accuracy(outputs, labels):
    if not jnp.issubdtype(labels.dtype, jnp.integer):  # regression
        return jnp.full((), jnp.nan, outputs.dtype)
    return (outputs.argmax(-1) == labels).mean(dtype=outputs.dtype)
