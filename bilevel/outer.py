"""The outer loop: descent on θ, with each inner and adjoint solve started where the last one ended.

Between two steps θ moves little, so the old w and the old adjoint are nearly right: a few steps of each solver
are then as good as many from nothing. With one step of each it is the single-loop method of Dagréou et al.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.conditions import Problem
from bilevel.failures import advise, check_policy, check_status
from bilevel.hypergradients import Method, Start, outer_variables, starting_point
from bilevel.solvers import InnerSolver
from bilevel.types import Hypergradient, PyTree, Status

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What an outer loop saw at each step, before it moved θ.

    Attributes:
        value: the outer value, ``[steps]``.
        gradient_norm: ‖d outer/dθ‖₂, ``[steps]``.
        inner_residual: ‖F(w, θ)‖₂, ``[steps]``.
        linear_residual: the adjoint system's true relative residual, ``[steps]``; NaN for a method without one.
        status: the worse :class:`Status` of both solves, int32 ``[steps]``.
    """

    value: jax.Array
    gradient_norm: jax.Array
    inner_residual: jax.Array
    linear_residual: jax.Array
    status: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Minimum:
    """Where an outer loop ended.

    Attributes:
        theta: after the last step.
        w: the inner solution of the last step, for the θ before it.
        history: what each step saw.
    """

    theta: PyTree
    w: PyTree
    history: History


def minimize(
    problem: Problem,
    theta: PyTree,
    init: Start,
    data: PyTree | Iterator[PyTree],
    solver: InnerSolver,
    method: Method,
    optimizer: "optax.GradientTransformation",
    steps: int,
    warm_start: bool = True,
    callback: Callable[[int, PyTree, Hypergradient], None] | None = None,
    on_failure: Literal["raise", "warn", "ignore"] = "raise",
) -> Minimum:
    """Minimise outer(w*(θ), θ, data) over θ with an optax optimiser.

    With ``GradientDescent(ρ, steps=1)`` and ``Implicit(Neumann(1, ρ))`` on an iterator of samples this is a
    stochastic single loop: w, the adjoint and θ each move by one step on each sample.

    Args:
        problem: the condition and the outer function.
        theta: where θ starts.
        init: where the first inner solve starts, a pytree like w or ``init(theta, data)``.
        data: a pytree, or an iterator of pytrees of one shape, one for each step; the loop ends with it.
        solver: finds the inner solution.
        method: differentiates it.
        optimizer: an ``optax.GradientTransformation``. One that asks for ``value``, ``grad`` and ``value_fn`` (a line
            search, Polyak's step) is given them; each evaluation is then an inner solve and an adjoint system.
        steps: outer steps.
        warm_start: start each inner and adjoint solve from the last one's solution; else from ``init``. Where
            ``init`` depends on θ and its derivative counts (MAML), set it to False.
        callback: called with the step's number, the θ it was taken at, and the :class:`Hypergradient`; it may
            raise to stop.
        on_failure: what to do on a failed status. A gradient that is not finite is never applied, and no solve
            starts from the step that had it.

    Returns:
        a :class:`Minimum`.

    Raises:
        ValueError: for fewer than one step, or data that ends before the first.
        TypeError: for data that can be iterated over and is no iterator, such as a loader of batches.
        HypergradientError: on a failed status, with ``on_failure="raise"``.

    Source: warm starts and the single loop: Dagréou, Ablin, Vaiter, Moreau (2022), A framework for bilevel
    optimization that enables stochastic and global variance reduction algorithms.

    Example:
        >>> import optax
        >>> from bilevel import CG, GradientDescent, Implicit, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> problem = Problem(condition, lambda w, theta, data: 0.5 * (w - data) ** 2)
        >>> method = Implicit(CG(1))
        >>> found = minimize(problem, 0.0, 0.0, 3.0, GradientDescent(0.5, 5), method, optax.sgd(0.5), steps=30)
        >>> round(float(found.theta), 3)
        3.0
    """
    if steps < 1:
        raise ValueError(f"minimize needs steps of at least 1, got {steps}")
    check_policy(on_failure)
    theta = _as_after_a_step(outer_variables(theta))
    batches = itertools.islice(_batches(data), steps)
    step = _compiled_step(problem, solver, method, optimizer, None if warm_start else init)
    state, records, w = optimizer.init(theta), [], None
    for number, batch in enumerate(batches):
        batch = tree.arrays(batch)
        if w is None:
            w = _as_after_a_step(starting_point(init, theta, batch))
            adjoint = jax.tree.map(jnp.zeros_like, w)
        moved, state, w, adjoint, record, out = step(theta, state, w, adjoint, batch)
        if callback is not None:
            callback(number, theta, out)
        check_status(out, on_failure, partial(advise, problem.condition, theta, batch))
        theta = moved
        records.append(record)
    if not records:
        raise ValueError("minimize needs data for at least one step, got an iterator that is empty")
    return Minimum(theta, out.inner.w, jax.tree.map(lambda *entries: jnp.stack(entries), *records))


def _batches(data):
    if isinstance(data, Iterator):
        return data
    if jax.tree_util.all_leaves([data]) and hasattr(data, "__iter__") and not hasattr(data, "__array__"):
        raise TypeError(
            f"minimize takes data as a pytree or as an iterator of them, got {type(data).__name__}, which is neither: "
            "hand it iter(...) of it, or a generator that goes over it again and again"
        )
    return itertools.repeat(data)


def _as_after_a_step(variables):
    """Arrays of no weak type, as a step leaves them: a Python number would be traced anew at the second."""
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), variables)


def _compiled_step(problem, solver, method, optimizer, cold_start):
    """One outer step as a pure function; ``cold_start`` is where each inner solve begins, None for the last w."""

    import optax  # optax takes a while to import: only when it is used

    update = optax.with_extra_args_support(optimizer).update

    def solve(theta, w, adjoint, data):
        if cold_start is None:
            return method(problem, solver, theta, w, data, adjoint)
        return method(problem, solver, theta, cold_start, data, None)

    @jax.jit
    def step(theta, state, w, adjoint, data):
        out = solve(theta, w, adjoint, data)
        next_adjoint = adjoint if out.linear is None else out.linear.solution
        value_fn = _with_hypergradient(lambda theta: solve(theta, out.inner.w, next_adjoint, data))
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by counts
            updates, next_state = update(
                out.gradient, state, theta, value=out.value, grad=out.gradient, value_fn=value_fn
            )
            moved = tree.with_others(optax.apply_updates(theta, updates), theta)
        size = tree.norm(out.gradient)
        sound = jnp.isfinite(size) & (out.status != Status.NONFINITE)
        after, before = (moved, next_state, out.inner.w, next_adjoint), (theta, state, w, adjoint)
        kept = jax.tree.map(partial(_either, sound), after, before)
        linear = jnp.full_like(size, jnp.nan) if out.linear is None else out.linear.residual_norm
        record = History(out.value, size, out.inner.residual_norm, linear, out.status)
        return *kept, record, out

    return step


def _either(sound, new, old):
    """``new`` in the dtype of ``old``, or ``old``: an optimiser's state for an integer would turn to float."""
    new = jnp.asarray(new)
    return jnp.where(sound, new if new.dtype == old.dtype else new.astype(old.dtype), old)


def _with_hypergradient(solve):
    """The outer value as a function of θ whose derivative is the hypergradient, whatever method made it."""

    @jax.custom_vjp
    def value(theta):
        return solve(theta).value

    def forwards(theta):
        out = solve(theta)
        return out.value, out.gradient

    value.defvjp(forwards, lambda gradient, slope: (tree.scale(slope, gradient),))
    return lambda theta: value(theta)
