"""The function ``minimize`` of the stochastic algorithms, and its result."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.errors import Policy, check_policy
from bilevel.methods.protocol import check_problem, outer_variables, starting_point
from bilevel.problem import Problem
from bilevel.stochastic.curvature import choose_rates
from bilevel.stochastic.divergence import judge, react
from bilevel.stochastic.loop import Record, advance, largest_entry, make_plan, start
from bilevel.stochastic.placement import place
from bilevel.stochastic.protocol import Algorithm, State, is_mean_over_samples
from bilevel.stochastic.rates import RATES, check_between, check_rate, is_transformation
from bilevel.stochastic.samples import check_sampling
from bilevel.types import PyTree, Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The record of a stochastic run: one entry for each evaluation.

    Attributes:
        step: the number of steps before the evaluation, int32 ``[evaluations]``.
        evaluations: what ``evaluate`` returned, each leaf ``[evaluations]``; None without ``evaluate``.
        residual_norm: ‖F‖₂ over all samples, ``[evaluations]``; None without ``measure``.
        adjoint_norm: ‖Aᵀv − g‖₂ over all samples, ``[evaluations]``; None without ``measure``.
        gradient_norm: ‖h − Bᵀv‖₂ over all samples, the norm of the direction of θ, ``[evaluations]``; None without
            ``measure``.
        status: a :class:`Status`, int32 ``[evaluations]``: BUDGET_USED, or for a run that diverged
            BREAKDOWN or NONFINITE.
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
        state: the :class:`State` with which ``minimize(…, state=…)`` goes on. After a divergence ``theta``, ``w``,
            ``adjoint`` and ``state`` are those of the last evaluation before it, or of the start if there is none. The
            memory and the tables in ``state`` are then those that the algorithm makes anew at this point.
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

    The steps run in compiled chunks of ``evaluate_every`` steps. A further call with the same functions, shapes and
    settings compiles nothing. The numbers in the rates, the penalty and the averaging of the algorithm may differ.

    Args:
        problem: ``problem.condition`` gets an inner batch as ``data``, and ``problem.outer`` gets an outer batch. The
            objective or residual of the condition and the outer function must be means over their batches.
        theta: where θ starts. Leaves that are not floating point are constants.
        w: where w starts. The adjoint starts with zero.
        inner: the inner samples, a pytree of arrays with one leading axis of samples, on the device or sharded over
            the leading axis. Samples that are ordered, for example by class, should be shuffled first: see
            :func:`shuffle`.
        outer: the outer samples, as for ``inner``.
        algorithm: :class:`SOBA`, :class:`MASOBA`, :class:`SABA`, :class:`SRBA`, :class:`AmIGO`, :class:`F2SA`, or an
            :class:`Algorithm` of your own.
        steps: the number of steps; 0 returns the first state.
        key: a random key, which decides the batches; ``jax.random.key(0)`` by default.
        evaluate: ``evaluate(theta, w)`` returns a pytree of scalars for the history. It runs inside the compiled
            program.
        evaluate_every: steps between two evaluations. The last steps are followed by an evaluation in any case.
        state: the state of an earlier run. This call continues that run, and its results are the same to the bit as
            those of one longer run. ``key`` is then not used. ``theta`` and ``w`` give only the structure and the point
            at which rates that are None are estimated, so pass those of the first call. The leaves of the state may be
            NumPy arrays.
        measure: whether each evaluation also computes the norms of the three directions over all samples.
        project: ``project(theta)`` returns the nearest point of a set in which θ must stay.
        on_failure: what to do about a run that diverged: ``"raise"``, ``"warn"`` or ``"ignore"``. The run stops in any
            case, and the result has the state of the last evaluation before the divergence.
        shares: the number of equal parts into which the samples are divided. Each draw takes one batch from every part,
            and the directions are averaged over the parts. The default is the number of devices over which the samples
            are sharded.

    Returns:
        a :class:`StochasticMinimum`.

    Raises:
        ValueError: for an invalid argument, or for arguments that do not fit together; the message names them.
        TypeError: for a leaf that is neither an array nor a number, a complex leaf of θ, a leaf of w that is not
            floating point, a problem or an algorithm of another type, and a class in place of an instance.
        HypergradientError: for a run that diverged, with ``on_failure="raise"``. Its ``result`` is the
            :class:`StochasticMinimum` with the state of the last evaluation before the divergence.

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
    _check_batches(problem, inner, algorithm, placement)
    theta = tree.strongly_typed(outer_variables(theta))
    w = tree.strongly_typed(starting_point(w, theta, None))
    theta, w = placement.put(theta), placement.put(w)
    algorithm = choose_rates(algorithm, problem, theta, w, inner, outer)
    numbers, plan = make_plan(problem, algorithm, placement, inner, outer, evaluate, evaluate_every, measure, project)
    rest = {"inner": inner, "outer": outer, "numbers": numbers, "plan": plan}

    def first():
        return _first_state(algorithm, theta, w, jax.random.key(0) if key is None else key)

    if state is None:
        current: State = start(placement.put(first()), **rest)
    else:
        expected = _kept_signature(plan, tree.signature((theta, w, inner, outer)))
        if not expected:
            expected.append(tree.signature(start.eval_shape(first(), **rest)))
        _check_state(state, expected[0])
        current = replace(placement.put(replace(state, tables=())), tables=placement.copy(state.tables))
    records: list[Any] = []
    sizes, residuals = [float(largest_entry(replace(current, tables=())))], []
    status = Status.BUDGET_USED
    for done in range(0, steps, evaluate_every):
        before, count = replace(current, tables=()), min(evaluate_every, steps - done)
        current, record = advance(before, current.tables, inner, outer, numbers, count, plan=plan)
        record, size = jax.device_get(record)
        sizes.append(float(size))
        residuals.extend(map(float, record.norms[:1]))
        status = judge(sizes, residuals, record.norms)
        records.append(record._replace(status=np.int32(status)))
        if not status.ok:
            current = start(before, **rest)
            break
    history = _history(records, plan, current)
    found = StochasticMinimum(current.theta, current.w, current.adjoint, history, current, algorithm)
    if not status.ok:
        react(found, status, sizes[-1], on_failure)
    return found


def _first_state(algorithm, theta, w, key):
    """Return the state before the algorithm's ``init``."""
    rate: Any = getattr(algorithm, "outer_rate", None)
    return State(
        step=jnp.int32(0),
        key=_key_data(key),
        theta=theta,
        w=w,
        adjoint=jax.tree.map(jnp.zeros_like, w),
        optimizer=tree.strongly_typed(rate.init(theta)) if is_transformation(rate) else (),
    )


@jax.jit
def _key_data(key):
    """Return two random 32-bit words, drawn with a key of any implementation."""
    return jax.random.bits(key, (2,), jnp.uint32)


def _history(records, plan, state):
    if records:
        # NumPy stacks on the host: jnp.stack would compile a program with one operand for each record.
        stacked = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *records))
    else:
        evaluations = None if plan.evaluate is None else jax.eval_shape(plan.evaluate, state.theta, state.w)
        empty = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), evaluations)
        none = jnp.zeros(0, jnp.int32)
        stacked = Record(none, empty, (jnp.zeros(0),) * 3 if plan.measure else (), none)
    residual, adjoint, gradient = stacked.norms or (None, None, None)
    return History(stacked.step, stacked.evaluations, residual, adjoint, gradient, stacked.status)


def _check(problem, inner, outer, algorithm, steps, evaluate_every):
    if steps < 0 or evaluate_every < 1:
        raise ValueError(f"minimize needs steps ≥ 0 and evaluate_every ≥ 1, got {steps} and {evaluate_every}")
    check_problem("minimize", problem)
    if isinstance(algorithm, type) or not hasattr(algorithm, "step"):
        name = algorithm.__name__ if isinstance(algorithm, type) else type(algorithm).__name__
        raise TypeError(f"minimize needs an algorithm, got {name}: pass an instance, such as SOBA()")
    check_sampling(algorithm.sampling)
    for name, samples, batch in (("inner", inner, algorithm.inner_batch), ("outer", outer, algorithm.outer_batch)):
        if batch < 1:
            raise ValueError(f"{name}_batch must be at least 1, got {batch}")
        tree.count_samples(samples, name)
    for name in RATES:
        check_rate(name, getattr(algorithm, name, None))
    check_between("penalty", getattr(algorithm, "penalty", None), float("inf"))
    check_between("averaging", getattr(algorithm, "averaging", None), 1)
    condition = problem.condition
    if getattr(algorithm, "needs_objective", False) and not hasattr(condition, "potential"):
        raise ValueError(
            f"{type(algorithm).__name__} needs a condition that is the gradient of an objective, and "
            f"{type(condition).__name__} is not: use Stationary, Proximal or LeastSquares, or use SOBA, MASOBA, SABA, "
            "SRBA or AmIGO, which need only the residual"
        )


def _check_batches(problem, inner, algorithm, placement):
    """Raise ValueError for batches or shares of a condition that needs all samples at once."""
    if is_mean_over_samples(problem.condition):
        return
    if placement.shares > 1 or algorithm.inner_batch < tree.count_samples(inner, "inner"):
        raise ValueError(
            f"the residual of {type(problem.condition).__name__} is not a mean over samples, because its projection or "
            "proximal operator is applied after the mean: set inner_batch to the number of inner samples and use one "
            "share on one device, or use bl.minimize"
        )


@lru_cache(maxsize=64)
def _kept_signature(plan, arguments):
    """Return the list for the signature of the states of a run; it is empty the first time.

    The signature is kept because its computation takes longer than all other checks of a call together.
    """
    del plan, arguments
    return []


def _check_state(state, expected):
    got = tree.signature(state)
    if got != expected:
        raise ValueError(
            "the state does not belong to this problem and algorithm: pass the same theta, w, samples, shares and "
            f"algorithm as in the run that returned it; got the structure, shapes and dtypes {got}, expected {expected}"
        )
