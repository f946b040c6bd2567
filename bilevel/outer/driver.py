"""The outer loop as users call it: :func:`minimize`, and :func:`initial_state` for a loop that is resumed."""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.errors import Policy, check_policy
from bilevel.methods.protocol import Method, check_arguments, outer_variables, starting_point
from bilevel.outer.loop import Setup, state_before
from bilevel.outer.progress import Bar
from bilevel.outer.records import Minimum, OuterState, StepRecord
from bilevel.outer.run import Run, owned, run_under_trace
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver, check_transformation
from bilevel.start import Start, StartFunction, choose_start, is_function, trace
from bilevel.types import Hypergradient, PyTree

if TYPE_CHECKING:
    import optax


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

    The steps run in a compiled loop. The host looks at their statuses after at most 1024 steps on constant data, or 16
    batches of an iterator. Calls that differ only in the number of steps and in the values of the arrays share one
    compiled program, if problem, solver, method and optimizer can be hashed.

    With ``GradientDescent(ρ, 1)``, ``Implicit(Neumann(1, ρ))`` and an iterator of samples as ``data``, each step moves
    w, then the adjoint at the new w, then θ with the new adjoint, all on one sample. This is not SOBA. SOBA moves all
    three from the old point, and draws the inner and the outer sample independently. In ``minimize`` the sample that
    moves w also gives the second derivatives at the new w, and this shared noise biases the result. Use the algorithms
    of ``bilevel.stochastic`` on samples.

    Args:
        problem: the condition and the outer function.
        theta: where θ starts. Leaves that are not floating point are constants. A θ of Python integers alone is taken
            as floating point.
        init: where the first inner solve starts, a pytree like w; None with ``start``. A function, a method or a
            ``functools.partial`` is taken as ``start``.
        data: a pytree, or an iterator of pytrees of one shape, the batches. Each step takes one batch. The loop ends
            early if the iterator does. Before an error, the loop may also have taken up to 15 batches after that of the
            failed step.
        solver: finds the inner solution.
        method: differentiates the inner solution with respect to θ.
        optimizer: an ``optax.GradientTransformation``. One that needs ``value``, ``grad`` and ``value_fn`` (a line
            search, Polyak's step) gets them. Each evaluation of ``value_fn`` with its gradient takes an inner
            solve and an adjoint solve.
        steps: outer steps of this call.
        warm_start: if True, each solve starts from the previous solution, and :class:`Optax` and
            :class:`GradientDescent` go on with their schedules, moments and momentum. If False, each inner solve starts
            from ``init`` or ``start`` with a new memory, and each adjoint solve starts from the default of the linear
            solver. Set it to False if the start depends on θ and the hypergradient shall include the derivative of the
            start (MAML).
        callback: called after every ``every`` steps, and after the last one, with the number of the step, the θ at
            which it was taken, and its :class:`Hypergradient`. A callback after each step costs 50 to 100 µs a step. It
            may raise an exception to end the loop without a result; ``stop`` keeps the result. It is not called for a
            step that raises. In a loop that depends on traced arrays it is called with tracers, and the
            steps are counted from 0 if ``state`` is traced.
        on_failure: what to do about a failed status. ``"raise"`` ends the loop at the first failed step. That step does
            not change the state. ``"warn"`` takes all steps and warns once, with the number of failed steps and the
            first of them. ``"ignore"`` takes all steps and gives no warning. In every case, a step with status
            NONFINITE leaves θ, the optimiser's state and the starting points as they were. In a loop that depends on
            traced arrays no status can be inspected, and each choice acts as ``"ignore"``.
        start: in place of ``init``, a function ``start(theta, data)`` that returns a pytree like w.
        state: the ``state`` of an earlier result. This call continues that loop, and its results are the same to the
            bit as those of one longer call. ``theta`` then gives only the structure, the shapes and the dtypes.
            ``init`` is used only without warm starts. An iterator must yield the batch of the next step first.
        stop: called after the same steps as ``callback``, with the :class:`StepRecord` of the last step. If it returns
            True, the loop ends after this step.
        every: the number of steps between two calls of ``callback`` and ``stop``. A call with ``state`` goes on
            counting from the first step of the first call.
        progress: if True, show a progress bar on standard error, where that is a terminal.

    Returns:
        a :class:`Minimum`.

    Raises:
        ValueError: for ``steps`` or ``every`` below one, an iterator without any batch, an unknown ``on_failure``, a
            ``state`` that does not fit the other arguments, a solver or method that cannot be used with the condition,
            and ``stop`` in a loop that depends on traced arrays.
        TypeError: for a problem, solver, method or optimizer of another type, such as a class in place of an instance;
            for an iterable of batches that is neither a pytree nor an iterator, such as a data loader; for a θ whose
            arrays are all integers or booleans; if neither or both of ``init`` and ``start`` are given; for a leaf of
            θ, init or data that is neither an array nor a number; for a complex leaf of θ; and for a leaf of init that
            is not floating point.
        HypergradientError: on a failed status, with ``on_failure="raise"``. The message names the step and its θ. The
            error's ``state`` is the state before that step, and its ``result`` is the step's :class:`Hypergradient`.

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
    check_arguments("minimize", problem, solver, method)
    check_transformation("minimize", optimizer)
    init = choose_start(init, start)
    theta = _checked(theta)
    constant, batches = _batches(data)
    peeked = list(itertools.islice(batches, 1))
    if not peeked:
        raise ValueError("minimize needs data for at least one step, got an iterator that is empty")
    first = owned(peeked[0])
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
    run = Run(setup, state, cold_start, first, on_failure == "raise", constant, callback is not None)
    if run.is_traced:
        return run_under_trace(setup, state, cold_start, batches, steps, callback, stop, every)
    bar, last, seen, ended = Bar(steps, progress), run.number + steps, run.number, None
    watched = callback is not None or stop is not None
    while ended is None:
        run.advance(batches, min(last - run.number, every - run.number % every if watched else steps))
        ended = "steps" if run.number == last else "data" if run.exhausted else None
        if run.number > seen and (ended or run.number % every == 0):
            seen = run.number
            if callback is not None and run.last is not None:
                callback(seen - 1, *run.last)
            if stop is not None and stop(run.record()):
                ended = "stop"
        bar.show(steps - (last - run.number), run.record(), ended is not None)
    run.warn(on_failure)
    return Minimum(run.state.theta, run.state.w, run.history(), run.state, ended)


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
    """Return the state of :func:`minimize` before its first step, which has the structure of every later state.

    A state that was saved as a list of arrays can be rebuilt with this structure: see :class:`OuterState` for an
    example. The arguments are those of :func:`minimize`, except that ``data`` is always a pytree. In place of an
    iterator, pass one of its batches.

    Raises:
        TypeError: as :func:`minimize`, for ``theta``, ``init``, ``start`` and ``data``.
    """
    init, theta, data = choose_start(init, start), _checked(theta), tree.arrays(data, "data")
    setup = Setup(problem, solver, method, optimizer, warm_start)
    return state_before(setup, theta, starting_point(init, theta, data))


def _checked(theta: PyTree) -> PyTree:
    theta = tree.strongly_typed(outer_variables(theta))
    if jax.tree.leaves(theta) and not any(map(tree.is_floating, jax.tree.leaves(theta))):
        dtypes = jax.tree.map(jnp.result_type, theta)
        raise TypeError(
            f"minimize needs a floating-point leaf in theta, got the dtypes {dtypes}: convert one by astype(float)"
        )
    return theta


def _batches(data: PyTree | Iterator[PyTree]) -> tuple[bool, Iterator[PyTree]]:
    """Return whether the data are constant, and an iterator of batches."""
    if isinstance(data, Iterator):
        return False, data
    if jax.tree_util.all_leaves([data]) and hasattr(data, "__iter__") and not hasattr(data, "__array__"):
        raise TypeError(
            f"minimize takes data as a pytree or as an iterator of pytrees, and {type(data).__name__} is neither: "
            "pass iter(...) of the data, or a generator that repeats the data"
        )
    return True, itertools.repeat(tree.arrays(data, "data"))


def _fitting(setup: Setup, theta: PyTree, state: OuterState) -> OuterState:
    """Return the caller's state, or raise ValueError if its structure, shapes or dtypes are not those of this loop."""
    state = tree.strongly_typed(state)
    expected, got = map(tree.signature, (state_before(setup, theta, state.w), state))
    if expected != got:
        raise ValueError(
            "the state does not fit: minimize goes on only with a theta, solver, method, optimizer and warm_start like "
            f"those of the call that returned it; expected the structure, shapes and dtypes {expected}, got {got}"
        )
    return state
