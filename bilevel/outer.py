"""The outer loop: descent on θ, with warm starts of the inner and the adjoint solve.

θ changes little between two outer steps, so the previous w and the previous adjoint are good starts. From
such a start, each solver needs a few steps for an accuracy that takes many steps from a cold one.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.advice import advise
from bilevel.failures import Policy, check_policy, check_status
from bilevel.methods.protocol import Method, outer_variables, starting_point
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.start import Start, StartFunction, choose_start
from bilevel.types import Hypergradient, PyTree, Status

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The record of an outer loop: one entry for each step, computed before the step changes θ.

    Attributes:
        value: the outer value, ``[steps]``.
        gradient_norm: ‖d outer/dθ‖₂, ``[steps]``.
        inner_residual: ‖F(w, θ, data)‖₂ with the condition's residual F, ``[steps]``.
        linear_residual: the adjoint system's true relative residual, ``[steps]``; NaN for a method that
            solves no adjoint system.
        status: ``Hypergradient.status``, the worst :class:`Status` of a step, int32 ``[steps]``.
    """

    value: jax.Array
    gradient_norm: jax.Array
    inner_residual: jax.Array
    linear_residual: jax.Array
    status: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Minimum:
    """The result of an outer loop.

    Attributes:
        theta: θ after the last step.
        w: the inner solution of the last step, which belongs to the θ before that step.
        history: the record of each step.
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
    on_failure: Policy = "raise",
    *,
    start: StartFunction | None = None,
) -> Minimum:
    """Minimise outer(w*(θ), θ, data) over θ with an optax optimiser.

    With ``GradientDescent(ρ, 1)`` and ``Implicit(Neumann(1, ρ))`` for a step size ρ, and an iterator of samples as
    ``data``, this is a stochastic single loop: w, the adjoint and θ each take one step on each sample, in this order.
    Noise that the inner samples share in this order biases θ; :func:`bilevel.stochastic.minimize` has no such bias.

    Args:
        problem: the condition and the outer function.
        theta: where θ starts. Leaves that are not floating point are constants. A θ of Python integers alone is taken
            as floating point.
        init: where the first inner solve starts, a pytree like w; None with ``start``. A function, a method or a
            ``functools.partial`` is taken as ``start``.
        data: a pytree, or an iterator of pytrees of one shape, one for each step. The loop ends early where the
            iterator does.
        solver: finds the inner solution.
        method: differentiates the inner solution with respect to θ.
        optimizer: an ``optax.GradientTransformation``. One that needs ``value``, ``grad`` and ``value_fn`` (a line
            search, Polyak's step) gets them. Each evaluation of ``value_fn`` with its gradient takes an inner
            solve and an adjoint solve.
        steps: outer steps.
        warm_start: if True, each inner and adjoint solve starts from the previous solution. If False, each inner solve
            starts from ``init`` or ``start`` and each adjoint solve from the solver's default. Set it to False if the
            start depends on θ and the hypergradient shall include its derivative (MAML).
        callback: called with the number of the step, the θ at which it was taken, and the :class:`Hypergradient`. It
            may raise an exception to stop the loop.
        on_failure: what to do about a failed status: ``"raise"``, ``"warn"`` or ``"ignore"``. A step with status
            NONFINITE changes nothing: θ, the optimiser's state and the starting points stay as they were.
        start: in place of ``init``, a function ``start(theta, data)`` that returns a pytree like w.

    Returns:
        a :class:`Minimum`.

    Raises:
        ValueError: for fewer than one step, an iterator without any batch, or an unknown ``on_failure``.
        TypeError: for an iterable of batches that is neither a pytree nor an iterator, such as a data loader; for a θ
            whose arrays are all integers or booleans; for no start or two; and for a leaf of θ, init or data that is
            not an array.
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
    linear = getattr(method, "linear", None)
    init = choose_start(init, start)
    theta = _strongly_typed(outer_variables(theta))
    if jax.tree.leaves(theta) and not any(map(tree.is_floating, jax.tree.leaves(theta))):
        raise TypeError(f"minimize needs a floating-point leaf in theta, got {jax.tree.map(jnp.result_type, theta)}")
    batches = itertools.islice(_batches(data), steps)
    step = _compiled_step(problem, solver, method, optimizer, None if warm_start else init)
    state, records, w = optimizer.init(theta), [], None
    for number, batch in enumerate(batches):
        batch = tree.arrays(batch, "data")
        if w is None:
            w = _strongly_typed(starting_point(init, theta, batch))
            adjoint = jax.tree.map(jnp.zeros_like, w)
        moved, state, w, adjoint, record, out = step(theta, state, w, adjoint, batch)
        if callback is not None:
            callback(number, theta, out)
        check_status(out, on_failure, partial(advise, problem.condition, theta, batch, solver=solver, linear=linear))
        theta = moved
        records.append(record)
    if not records:
        raise ValueError("minimize needs data for at least one step, got an iterator that is empty")
    return Minimum(theta, out.inner.w, _history(records, solves_adjoint=out.linear is not None))


def _history(records, solves_adjoint):
    history = jax.tree.map(lambda *entries: jnp.stack(entries), *records)
    if solves_adjoint:
        return history
    with jax.debug_nans(False):
        return replace(history, linear_residual=jnp.full_like(history.linear_residual, jnp.nan))


def _batches(data):
    if isinstance(data, Iterator):
        return data
    if jax.tree_util.all_leaves([data]) and hasattr(data, "__iter__") and not hasattr(data, "__array__"):
        raise TypeError(
            f"minimize takes data as a pytree or as an iterator of pytrees, and {type(data).__name__} is neither: "
            "pass iter(...) of it, or a generator that repeats it"
        )
    return itertools.repeat(tree.arrays(data, "data"))


def _strongly_typed(variables):
    """Return arrays without weak types.

    A jitted step returns such arrays. Weakly typed arguments of the first step would cause a second trace.
    """
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), variables)


def _compiled_step(problem, solver, method, optimizer, cold_start):
    """Return one outer step as a pure function.

    With ``cold_start`` None, both solves start from the previous solutions. Otherwise each inner solve starts from
    ``cold_start``.
    """
    import optax  # optax is slow to import, so it is imported when needed

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
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
            updates, next_state = update(
                out.gradient, state, theta, value=out.value, grad=out.gradient, value_fn=value_fn
            )
            moved = tree.with_others(optax.apply_updates(theta, updates), theta)
        size = tree.norm(out.gradient)
        sound = jnp.isfinite(size) & (out.status != int(Status.NONFINITE))
        after, before = (moved, next_state, out.inner.w, next_adjoint), (theta, state, w, adjoint)
        kept = jax.tree.map(partial(_new_if_sound, sound), after, before)
        # A NaN from the compiled step would be an error under jax_debug_nans, so `_history` writes it.
        linear = jnp.zeros_like(size) if out.linear is None else out.linear.relative_residual
        record = History(out.value, size, out.inner.residual_norm, linear, out.status)
        return *kept, record, out

    return step


def _new_if_sound(sound, new, old):
    """Return ``new`` in the dtype of ``old`` where the step is sound, else ``old``.

    Without the cast, an integer array in the optimiser's state, such as the momentum of an integer leaf of θ, could
    become a float array.
    """
    new = jnp.asarray(new)
    return jnp.where(sound, new if new.dtype == old.dtype else new.astype(old.dtype), old)


def _with_hypergradient(solve):
    """Return the outer value as a function of θ whose derivative is the hypergradient of the chosen method."""

    @jax.custom_vjp
    def value(theta):
        return solve(theta).value

    def forwards(theta):
        out = solve(theta)
        return out.value, out.gradient

    value.defvjp(forwards, lambda gradient, slope: (tree.scale(slope, gradient),))
    return lambda theta: value(theta)
