"""The outer loop as users call it: :func:`minimize`, and :func:`initial_state` for a loop that is resumed."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.advice import advise
from bilevel.failures import HypergradientError, Policy, check_policy, check_status
from bilevel.methods.protocol import Method, outer_variables, starting_point
from bilevel.outer.progress import Bar
from bilevel.outer.records import Ended, History, Minimum, OuterState, StepRecord
from bilevel.outer.step import CAPACITY, Setup, compiled_loop, outer_step, state_before, strongly_typed
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.start import Start, StartFunction, choose_start, is_function, trace
from bilevel.types import Hypergradient, PyTree, Status

if TYPE_CHECKING:
    import optax

BATCHES = 16
"""The largest number of batches of an iterator that are kept until the statuses of their steps are known."""
SHORT, LONG = 0.1, 0.5
"""A run of the compiled loop that took less than ``SHORT`` seconds is followed by a longer one, and one that took more
than ``LONG`` by a shorter one. So interrupts and the bar are served in time."""


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
    state: OuterState | None = None,
    stop: Callable[[StepRecord], bool] | None = None,
    every: int = 1,
    progress: bool = False,
) -> Minimum:
    """Minimise outer(w*(θ), θ, data) over θ with an optax optimiser.

    The steps run in a compiled loop, and the host looks at their statuses now and then. Calls with the same problem,
    solver, method and optimizer, and with arrays of the same shapes and dtypes, compile once, whatever the number of
    steps.

    With ``GradientDescent(ρ, 1)``, ``Implicit(Neumann(1, ρ))`` and an iterator of samples as ``data``, each step moves
    w, then the adjoint at the new w, then θ with the new adjoint, all on one sample. This is not SOBA, which moves all
    three from the old point on independent samples: noise that the inner gradient and the second derivatives share
    biases the result of ``minimize``. Use the algorithms of ``bilevel.stochastic`` on samples.

    Args:
        problem: the condition and the outer function.
        theta: where θ starts. Leaves that are not floating point are constants. A θ of Python integers alone is taken
            as floating point.
        init: where the first inner solve starts, a pytree like w; None with ``start``. A function, a method or a
            ``functools.partial`` is taken as ``start``.
        data: a pytree, or an iterator of pytrees of one shape, one for each step. The loop ends early where the
            iterator does. The loop takes no more batches from it than it takes steps, except before an error: then up
            to 15 batches after that of the failed step have been taken too.
        solver: finds the inner solution.
        method: differentiates the inner solution with respect to θ.
        optimizer: an ``optax.GradientTransformation``. One that needs ``value``, ``grad`` and ``value_fn`` (a line
            search, Polyak's step) gets them. Each evaluation of ``value_fn`` with its gradient takes an inner
            solve and an adjoint solve.
        steps: outer steps of this call.
        warm_start: if True, each solve starts from the previous solution, and :class:`Optax` and the momentum of
            :class:`GradientDescent` go on with their schedules and moments. If False, each inner solve starts from
            ``init`` or ``start`` with a new memory, and each adjoint solve from the solver's default. Set it to False
            if the start depends on θ and the hypergradient shall include its derivative (MAML).
        callback: called after every ``every`` steps, and after the last one, with the number of the step, the θ at
            which it was taken, and its :class:`Hypergradient`. A callback after each step costs 50 to 100 µs a step. It
            may raise an exception to end the loop without a result; ``stop`` keeps the result. It is not called for a
            step that raises.
        on_failure: what to do about a failed status. ``"raise"`` ends the loop at the first failed step, which changes
            nothing. ``"warn"`` warns once, with the number of failed steps and the first of them. ``"ignore"`` does
            nothing. A step with status NONFINITE changes nothing in any case: θ, the optimiser's state and the
            starting points stay as they were.
        start: in place of ``init``, a function ``start(theta, data)`` that returns a pytree like w.
        state: the ``state`` of an earlier result, from which this call goes on as if it had not stopped, to the bit.
            ``theta`` gives only the structure then, and ``init`` matters only without warm starts. An iterator has to
            stand at the next batch.
        stop: called when ``callback`` is, with the :class:`StepRecord` of the last step. The loop ends where it
            returns True.
        every: the number of steps between two calls of ``callback`` and ``stop``, counted from the first step of all.
        progress: if True, show a progress bar on standard error, where that is a terminal.

    Returns:
        a :class:`Minimum`.

    Raises:
        ValueError: for ``steps`` or ``every`` below one, an iterator without any batch, an unknown ``on_failure``, and
            a ``state`` that does not fit the other arguments.
        TypeError: for an iterable of batches that is neither a pytree nor an iterator, such as a data loader; for a θ
            whose arrays are all integers or booleans; for no start or two; and for a leaf of θ, init or data that is
            not an array.
        HypergradientError: on a failed status, with ``on_failure="raise"``. The message names the step and its θ. The
            error's ``state`` is the state before that step, and ``result`` the step's :class:`Hypergradient`.

    Source: warm starts: Dagréou, Ablin, Vaiter, Moreau (2022), A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms.

    Example:
        >>> import time, optax
        >>> from bilevel import CG, GradientDescent, Implicit, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> problem = Problem(condition, lambda w, theta, data: 0.5 * (w - data) ** 2)
        >>> arguments = problem, 0.0, 0.0, 3.0, GradientDescent(0.5, 5), Implicit(CG(1)), optax.sgd(0.5)
        >>> found = minimize(*arguments, steps=30)
        >>> round(float(found.theta), 3)
        3.0
        >>> deadline = time.monotonic() + 60  # stop after a minute, or at a small gradient
        >>> small = lambda record: record.gradient_norm < 1e-2 or time.monotonic() > deadline
        >>> found = minimize(*arguments, steps=1000, stop=small, every=10)
        >>> found.ended, found.history.value.shape
        ('stop', (10,))
    """
    if steps < 1 or every < 1:
        raise ValueError(f"minimize needs steps of at least 1, got {steps}, and every of at least 1, got {every}")
    check_policy(on_failure)
    init = choose_start(init, start)
    theta = _checked(theta)
    constant, batches = _batches(data)
    peeked = list(itertools.islice(batches, 1))
    if not peeked:
        raise ValueError("minimize needs data for at least one step, got an iterator that is empty")
    first = _owned(peeked[0])
    program, cold_start = None, None
    if not warm_start and is_function(init):
        program, cold_start = trace(init, theta, first)
    elif not warm_start:
        cold_start = starting_point(init, theta, first)
    setup = Setup(problem, solver, method, optimizer, warm_start, program)
    if state is None:
        state = state_before(setup, theta, starting_point(init, theta, first))
    else:
        state = _fitting(setup, theta, tree.arrays(state, "state"))
    batches = itertools.islice(itertools.chain([first], batches), steps)
    if tree.is_traced((state, cold_start, first)):
        return _under_trace(setup, state, cold_start, batches, callback, stop)
    loop, bar = _Loop(setup, state, cold_start, on_failure == "raise", constant), Bar(steps if progress else 0)
    length, seen, until = 1, loop.number, loop.number + steps
    ended: Ended | None = None
    while ended is None:
        watched = callback is not None or stop is not None
        count = min(length, until - loop.number, every - loop.number % every if watched else length)
        began = time.perf_counter()
        exhausted = loop.run(batches, count) < count
        seconds = time.perf_counter() - began
        length = 2 * length if seconds < SHORT else max(1, length // 2) if seconds > LONG else length
        length = min(length, CAPACITY if constant else BATCHES)
        ended = "steps" if loop.number == until else "data" if exhausted else None
        if loop.number > seen and (ended or loop.number % every == 0):
            seen = loop.number
            if callback is not None:
                callback(seen - 1, loop.last.theta, loop.last.out)
            if stop is not None and stop(loop.record()):
                ended = "stop"
        bar.show(steps - (until - loop.number), loop.record(), ended is not None)
    loop.warn(on_failure)
    return Minimum(loop.state.theta, loop.last.out.inner.w, loop.history(), loop.state, ended)


def initial_state(
    problem: Problem,
    theta: PyTree,
    init: Start,
    data: PyTree,
    solver: InnerSolver,
    method: Method,
    optimizer: "optax.GradientTransformation",
    warm_start: bool = True,
    *,
    start: StartFunction | None = None,
) -> OuterState:
    """Return the state of :func:`minimize` before its first step, the template for a state that was saved.

    The arguments are those of :func:`minimize`, except that ``data`` is a pytree: one batch of an iterator. See
    :class:`OuterState` for an example.

    Raises:
        TypeError: as :func:`minimize`.
    """
    init, theta, data = choose_start(init, start), _checked(theta), tree.arrays(data, "data")
    setup = Setup(problem, solver, method, optimizer, warm_start)
    return state_before(setup, theta, starting_point(init, theta, data))


class _Loop:
    """A running outer loop: its state on the device, and what the host knows of its steps."""

    def __init__(self, setup: Setup, state: OuterState, start: PyTree, halt: bool, constant: bool):
        self._setup, self._start, self._halt, self._constant = setup, start, halt, constant
        self._advance = compiled_loop(setup, CAPACITY if constant else 1)
        self.state = jax.tree.map(jnp.copy, state)  # the compiled loop takes over the buffers of its state
        self.number = self._first = int(state.step)
        self._rows: list[np.ndarray] = []
        self.last: Any = None

    def run(self, batches: Iterator[PyTree], count: int) -> int:
        """Take up to ``count`` steps, wait for them, and return their number. A failed step raises if it shall."""
        kept, rows, failed = [], [], False
        for batch in itertools.islice(batches, 1 if self._constant else count):
            batch = _owned(batch)
            live = np.int32(count if self._constant else 1)
            self.state, failed, row, self.last = self._advance(self.state, failed, self._start, batch, live, self._halt)
            kept.append(batch)
            rows.append(row)
        if not rows:
            return 0
        found = np.concatenate(jax.device_get(rows))
        found = found[found[:, -1] >= 0]  # the status is negative in rows that were not reached
        if self._halt and not Status(int(found[-1, -1])).ok:
            raise self._failure(kept[0 if self._constant else len(found) - 1])
        self._rows.append(found)
        self.number += len(found)
        return len(found)

    def _failure(self, batch: PyTree) -> HypergradientError:
        """Return the error of the step that failed: the state is the one before it, and the batch is its own."""
        state = jax.tree.map(jnp.copy, self.state)
        out = self._advance(state, False, self._start, batch, np.int32(1), self._halt)[3].out
        setup, theta = self._setup, self.state.theta
        linear = getattr(setup.method, "linear", None)
        hint = partial(advise, setup.problem.condition, theta, tree.arrays(batch), solver=setup.solver, linear=linear)
        try:
            check_status(out, "raise", hint)
            cause = Status(int(out.status)).message
        except HypergradientError as error:
            cause = str(error)
        message = f"outer step {int(self.state.step)}, at {_shown(theta)}: {cause}"
        return HypergradientError(message, out, self.state)

    def record(self) -> StepRecord:
        """Return the record of the last step."""
        value, gradient_norm, inner, linear, status = map(float, self._rows[-1][-1])
        linear = np.nan if self.last.out.linear is None else linear
        return StepRecord(self.number - 1, value, gradient_norm, inner, linear, Status(int(status)))

    def history(self) -> History:
        """Return the records of all steps."""
        columns = np.concatenate(self._rows).T
        if self.last.out.linear is None:
            columns[3] = np.nan
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(self.last.record)]
        with jax.debug_nans(False):
            return History(*(jnp.asarray(column.astype(dtype)) for column, dtype in zip(columns, dtypes, strict=True)))

    def warn(self, on_failure: Policy) -> None:
        """Warn about failed steps, if ``on_failure`` is "warn" and there are any."""
        statuses = np.concatenate(self._rows)[:, -1]
        failed = np.flatnonzero(statuses > Status.ILL_CONDITIONED)
        if on_failure == "warn" and failed.size:
            status = Status(int(statuses[failed[0]]))
            warnings.warn(
                f"{failed.size} of {statuses.size} outer steps failed, the first of them step "
                f"{self._first + failed[0]}, {status.name}: {status.message}",
                RuntimeWarning,
                stacklevel=3,
            )


def _under_trace(
    setup: Setup, state: OuterState, start: PyTree, batches: Iterator[PyTree], callback: Any, stop: Any
) -> Minimum:
    """Take the steps inside of a transformation, such as ``jit`` or ``vmap``, where no status can be inspected."""
    if stop is not None:
        raise ValueError("minimize cannot evaluate stop inside of a JAX transformation: call it with concrete values")
    step, records, out = jax.jit(partial(outer_step, setup)), [], None
    for number, batch in enumerate(batches):
        after, record, out = step(state, start, batch, False)
        if callback is not None:
            callback(number, state.theta, out)
        state = after
        records.append(record)
    history = jax.tree.map(lambda *entries: jnp.stack(entries), *records)
    if out.linear is None:
        with jax.debug_nans(False):
            history = replace(history, linear_residual=jnp.full_like(history.linear_residual, jnp.nan))
    return Minimum(state.theta, out.inner.w, history, state, "steps")


def _checked(theta: PyTree) -> PyTree:
    theta = strongly_typed(outer_variables(theta))
    if jax.tree.leaves(theta) and not any(map(tree.is_floating, jax.tree.leaves(theta))):
        raise TypeError(f"minimize needs a floating-point leaf in theta, got {jax.tree.map(jnp.result_type, theta)}")
    return theta


def _batches(data: PyTree | Iterator[PyTree]) -> tuple[bool, Iterator[PyTree]]:
    """Return whether the data are constant, and an iterator of batches."""
    if isinstance(data, Iterator):
        return False, data
    if jax.tree_util.all_leaves([data]) and hasattr(data, "__iter__") and not hasattr(data, "__array__"):
        raise TypeError(
            f"minimize takes data as a pytree or as an iterator of pytrees, and {type(data).__name__} is neither: "
            "pass iter(...) of it, or a generator that repeats it"
        )
    return True, itertools.repeat(tree.arrays(data, "data"))


def _owned(batch: PyTree) -> PyTree:
    """Return a batch with copies of its NumPy arrays.

    JAX may read a NumPy array after the call, and the iterator may write its next batch into the same memory.
    """
    batch = tree.traceable(batch, "data")
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


def _fitting(setup: Setup, theta: PyTree, state: OuterState) -> OuterState:
    """Return a state that was handed over, or raise ValueError if this loop cannot have made it."""
    expected, state = state_before(setup, theta, state.w), strongly_typed(state)
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (expected, state)]
    if jax.tree.structure(expected) != jax.tree.structure(state) or kinds[0] != kinds[1]:
        raise ValueError(
            "the state does not fit: minimize goes on only with a theta, solver, method, optimizer and warm_start like "
            f"those of the call that returned it; expected {jax.tree.structure(expected)} with {kinds[0]}, "
            f"got {jax.tree.structure(state)} with {kinds[1]}"
        )
    return state


def _shown(theta: PyTree) -> str:
    """Return θ for a message, large arrays and trees abbreviated."""
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    abbreviated = partial(np.array2string, precision=6, threshold=8, edgeitems=2)
    text = [f"theta{jax.tree_util.keystr(path)} = {abbreviated(np.asarray(leaf))}" for path, leaf in leaves[:4]]
    return ", ".join(text) + (", …" if len(leaves) > 4 else "")
