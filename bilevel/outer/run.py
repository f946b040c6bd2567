"""A running outer loop: what the host does between two runs of the compiled loop."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.advice import advise
from bilevel.errors import HypergradientError, Policy, check_status
from bilevel.outer.loop import CompiledLoop, Setup, compiled_loop
from bilevel.outer.records import History, Minimum, OuterState, StepRecord
from bilevel.types import Hypergradient, PyTree, Status

CAPACITY = 1024
"""The largest number of steps on constant data in one run of the compiled loop."""
BATCHES = 16
"""The largest number of batches of an iterator that are kept until the statuses of their steps are known."""
SHORT, LONG = 0.1, 0.5
"""Limits in seconds for one :meth:`Run.advance`. If it took less than ``SHORT``, the next one takes up to twice as many
steps, or 16 times as many if it took less than a sixteenth of ``SHORT``. If it took more than ``LONG``, the next one
takes half as many. The host can then handle interrupts and redraw the bar in time."""


class Run:
    """A running outer loop: its state on the device, and what the host knows of its steps.

    Attributes:
        state: the state after ``number`` steps.
        number: the number of steps taken since the first call.
        exhausted: whether the iterator of batches has ended.
        is_traced: whether the steps depend on tracers. Then the host cannot look at them: see :func:`run_under_trace`.
        last: θ before the last step, and that step's hypergradient; None before the first step, and without
            ``observe``.
    """

    state: OuterState
    number: int
    exhausted: bool
    is_traced: bool
    last: tuple[PyTree, Hypergradient] | None

    def __init__(
        self, setup: Setup, state: OuterState, start: PyTree, batch: PyTree, halt: bool, constant: bool, observe: bool
    ):
        self._setup, self._start, self._constant = setup, start, constant
        self._raises, self._halt = halt, jnp.asarray(halt)
        self._one, self._not_failed = jnp.int32(1), jnp.asarray(False)
        self._compiled = compiled_loop(setup, CAPACITY if constant else 1, observe)
        self._outline = self._compiled.outline(state, start, batch, self._halt)
        self.is_traced = self._outline.is_traced
        self._length, self._rows = 1, []
        # The compiled loop donates the buffers of its state, so it gets a copy of the caller's arrays.
        self.state = state if self.is_traced else _copied(state)
        self.number = self._first = 0 if self.is_traced else int(state.step)
        self.exhausted, self.last = False, None

    def advance(self, batches: Iterator[PyTree], at_most: int) -> None:
        """Take some steps, at most ``at_most``, and wait for the last of them.

        With constant data, one run of the compiled loop takes all these steps. With an iterator, each run takes one
        step on one batch. The host dispatches all runs before it waits for a result.

        Raises:
            HypergradientError: for a failed step, if ``halt`` was set.
        """
        began, count = time.perf_counter(), min(self._length, at_most)
        kept, rows, failed = [], [], self._not_failed
        steps = np.int32(count) if self._constant and count > 1 else self._one
        for batch in itertools.islice(batches, 1 if self._constant else count):
            batch = owned(batch)
            self.state, failed, row, self.last = self._compiled.advance(
                self.state, failed, self._start, batch, steps, self._halt
            )
            kept.append(batch)
            rows.append(row)
        self.exhausted = not self._constant and len(rows) < count
        if rows:
            self._look(np.concatenate(jax.device_get(rows)), kept)
        self._adapt(time.perf_counter() - began)

    def _look(self, rows: np.ndarray, batches: list[PyTree]) -> None:
        """Keep the rows ``[steps, 5]`` of the steps taken. With ``halt``, raise if the last of these steps failed."""
        rows = rows[rows[:, -1] >= 0]  # the status is negative in rows that were not reached
        if self._raises and not Status(int(rows[-1, -1])).ok:
            raise self._failure(batches[0 if self._constant else len(rows) - 1])
        self._rows.append(rows)
        self.number += len(rows)

    def _adapt(self, seconds: float) -> None:
        length = self._length
        factor = 16 if seconds < SHORT / 16 else 2
        length = factor * length if seconds < SHORT else max(1, length // 2) if seconds > LONG else length
        self._length = min(length, CAPACITY if self._constant else BATCHES)

    def _failure(self, batch: PyTree) -> HypergradientError:
        """Return the error of the failed step, from the state before that step and the batch of that step."""
        state = _copied(self.state)
        advance = compiled_loop(self._setup, 1, True).advance
        observed = advance(state, self._not_failed, self._start, batch, self._one, self._halt)[-1]
        assert observed is not None  # the loop was compiled to observe
        _, out = observed
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
        linear = linear if self._outline.solves_adjoint else np.nan
        return StepRecord(self.number - 1, value, gradient_norm, inner, linear, Status(int(status)))

    def history(self) -> History:
        """Return the records of all steps."""
        columns = np.concatenate(self._rows).T
        if not self._outline.solves_adjoint:
            columns[3] = np.nan
        with jax.debug_nans(False):
            dtypes = self._outline.dtypes
            return History(*jax.device_put([c.astype(dtype) for c, dtype in zip(columns, dtypes, strict=True)]))

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


def run_under_trace(
    setup: Setup,
    state: OuterState,
    start: PyTree,
    batches: Iterator[PyTree],
    steps: int,
    callback: Callable[[int, PyTree, Hypergradient], None] | None,
    stop: Callable[[StepRecord], bool] | None,
    every: int,
) -> Minimum:
    """Take the steps inside of a transformation, such as ``jit`` or ``vmap``, where no status can be inspected."""
    if stop is not None:
        raise ValueError("minimize cannot evaluate stop inside of a JAX transformation: call it with concrete values")
    # This loop may capture a tracer of the surrounding transformation, so it is not cached for later calls.
    step, records = CompiledLoop(setup, 1, False).step, []
    number, theta, out = 0 if tree.is_traced(state.step) else int(state.step), state.theta, None
    for batch in batches:
        theta = state.theta
        state, record, out = step(state, start, batch, False)
        records.append(record)
        number += 1
        if callback is not None and number % every == 0:
            callback(number - 1, theta, out)
    assert out is not None  # the caller saw the first batch
    if callback is not None and number % every != 0:
        callback(number - 1, theta, out)
    history = jax.tree.map(lambda *entries: jnp.stack(entries), *records)
    if out.linear is None:
        with jax.debug_nans(False):
            history = replace(history, linear_residual=jnp.full_like(history.linear_residual, jnp.nan))
    return Minimum(state.theta, state.w, history, state, "steps" if len(records) == steps else "data")


def _copied(state: OuterState) -> OuterState:
    """Return a copy of a state. One compiled program copies all arrays, so that the host dispatches only once."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, _copies(leaves))


@jax.jit
def _copies(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]


def owned(batch: PyTree) -> PyTree:
    """Return a batch with copies of its NumPy arrays.

    JAX may still read a NumPy array after the dispatch has returned, and the iterator may by then write its next batch
    into the same memory.
    """
    batch = tree.traceable(batch, "data")
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


def _shown(theta: PyTree) -> str:
    """Return θ for a message, large arrays and trees abbreviated."""
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    abbreviated = partial(np.array2string, precision=6, threshold=8, edgeitems=2)
    text = [f"theta{jax.tree_util.keystr(path)} = {abbreviated(np.asarray(leaf))}" for path, leaf in leaves[:4]]
    return ", ".join(text) + (", …" if len(leaves) > 4 else "")
