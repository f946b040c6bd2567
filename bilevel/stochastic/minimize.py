"""The driver of the stochastic algorithms: compiled chunks of steps, evaluations, and the reaction to divergence."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.conditions import Projected, ProximalGradient
from bilevel.failures import HypergradientError, Policy, check_policy
from bilevel.methods.protocol import outer_variables, starting_point
from bilevel.problem import Problem
from bilevel.stochastic.curvature import choose_rates
from bilevel.stochastic.placement import Placement, place
from bilevel.stochastic.protocol import Algorithm, Draws, Oracle, State
from bilevel.stochastic.rates import check_rate, is_transformation
from bilevel.stochastic.samples import Samples, check_sampling, count_samples, draw
from bilevel.types import PyTree, Status

FIRST_GROWTH = 1e12
"""A state whose norm is this many times larger after the first evaluation than the start, or than 1, has diverged."""
LATER_GROWTH = 1e4
"""A state whose norm is this many times larger than at the first evaluation, than at the start, and than 1, has diverged."""
RESIDUAL_GROWTH = 1e4
"""A residual over all samples that is this many times larger than at the first evaluation shows divergence."""
RATES = ("inner_rate", "linear_rate", "outer_rate")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The record of a stochastic run: one entry for each evaluation.

    Attributes:
        step: the number of steps before the evaluation, int32 ``[evaluations]``.
        evaluations: what ``evaluate`` returned, each leaf ``[evaluations]``; None without ``evaluate``.
        residual_norm: ‖F‖₂ over all samples; None without ``measure``.
        adjoint_norm: ‖Aᵀv − g‖₂ over all samples; None without ``measure``.
        gradient_norm: ‖h − Bᵀv‖₂ over all samples, the norm of the direction of θ; None without ``measure``.
        status: a :class:`Status`, int32 ``[evaluations]``: BUDGET_USED, or for a run that diverged BREAKDOWN or
            NONFINITE.
    """

    step: jax.Array
    evaluations: PyTree
    residual_norm: jax.Array | None
    adjoint_norm: jax.Array | None
    gradient_norm: jax.Array | None
    status: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StochasticMinimum:
    """The result of a stochastic run.

    Attributes:
        theta: θ after the last step.
        w: the inner variables after the last step.
        adjoint: v, which tends to the solution of the adjoint system Aᵀv = g.
        history: the record of the evaluations.
        state: from which ``minimize(…, state=…)`` goes on, a :class:`State`. After a divergence it is that of the last
            evaluation at which the run was sound, and so are θ, w and v.
        algorithm: the algorithm with the rates that were used.
    """

    theta: PyTree
    w: PyTree
    adjoint: PyTree
    history: History
    state: State
    algorithm: Any

    @property
    def status(self) -> jax.Array:
        """The worst :class:`Status` of the run, an int32 scalar; BUDGET_USED without an evaluation."""
        return jnp.max(self.history.status, initial=int(Status.BUDGET_USED))


def minimize(
    problem: Problem,
    theta: PyTree,
    w: PyTree,
    inner: PyTree,
    outer: PyTree,
    algorithm: Algorithm,
    steps: int,
    key: jax.Array | None = None,
    evaluate: Callable[[PyTree, PyTree], PyTree] | None = None,
    evaluate_every: int = 1_000,
    state: State | None = None,
    *,
    measure: bool = False,
    project: Callable[[PyTree], PyTree] | None = None,
    on_failure: Policy = "raise",
    shares: int | None = None,
) -> StochasticMinimum:
    """Minimise outer(w*(θ), θ) over θ by steps on batches of samples.

    The steps run in compiled chunks of ``evaluate_every`` steps. A further call with the same functions, the same shapes
    and an algorithm with other numbers compiles nothing.

    Args:
        problem: ``problem.condition`` gets an inner batch as ``data``, ``problem.outer`` an outer batch. Both must be
            means over their batch.
        theta: where θ starts. Leaves that are not floating point are constants.
        w: where w starts. The adjoint starts with zero.
        inner: the inner samples, a pytree of arrays with one leading axis of samples, on the device or sharded over
            the leading axis. Samples that are ordered, for example by class, should be shuffled first: see
            :func:`shuffle`.
        outer: the outer samples, likewise.
        algorithm: :class:`SOBA`, :class:`MASOBA`, :class:`SABA`, :class:`SRBA`, :class:`AmIGO`, :class:`F2SA`, or an
            :class:`Algorithm` of your own.
        steps: the number of steps; 0 returns the first state.
        key: a random key, which decides the batches; ``jax.random.key(0)`` by default.
        evaluate: ``evaluate(theta, w)`` returns a pytree of scalars for the history. It runs inside the compiled program.
        evaluate_every: steps between two evaluations. The last steps are followed by an evaluation in any case.
        state: the state of an earlier run. The run goes on from it as if it had not stopped, to the bit. ``theta``, ``w``
            and ``key`` are then not used. The leaves may be NumPy arrays.
        measure: whether each evaluation also computes the norms of the three directions over all samples.
        project: ``project(theta)`` returns the nearest point of a set in which θ must stay.
        on_failure: what to do about a run that diverged: ``"raise"``, ``"warn"`` or ``"ignore"``. The run stops in any
            case, and the result has the last sound state.
        shares: the number of equal parts into which the samples are divided. Each step draws one batch of each part. The
            default is the number of devices over which the samples are sharded.

    Returns:
        a :class:`StochasticMinimum`.

    Raises:
        ValueError: for arguments that do not fit together; the message names them.
        HypergradientError: for a run that diverged, with ``on_failure="raise"``. Its ``result`` is the
            :class:`StochasticMinimum` with the last sound state.

    Example:
        >>> import bilevel as bl, jax.numpy as jnp
        >>> problem = bl.Problem(
        ...     bl.Stationary(lambda w, theta, x: 0.5 * jnp.mean((w - theta * x) ** 2)),
        ...     lambda w, theta, y: 0.5 * jnp.mean((w - y) ** 2),
        ... )
        >>> x, y = jnp.array([0.5, 1.5, 0.8, 1.2]), jnp.array([2.0, 4.0, 3.0, 3.0])
        >>> saba = bl.stochastic.SABA(0.2, 0.2, 0.1, inner_batch=2, outer_batch=2)
        >>> found = bl.stochastic.minimize(problem, 0.0, 0.0, x, y, saba, steps=500)
        >>> round(float(found.theta), 3)
        3.0
    """
    check_policy(on_failure)
    inner, outer = tree.arrays(inner, "inner"), tree.arrays(outer, "outer")
    _check(problem, inner, outer, algorithm, steps, evaluate_every)
    placement = place(inner, outer, shares)
    theta = _strongly_typed(outer_variables(theta))
    w = _strongly_typed(starting_point(w, theta, None))
    algorithm = choose_rates(algorithm, problem, *placement.put((theta, w)), inner, outer)
    numbers, plan = _plan(problem, algorithm, placement, inner, outer, evaluate, evaluate_every, measure, project)
    first = _first_state(algorithm, theta, w, jax.random.key(0) if key is None else key)
    start = partial(_start, inner=inner, outer=outer, numbers=numbers, plan=plan)
    if state is None:
        state = start(placement.put(first))
    else:
        _check_state(state, jax.eval_shape(start, first))
        tables = placement.put(state.tables, divided=True)
        state = replace(placement.put(replace(state, tables=())), tables=tables)
    records, sizes, failure = [], [float(_size(state))], None
    end = int(state.step) + steps
    while int(state.step) < end:
        before = replace(state, tables=())
        count = min(evaluate_every, end - int(state.step))
        state, record = _advance(before, state.tables, inner, outer, numbers, count, plan=plan)
        record = jax.device_get(record)
        status = _judge(record, sizes, records)
        records.append({**record, "status": np.int32(status)})
        sizes.append(float(record["size"]))
        if not status.ok:
            failure, state = (status, record), start(before)
            break
    found = StochasticMinimum(state.theta, state.w, state.adjoint, _history(records, plan, state), state, algorithm)
    if failure is not None:
        _react(found, *failure, on_failure)
    return found


@dataclass(frozen=True)
class _Plan:
    """What is constant in the compiled program. The algorithm is without its numbers, which are arguments."""

    problem: Problem
    structure: Any
    constants: tuple[Any, ...]
    placement: Placement
    sizes: tuple[int, int]
    evaluate: Any
    evaluate_every: int
    measure: bool
    project: Any

    def algorithm(self, numbers: list[Any]) -> Any:
        """Return the algorithm with its numbers."""
        rest = iter(numbers)
        return jax.tree.unflatten(
            self.structure, [next(rest) if constant is None else constant for constant in self.constants]
        )

    def oracle(self, algorithm: Any, inner: PyTree, outer: PyTree) -> Oracle:
        """Return the oracle of one share."""
        whole = isinstance(self.problem.condition, Projected | ProximalGradient)
        inner_samples, outer_samples = (
            Samples(data, size, min(batch, size), whole)
            for data, size, batch in zip(
                (inner, outer), self.sizes, (algorithm.inner_batch, algorithm.outer_batch), strict=True
            )
        )
        return Oracle(self.problem, inner_samples, outer_samples, self.placement.axes, self.project)


def _plan(problem, algorithm, placement, inner, outer, evaluate, evaluate_every, measure, project):
    leaves, structure = jax.tree.flatten(algorithm)
    is_number = [not callable(leaf) for leaf in leaves]
    numbers = [float(leaf) for leaf, number in zip(leaves, is_number, strict=True) if number]
    constants = tuple(None if number else leaf for leaf, number in zip(leaves, is_number, strict=True))
    sizes = tuple(count_samples(samples, "samples") // placement.shares for samples in (inner, outer))
    return numbers, _Plan(
        problem, structure, constants, placement, sizes, evaluate, evaluate_every, measure, project
    )


def _first_state(algorithm, theta, w, key):
    """Return the state before the algorithm's ``init``."""
    rate = getattr(algorithm, "outer_rate", None)
    return State(
        step=jnp.int32(0),
        key=jax.random.bits(key, (2,), jnp.uint32),
        theta=theta,
        w=w,
        adjoint=jax.tree.map(jnp.zeros_like, w),
        optimizer=_strongly_typed(rate.init(theta)) if is_transformation(rate) else (),
    )


@partial(jax.jit, static_argnames="plan")
def _start(state, inner, outer, numbers, plan):
    algorithm, placement = plan.algorithm(numbers), plan.placement

    def init(state, inner, outer):
        state = algorithm.init(plan.oracle(algorithm, inner, outer), state)
        return replace(state, tables=()), state.tables

    divided = placement.divide(inner), placement.divide(outer)
    state, tables = placement.over_shares(init, "sdd", "sd")(state, *divided)
    return replace(state, tables=tables)


@partial(jax.jit, static_argnames="plan", donate_argnames="tables")
def _advance(state, tables, inner, outer, numbers, count, *, plan):
    """Take ``count`` steps, and evaluate. ``state`` is not donated: it is kept as the last sound one."""
    placement = plan.placement

    def run(state, tables, inner, outer, numbers, count):
        algorithm = plan.algorithm(numbers)
        oracle = plan.oracle(algorithm, inner, outer)
        draws = _draws(state, oracle, algorithm, plan.evaluate_every)

        def step(k, state):
            moved = algorithm.step(oracle, state, jax.tree.map(lambda numbers: numbers[k], draws))
            return replace(moved, step=state.step + 1)

        state = jax.lax.fori_loop(0, count, step, replace(state, tables=tables))
        norms = ()
        if plan.measure:
            norms = tuple(map(tree.norm, oracle.full(state.w, state.adjoint, state.theta)))
        return replace(state, tables=()), state.tables, norms

    over_shares = placement.over_shares(run, "sdddss", "sds")
    state, tables, norms = over_shares(
        state, tables, placement.divide(inner), placement.divide(outer), numbers, count
    )
    evaluated = None if plan.evaluate is None else plan.evaluate(state.theta, state.w)
    record = {"step": state.step, "evaluations": evaluated, "norms": norms, "size": _size(state)}
    return replace(state, tables=tables), record


def _draws(state, oracle, algorithm, steps):
    """Return the batches of the next steps, ``[steps, draws]``."""
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    share = jax.lax.axis_index(oracle.axes) if oracle.axes else 0
    step = state.step.astype(jnp.uint32) + jnp.arange(steps, dtype=jnp.uint32)

    def sampler(stream, samples, count):
        numbers = step[:, None] * jnp.uint32(count) + jnp.arange(count, dtype=jnp.uint32)
        own = jax.random.fold_in(jax.random.fold_in(key, stream), share)
        return draw(samples, algorithm.sampling, own, numbers)

    inner, outer = algorithm.draws
    return Draws(sampler(0, oracle.inner_samples, inner), sampler(1, oracle.outer_samples, outer))


def _size(state):
    """Return the norm of the state without its tables; it is not finite if an entry is not."""
    return tree.norm((state.theta, state.w, state.adjoint, state.memory))


def _judge(record, sizes, records):
    """Return the status of an evaluation, from the norms of the state at the start and at all evaluations."""
    size, norms = float(record["size"]), [float(norm) for norm in record["norms"]]
    if not all(map(math.isfinite, (size, *norms))):
        return Status.NONFINITE
    if size > FIRST_GROWTH * max(1.0, sizes[0]) or (len(sizes) > 1 and size > LATER_GROWTH * max(1.0, *sizes[:2])):
        return Status.BREAKDOWN
    if norms and records and norms[0] > RESIDUAL_GROWTH * max(float(records[0]["norms"][0]), 1e-6 * size):
        return Status.BREAKDOWN
    return Status.BUDGET_USED


def _react(found, status, record, on_failure):
    if on_failure == "ignore":
        return
    rates = ", ".join(f"{name}={getattr(found.algorithm, name)!r}" for name in RATES if hasattr(found.algorithm, name))
    how = "is not finite" if status == Status.NONFINITE else f"has grown to the norm {float(record['size']):.1e}"
    message = (
        f"stochastic loop, {status.name}: after {int(record['step'])} steps the state {how}: use smaller rates than "
        f"{rates}, or larger batches; the result has the state of step {int(found.state.step)}, the last sound one"
    )
    if on_failure == "raise":
        raise HypergradientError(message, found)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _history(records, plan, state):
    if not records:
        evaluations = None if plan.evaluate is None else jax.eval_shape(plan.evaluate, state.theta, state.w)
        empty = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), evaluations)
        norms = [jnp.zeros(0)] * 3 if plan.measure else [None] * 3
        return History(jnp.zeros(0, jnp.int32), empty, *norms, jnp.zeros(0, jnp.int32))
    # NumPy stacks on the host: jnp.stack would compile a program with one operand for each record.
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *records)
    norms = stacked["norms"] or (None, None, None)
    return History(stacked["step"], stacked["evaluations"], *norms, stacked["status"])


def _strongly_typed(variables):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.result_type(leaf)), variables)


def _check(problem, inner, outer, algorithm, steps, evaluate_every):
    if steps < 0 or evaluate_every < 1:
        raise ValueError(f"minimize needs steps ≥ 0 and evaluate_every ≥ 1, got {steps} and {evaluate_every}")
    check_sampling(algorithm.sampling)
    for name, samples, batch in (("inner", inner, algorithm.inner_batch), ("outer", outer, algorithm.outer_batch)):
        if batch < 1:
            raise ValueError(f"{name}_batch must be at least 1, got {batch}")
        count_samples(samples, name)
    for name in RATES:
        check_rate(name, getattr(algorithm, name, None))
    condition = problem.condition
    if getattr(algorithm, "needs_objective", False) and not hasattr(condition, "potential"):
        raise ValueError(
            f"{type(algorithm).__name__} needs an inner objective, and {type(condition).__name__} has none that alone "
            "determines the inner solution: use SOBA, MASOBA, SABA, SRBA or AmIGO, which need the residual only"
        )
    if isinstance(condition, Projected | ProximalGradient) and algorithm.inner_batch < count_samples(inner, "inner"):
        raise ValueError(
            f"the residual of {type(condition).__name__} is not a mean over samples, because the projection or proximal "
            "operator of a batch's step is not that of all samples: use inner_batch of all samples, or bl.minimize"
        )


def _check_state(state, expected):
    got, wanted = (
        (jax.tree.structure(part), [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(part)])
        for part in (state, expected)
    )
    if got != wanted:
        raise ValueError(
            f"the state does not belong to this problem and algorithm: got {got}, expected {wanted}: pass the same "
            "theta, w, samples, shares and algorithm as in the run that it is from"
        )
