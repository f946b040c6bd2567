"""The meta-gradient of a batch of tasks: the mean of their hypergradients."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.core import Tracer

import bilevel as bl
from imaml.errors import check
from imaml.learning.algorithms import Learner, float_arrays
from imaml.learning.tasks import Task

NONE_FINITE = (
    "no task of the batch has finite numbers: the value is NaN and the meta-gradient is zero. Check the data of the "
    "tasks, and lower the inner step size"
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MetaGradient:
    """The mean hypergradient of a batch of tasks, with the residuals and the status of each task.

    A task counts towards the gradient if its status is not NONFINITE and its linear residual is at most 1. The zero
    vector has a relative residual of 1, so a larger residual means that the linear solve did worse than returning zero.

    Attributes:
        value: mean query loss over the tasks whose status is not NONFINITE; NaN if there is no such task.
        gradient: mean hypergradient over the tasks that count, a pytree like θ; zero if no task counts.
        accuracy: fraction of query examples for which the output at the label is the largest, over the same tasks as
            ``value``. NaN if there is no such task, and for regression, whose targets are not integers.
        tasks: the number of tasks that count towards the gradient, an int32 scalar.
        inner_residual: norm of the inner objective's gradient at the adapted parameters of each task, ``[batch]``.
        linear_residual: true relative residual of each task's adjoint system, ``[batch]``; zero for a method that
            solves no linear system.
        status: the more severe :class:`bilevel.Status` of the inner and the linear solve of each task, or NONFINITE if
            the task's value or gradient is not finite; int32 ``[batch]``.
    """

    value: jax.Array
    gradient: dict
    accuracy: jax.Array
    tasks: jax.Array
    inner_residual: jax.Array
    linear_residual: jax.Array
    status: jax.Array


def meta_gradient(learner: Learner, axis: str | None = None, at_once: int = 1) -> Callable[[dict, Task], MetaGradient]:
    """Return a function that computes the meta-gradient of a batch of tasks.

    With ``at_once=1``, the tasks are processed one after another in the memory that one task needs. Sums over tasks are
    accumulated in float32 or wider. A task is left out of the gradient if its numbers are not finite, or if the
    relative residual of its adjoint solve is above 1. The ``status`` and ``linear_residual`` of that task show the
    reason. A task that is left out adds exactly zero to the sum of gradients.

    Args:
        learner: network, loss, λ, inner solver and method.
        axis: the name of the mesh axis over which ``shard_map`` distributes the tasks. The means are
            then over the tasks of all devices. None for one device.
        at_once: the number of tasks that are computed together by ``vmap``, which needs that many times the memory. If
            ``at_once`` does not divide the number of tasks, the largest smaller divisor is used. Values above 1 speed
            up very small networks, for which dispatching operations dominates. On a CPU they slow down a convolutional
            network.

    Returns:
        A pure function ``grad(theta, tasks) -> MetaGradient``, compiled once for each set of shapes. ``tasks`` is a
        :class:`imaml.Task` with a leading batch axis on every array. A Python number in θ counts as a float. The
        function raises :class:`imaml.InputError` for zero tasks. If no task has finite numbers, ``value`` is NaN,
        ``gradient`` is zero, and a call outside of ``jit`` warns.

    Source: Rajeswaran et al. (2019), algorithm 1.
    """
    hypergradient = bl.value_and_hypergradient(learner.problem, learner.solver, learner.method, on_failure="ignore")

    def one_task(theta, task):
        """Return two groups of terms, each with its mask, and the task's residuals and status."""
        out = hypergradient(theta, bl.identity_center, task)
        loss, outputs = out.aux
        linear_residual = jnp.zeros_like(out.value) if out.linear is None else out.linear.relative_residual
        finite = out.status != bl.Status.NONFINITE
        usable = finite & (linear_residual <= 1)
        metrics = (loss, _accuracy(outputs, task.query_y), jnp.int32(1))
        terms = ((metrics, finite), ((out.gradient, jnp.int32(1)), usable))
        return terms, (out.inner.residual_norm, linear_residual, out.status)

    def mean_over_tasks(theta, tasks):
        """Return the :class:`MetaGradient`, and the number of tasks with finite numbers."""
        count = len(tasks.query_y)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), theta)
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(zeros)))
        totals = ((zero, zero, jnp.int32(0)), (zeros, jnp.int32(0)))
        group_size = max(number for number in range(1, min(at_once, count) + 1) if count % number == 0)

        def advance(totals, tasks):
            if group_size == 1:
                terms, report = one_task(theta, tasks)
                return _add_terms(totals, terms), report
            terms, report = jax.vmap(one_task, in_axes=(None, 0))(theta, tasks)
            return _add_terms(totals, terms, batched=True), report

        totals, reports = jax.lax.scan(advance, totals, _group(tasks, group_size))
        if group_size > 1:
            reports = jax.tree.map(lambda report: report.reshape(count), reports)
        if axis is not None:
            totals = jax.lax.psum(totals, axis)
        (value, accuracy, finite_tasks), (total, usable_tasks) = totals
        value, accuracy = (sum / finite_tasks.astype(sum.dtype) for sum in (value, accuracy))  # 0 / 0 is NaN
        mean = jax.tree.map(lambda sum: sum / jnp.maximum(usable_tasks, 1).astype(sum.dtype), total)
        mean = jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), mean, theta)
        return MetaGradient(value, mean, accuracy, usable_tasks, *reports), finite_tasks

    compiled = jax.jit(mean_over_tasks)

    def gradient(theta, tasks):
        check(
            len(tasks.query_y) >= 1,
            "a meta-gradient is a mean over tasks, but the batch has 0 tasks: pass at least one",
        )
        theta = float_arrays(theta)
        # Outside of jit, each call would trace and compile the scan again, because its body is a new function.
        is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((theta, tasks)))
        found, finite_tasks = (mean_over_tasks if is_traced else compiled)(theta, tasks)
        if not isinstance(finite_tasks, Tracer) and not finite_tasks:
            warnings.warn(NONE_FINITE, stacklevel=2)
        return found

    return gradient


def _group(tasks, size):
    """Reshape the leading axis of every array from ``[batch]`` to ``[batch / size, size]``, unless ``size`` is 1."""
    if size == 1:
        return tasks
    return jax.tree.map(lambda array: array.reshape(-1, size, *array.shape[1:]), tasks)


def _add_terms(totals, terms, batched=False):
    """Add the terms of one task, or of a batch of tasks along a leading axis, to the totals. Masked terms add zero."""

    def add(total, new, counts):
        if batched:
            counts = counts.reshape(-1, *[1] * (new.ndim - 1))
        kept = jnp.where(counts, new, 0).astype(total.dtype)
        return total + (kept.sum(0, dtype=total.dtype) if batched else kept)

    return tuple(
        jax.tree.map(lambda total, new, counts=counts: add(total, new, counts), total, new)
        for total, (new, counts) in zip(totals, terms, strict=True)
    )


def _accuracy(outputs, labels):
    if not jnp.issubdtype(labels.dtype, jnp.integer):  # regression
        return jnp.full((), jnp.nan, outputs.dtype)
    return (outputs.argmax(-1) == labels).mean(dtype=outputs.dtype)
