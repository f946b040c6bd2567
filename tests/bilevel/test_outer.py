"""The outer loop converges, compiles once, resumes to the bit, and never applies a gradient that is not finite."""

import functools
import io
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import diagonal_quadratic, newton, ridge

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")
EIGENVALUES = np.array([1.0, 4.0])
TARGET = np.array([1.0, -2.0])
SGD = optax.sgd(1.0)


@functools.cache
def problem():
    """Return the problem ½‖w − data‖² with w = D⁻¹θ and D = diag(EIGENVALUES). Its minimum is at θ = D·data."""
    return bl.Problem(diagonal_quadratic(EIGENVALUES), lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2))


def run(solver, method, steps=200, optimizer=SGD, data=TARGET, **options):
    return bl.minimize(problem(), jnp.zeros(2), jnp.zeros(2), data, solver, method, optimizer, steps, **options)


@pytest.mark.slow("runs an outer loop to its end", fast=("method1", "method2"))
@pytest.mark.parametrize("method", [bl.Implicit(bl.CG(2)), bl.Unrolled(), bl.ValuePenalty(1e6)])
def test_minimize_converges_to_the_closed_form(method):
    out = run(bl.GradientDescent(0.3, 40), method, steps=400)
    # Each step multiplies the error of θ by at most 1 − 1/16. ValuePenalty has an error of the order of 1/penalty.
    np.testing.assert_allclose(out.theta, EIGENVALUES * TARGET, rtol=1e-5)
    assert out.history.value.shape == out.history.gradient_norm.shape == (400,)
    assert float(out.history.gradient_norm[-1]) < 1e-5
    assert bool(jnp.isnan(out.history.linear_residual[0])) is not isinstance(method, bl.Implicit)


def test_adam_converges_too():
    out = run(bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), 400, optax.adam(0.1))
    np.testing.assert_allclose(out.theta, EIGENVALUES * TARGET, rtol=1e-3)


@pytest.mark.slow("runs two outer loops to their end")
def test_warm_starts_reduce_the_inner_residual():
    short = bl.GradientDescent(0.2, 2)
    warm = run(short, bl.Implicit(bl.CG(2)))
    cold = run(short, bl.Implicit(bl.CG(2)), warm_start=False)
    assert float(warm.history.inner_residual[-1]) < 1e-6 < 0.1 < float(cold.history.inner_residual[-1])
    np.testing.assert_allclose(warm.theta, EIGENVALUES * TARGET, rtol=1e-3)


@pytest.mark.slow("compiles two outer loops")
def test_the_adjoint_solve_starts_from_the_last_adjoint():
    # With one Neumann term per outer step, a cold adjoint is 0.1·g with g = ∂outer/∂w. A warm one converges to D⁻¹g.
    solver, method = bl.GradientDescent(0.3, 40), bl.Implicit(bl.Neumann(1, 0.1))
    slowly = optax.sgd(0.01)  # θ moves slowly, while each step multiplies the error of the adjoint by at most 0.9
    warm, cold = run(solver, method, 60, slowly), run(solver, method, 60, slowly, warm_start=False)
    # The cold residual, ‖g − 0.1·Dg‖ / ‖g‖, is between 1 − 0.4 and 1 − 0.1.
    assert float(warm.history.linear_residual[-1]) < 0.2 < 0.59 < float(cold.history.linear_residual[-1])


def test_a_stochastic_single_loop_converges_to_the_minimum_for_the_mean():
    rng, rate = np.random.default_rng(0), 0.2
    samples = (TARGET + 0.1 * rng.normal(size=2) for _ in range(1500))
    decay = optax.sgd(optax.exponential_decay(0.5, 500, 0.3))
    out = run(bl.GradientDescent(rate, 1), bl.Implicit(bl.Neumann(1, rate)), 1500, decay, samples)
    # In the last 500 steps the learning rate of θ falls from 0.045 to 0.014. This leaves noise of about 0.1·√0.02 in
    # w = D⁻¹θ.
    np.testing.assert_allclose(out.theta / EIGENVALUES, TARGET, atol=0.06)


def test_two_steps_of_the_single_loop_agree_with_their_closed_form():
    rate, g0 = 0.2, -TARGET
    out = run(bl.GradientDescent(rate, 1), bl.Implicit(bl.Neumann(1, rate)), 2)
    theta = -1.0 * (rate * g0)  # at θ = 0, w is 0, and the gradient is the adjoint, rate·g0
    w = rate * theta
    v = rate * g0 + rate * ((w - TARGET) - EIGENVALUES * rate * g0)
    np.testing.assert_allclose(out.theta, theta - v, rtol=1e-13)
    np.testing.assert_allclose(out.w, w, rtol=1e-13)


def test_an_iterator_gives_data_for_each_step_and_ends_the_loop():
    seen = []
    out = run(
        bl.GradientDescent(0.3, 5),
        bl.Implicit(bl.CG(2)),
        100,
        data=iter([TARGET, 2 * TARGET, 3 * TARGET]),
        callback=lambda step, theta, out: seen.append((step, float(out.value))),
    )
    assert out.history.value.shape == (3,)
    assert [step for step, _ in seen] == [0, 1, 2]
    np.testing.assert_allclose(out.history.value, [value for _, value in seen])
    assert seen[0][1] == pytest.approx(0.5 * np.sum(TARGET**2))


@pytest.mark.slow("compiles an outer loop for each kind of θ", fast="number")
@pytest.mark.parametrize("start", [np.ones(2), 1.0], ids=["array", "number"])
def test_one_trace_for_all_steps(start):
    traces = []

    def inner(w, theta, data):
        traces.append(None)
        return 0.5 * jnp.sum((w - theta) ** 2)

    def count(steps):
        traces.clear()
        declared = bl.Problem(bl.Stationary(inner), lambda w, theta, data: jnp.sum(w**2))
        method = bl.Implicit(bl.CG(1))
        solver, init = bl.GradientDescent(0.5, 2), 0.0 * start
        bl.minimize(declared, start, init, None, solver, method, optax.adam(0.1), steps)
        return len(traces)

    assert count(1) == count(20)


@pytest.mark.slow("compiles several outer loops")
def test_theta_does_not_change_in_a_step_whose_gradient_is_not_finite():
    data = iter([TARGET, np.full(2, np.nan), np.full(2, np.nan)])
    first = run(bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), 1, optax.adam(0.1), iter([TARGET]))
    out = run(bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), 3, optax.adam(0.1), data, on_failure="ignore")
    np.testing.assert_array_equal(out.theta, first.theta)
    assert [bl.Status(int(status)).name for status in out.history.status] == ["BUDGET_USED", "NONFINITE", "NONFINITE"]
    data = iter([TARGET, np.full(2, np.nan)])
    with pytest.raises(bl.HypergradientError, match="NONFINITE"):
        run(bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), 3, data=data)


def test_a_batch_of_nan_changes_nothing_in_later_steps():
    def fit(w, theta, data):
        return 0.5 * w @ (EIGENVALUES * w) - w @ theta + 0.1 * w @ data

    def go(batches):
        problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: 0.5 * jnp.sum((w - TARGET) ** 2))
        solver, method = bl.GradientDescent(0.3, 2), bl.Implicit(bl.Neumann(2, 0.2))
        start = (jnp.zeros(2), jnp.zeros(2))
        return bl.minimize(problem, *start, batches, solver, method, optax.adam(0.1), 9, on_failure="ignore")

    good = [TARGET * k for k in range(4)]
    out = go(iter([good[0], np.full(2, np.nan), *good[1:]]))
    np.testing.assert_array_equal(out.theta, go(iter(good)).theta)
    names = [bl.Status(int(status)).name for status in out.history.status]
    assert names == ["BUDGET_USED", "NONFINITE", *["BUDGET_USED"] * 3]


@pytest.mark.slow("compiles outer loops with warm and with cold starts")
@pytest.mark.parametrize("steps", [1, 2])
def test_warm_and_cold_starts_take_the_same_first_step(steps):
    # With one step of conjugate gradients the result depends on the start.
    stiff = bl.Proximal(lambda w, theta, data: 1.5 * w @ (EIGENVALUES * w) - w @ jnp.array([1.0, 2.0]), 1.0)
    declared = bl.Problem(stiff, lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2))
    solver, method = bl.GradientDescent(0.1, 20), bl.Implicit(bl.CG(1))
    arguments = (declared, jnp.ones(2), jnp.zeros(2), TARGET, solver, method, optax.sgd(1.0), steps)
    warm, cold = bl.minimize(*arguments), bl.minimize(*arguments, warm_start=False)
    alone = bl.value_and_hypergradient(declared, solver, method)(jnp.ones(2), jnp.zeros(2), TARGET)
    for out in (warm, cold):
        assert float(out.history.gradient_norm[0]) == pytest.approx(float(jnp.linalg.norm(alone.gradient)), rel=1e-13)
    assert (steps == 1) == bool(np.allclose(warm.theta, cold.theta, rtol=1e-12))


IMPLICIT = bl.Implicit(bl.CG(2))
WITH_PLATEAUS = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())


@pytest.mark.slow("compiles an outer line search", fast="polyak")
@pytest.mark.parametrize(
    ("optimizer", "steps", "method"),
    [
        (optax.lbfgs(), 12, bl.OneStep()),
        (optax.polyak_sgd(), 200, IMPLICIT),
        (WITH_PLATEAUS, 400, IMPLICIT),
    ],
    ids=["lbfgs", "polyak", "plateau"],
)
def test_an_optimiser_that_asks_for_the_value_gets_it(optimizer, steps, method):
    # The mapping does not depend on w, so one step is exact.
    constant = bl.FixedPoint(lambda w, theta, data: theta / EIGENVALUES, symmetric=True)
    declared = bl.Problem(constant, problem().outer)
    start = (jnp.zeros(2), jnp.zeros(2), TARGET)
    out = bl.minimize(declared, *start, bl.FixedPointIteration(1), method, optimizer, steps)
    np.testing.assert_allclose(out.theta, EIGENVALUES * TARGET, rtol=1e-3)


@pytest.mark.parametrize("optimizer", [optax.adamw(0.1, weight_decay=0.9), optax.sgd(0.1)], ids=["adamw", "sgd"])
def test_leaves_that_are_not_floating_stay_unchanged(optimizer):
    declared = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta["x"]) ** 2)), problem().outer)
    theta = {"x": jnp.ones(2), "count": 3, "mask": jnp.array([True, False]), "nothing": None}
    solver, method = bl.GradientDescent(1.0, 1), bl.Implicit(bl.CG(1))
    out = bl.minimize(declared, theta, jnp.zeros(2), TARGET, solver, method, optimizer, 5)
    assert int(out.theta["count"]) == 3 and out.theta["mask"].tolist() == [True, False]
    assert out.theta["nothing"] is None and float(jnp.abs(out.theta["x"] - 1).max()) > 0.01


def test_a_callback_sees_each_step_and_may_stop_the_loop_by_an_exception():
    seen = []

    def stop(step, theta, out):
        seen.append((step, np.asarray(theta), np.asarray(out.gradient)))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), 10, optax.sgd(0.5), callback=stop)
    assert [step for step, *_ in seen] == [0, 1, 2]
    for (_, theta, slope), (_, moved, _) in itertools.pairwise(seen):
        np.testing.assert_allclose(moved, theta - 0.5 * slope, rtol=1e-14)


def test_a_data_loader_is_refused_with_a_remedy():
    class Loader:
        def __iter__(self):
            return iter([TARGET])

    with pytest.raises(TypeError, match=r"Loader is neither: pass iter\(...\)"):
        run(bl.GradientDescent(0.3, 4), bl.Implicit(bl.CG(2)), 3, data=Loader())


@pytest.mark.slow("runs an outer loop until it converges")
def test_the_gradient_vanishes_at_the_learned_ridge_penalty():
    case = ridge()
    problem = bl.Problem(case.condition, case.outer)
    arguments = (case.init, case.data, newton, bl.Implicit(bl.CG(3)), optax.adam(0.02), 300)
    out = bl.minimize(problem, case.theta, *arguments)
    assert abs(float(jax.grad(case.value)(out.theta))) < 1e-3 < abs(float(case.gradient))


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="steps of at least 1, got 0"):
        run(bl.GradientDescent(0.3, 4), bl.Unrolled(), 0)
    with pytest.raises(ValueError, match="got an iterator that is empty"):
        run(bl.GradientDescent(0.3, 4), bl.Unrolled(), 3, data=iter([]))
    with pytest.raises(ValueError, match="every of at least 1, got 0"):
        run(bl.GradientDescent(0.3, 4), bl.Unrolled(), 3, every=0)


# --- Compilation ----------------------------------------------------------------------------------------------------


class CountedProblem:
    """The problem of :func:`problem`, with a count of the traces of its objective."""

    def __init__(self):
        self.traces = 0
        objective = diagonal_quadratic(EIGENVALUES).objective

        def counted(w, theta, data):
            self.traces += 1
            return objective(w, theta, data)

        self.problem = bl.Problem(bl.Stationary(counted), problem().outer)

    def new_traces(self, call):
        before = self.traces
        call()
        return self.traces - before


def batches(number, copies=1):
    return iter([TARGET + 0.1 * k for k in range(number)] * copies)


def test_calls_with_the_same_objects_compile_once():
    counted = CountedProblem()
    arguments = bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(1)), optax.adam(0.1)

    def call(data, steps, **options):
        return counted.new_traces(
            lambda: bl.minimize(counted.problem, jnp.ones(2), jnp.zeros(2), data, *arguments, steps, **options)
        )

    assert call(TARGET, 3) > 0
    assert [call(2 * TARGET, steps) for steps in (1, 2, 7, 1500)] == [0] * 4
    assert call(TARGET, 9, stop=lambda record: False, every=4) == 0
    assert call(batches(3), 3) > 0
    assert [call(batches(number), 40) for number in (1, 5, 33)] == [0] * 3


def test_a_start_function_that_is_written_in_the_call_compiles_once():
    counted = CountedProblem()
    arguments = TARGET, bl.GradientDescent(0.3, 2), bl.Unrolled(), optax.sgd(0.1), 2

    def call(factor):
        start = lambda theta, data: factor * theta  # noqa: E731  # a new function in each call
        return counted.new_traces(
            lambda: bl.minimize(counted.problem, jnp.ones(2), None, *arguments, warm_start=False, start=start)
        )

    half, third = jnp.full(2, 0.5), jnp.full(2, 1 / 3)
    assert call(half) > 0 == call(third)


@pytest.mark.slow("compiles an outer line search")
def test_a_line_search_compiles_once():
    counted = CountedProblem()
    arguments = TARGET, bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(2)), optax.lbfgs()

    def call(steps):
        return counted.new_traces(lambda: bl.minimize(counted.problem, jnp.zeros(2), jnp.zeros(2), *arguments, steps))

    assert call(1) > 0 == call(5)


def test_a_problem_that_cannot_be_hashed_is_minimised():
    condition = bl.Proximal(lambda w, theta, data: 0.5 * jnp.sum(w**2), jnp.array(1.0))
    with pytest.raises(TypeError):
        hash(condition)
    declared = bl.Problem(condition, problem().outer)
    out = bl.minimize(
        declared,
        jnp.zeros(2),
        jnp.zeros(2),
        TARGET,
        bl.GradientDescent(0.5, 1),
        bl.Implicit(bl.CG(1)),
        optax.sgd(4.0),
        2,
    )
    # w = θ/2, so the Hessian of the outer value is ¼, and one step of size 4 is exact.
    np.testing.assert_allclose(out.theta, 2 * TARGET, rtol=1e-12)


@pytest.mark.slow("runs a long loop")
def test_the_history_holds_every_step_of_a_long_loop():
    out = run(bl.GradientDescent(0.3, 1), bl.Implicit(bl.Neumann(1, 0.2)), 2500, optax.sgd(0.01))
    again = run(bl.GradientDescent(0.3, 1), bl.Implicit(bl.Neumann(1, 0.2)), 700, optax.sgd(0.01))
    assert out.history.value.shape == (2500,) and out.history.status.dtype == jnp.int32
    np.testing.assert_array_equal(out.history.value[:700], again.history.value)
    assert bool(jnp.all(jnp.diff(out.history.value[10:1000]) < 0))


@pytest.mark.slow("compiles two loops")
def test_an_iterator_may_use_one_buffer_for_all_batches():
    def reused(number):
        buffer = np.zeros(())
        for k in range(number):
            buffer[()] = k
            yield buffer

    declared = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2),
        lambda w, theta, data: (theta**2 + data + 0.0 * jnp.sqrt(8.5 - data), data),
        has_aux=True,
    )
    arguments = bl.GradientDescent(1.0, 1), bl.Implicit(bl.CG(1)), optax.sgd(0.0), 30
    out = bl.minimize(declared, 0.0, 0.0, reused(8), *arguments)
    np.testing.assert_array_equal(out.history.value, np.arange(8.0))
    # The error reports the batch of the failed step, although the iterator has overwritten it with later batches.
    with pytest.raises(bl.HypergradientError, match=r"^outer step 9, ") as caught:
        bl.minimize(declared, 0.0, 0.0, reused(30), *arguments)
    assert float(caught.value.result.aux) == 9.0


@pytest.mark.slow("compiles an outer loop under each transformation")
def test_minimize_works_under_jit_and_vmap():
    def found(theta, scale, data=TARGET):
        declared = bl.Problem(
            diagonal_quadratic(EIGENVALUES), lambda w, theta, data: 0.5 * scale * jnp.sum((w - data) ** 2)
        )
        arguments = bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), optax.sgd(0.5), 3
        out = bl.minimize(declared, theta, jnp.zeros(2), data, *arguments)
        return out.theta, out.history.value

    expected = [found(jnp.ones(2), scale) for scale in (1.0, 2.0)]
    np.testing.assert_allclose(jax.jit(found)(jnp.ones(2), 1.0)[0], expected[0][0], rtol=1e-13)
    batched = jax.vmap(lambda scale: found(jnp.ones(2), scale))(jnp.array([1.0, 2.0]))
    for k in range(2):
        np.testing.assert_allclose(batched[0][k], expected[k][0], rtol=1e-13)
        np.testing.assert_allclose(batched[1][k], expected[k][1], rtol=1e-13)


# --- Failures -------------------------------------------------------------------------------------------------------


@functools.cache
def doubling():
    """Return arguments of ``minimize`` with which θ doubles from 1 in each step. Inner solves fail from step 4 on."""
    declared = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * (w - theta * data) ** 2), lambda w, theta, data: -0.5 * theta**2
    )
    # Two inner steps divide the distance of the last w from θ by 4. Steps 2, 3 and 4 begin with the distances 3, 5.5
    # and about 9.4, so step 4 is the first whose residual stays above the tol of 1.5.
    return declared, 1.0, 1.0, bl.GradientDescent(0.5, 2, tol=1.5), bl.Implicit(bl.CG(1)), optax.sgd(1.0)


@pytest.mark.slow("compiles an outer loop for each kind of data", fast="iterator")
@pytest.mark.parametrize("data", ["pytree", "iterator"])
def test_the_loop_stops_at_the_first_failed_step_and_names_it(data):
    declared, theta, init, *arguments = doubling()
    given = 1.0 if data == "pytree" else itertools.repeat(1.0)
    with pytest.raises(
        bl.HypergradientError, match=r"^outer step 4, at theta = 16\.: inner solve, MAX_STEPS"
    ) as caught:
        bl.minimize(declared, theta, init, given, *arguments, 1000)
    state = caught.value.state
    assert float(state.theta) == 16.0 and int(state.step) == 4
    assert float(caught.value.result.inner.residual_norm) > 1.5 and float(caught.value.result.value) == -128.0
    # The state is that of a loop which ended before that step.
    found = bl.minimize(declared, theta, init, 1.0, *arguments, 4)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(found.state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and float(copy.state.theta) == 16.0


def test_a_failed_step_counts_from_the_first_call():
    declared, theta, init, *arguments = doubling()
    state = bl.minimize(declared, theta, init, 1.0, *arguments, 3).state
    with pytest.raises(bl.HypergradientError, match=r"^outer step 4, "):
        bl.minimize(declared, theta, init, 1.0, *arguments, 3, state=state)


def test_all_failed_steps_give_one_warning():
    declared, theta, init, *arguments = doubling()
    with pytest.warns(
        RuntimeWarning, match="^2 of 6 outer steps failed, the first of them step 4, MAX_STEPS"
    ) as caught:
        out = bl.minimize(declared, theta, init, 1.0, *arguments, 6, on_failure="warn")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert float(out.theta) == 64.0  # θ also moves in a failed step whose numbers are finite


@pytest.mark.slow("compiles an outer loop for a message")
def test_a_large_theta_is_abbreviated_in_the_message():
    declared = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta["a"]) ** 2)), lambda w, theta, data: data * w[0]
    )
    arguments = jnp.zeros(100), jnp.nan, bl.GradientDescent(0.5, 1), bl.Implicit(bl.CG(1)), optax.sgd(1.0), 3
    with pytest.raises(bl.HypergradientError, match=r"^outer step 0, at theta\['a'\] = \[0\. 0\. \.\.\. 0\. 0\.\]: "):
        bl.minimize(declared, {"a": jnp.zeros(100)}, *arguments)


# --- Callbacks, stopping, progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["pytree", "iterator"])
def test_callback_and_stop_are_called_every_so_many_steps(data):
    seen = []

    def call(steps, state=None, stop=None):
        given = TARGET if data == "pytree" else itertools.repeat(TARGET)
        callback = lambda step, theta, out: seen.append(step)  # noqa: E731
        options = {"every": 4, "callback": callback, "state": state, "stop": stop}
        return run(bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(1)), steps, data=given, **options)

    state = call(6).state
    assert call(7, state).ended == "steps"
    assert seen == [3, 5, 7, 11, 12]
    records = []
    out = call(20, stop=lambda record: records.append(record) or record.step >= 9)
    assert out.ended == "stop" and out.stopped and out.history.value.shape == (12,) and int(out.state.step) == 12
    assert [record.step for record in records] == [3, 7, 11]
    last = records[-1]
    assert (last.value, last.gradient_norm, last.inner_residual, last.linear_residual) == tuple(
        float(column[-1]) for column in jax.tree.leaves(out.history)[:4]
    )
    assert last.status is bl.Status.BUDGET_USED


def test_the_end_of_an_iterator_ends_the_loop_with_a_last_callback():
    seen = []
    options = {"every": 4, "callback": lambda step, theta, out: seen.append(step)}
    out = run(bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(1)), 20, data=batches(6), **options)
    assert seen == [3, 5] and out.ended == "data" and not out.stopped and int(out.state.step) == 6


@pytest.mark.slow("traces outer loops step by step")
def test_callbacks_and_the_end_are_the_same_under_a_trace():
    seen, ended = [], []
    state = run(bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(1)), 6).state

    def loops(target):
        for steps in (7, 8):
            options = {"every": 4, "callback": lambda step, theta, out: seen.append(step), "state": state}
            data = itertools.repeat(target, 7)
            out = run(bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(1)), steps, data=data, **options)
            ended.append(out.ended)

    loops(TARGET)
    jax.eval_shape(loops, TARGET)
    assert seen == [7, 11, 12] * 4
    assert ended == ["steps", "data"] * 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    def shown(stream, **options):
        monkeypatch.setattr(sys, "stderr", stream)
        run(bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(1)), 5, **options)
        return stream.getvalue()

    text = shown(Terminal(), progress=True)
    assert "━" in text and "step 5/5" in text and text.endswith("\n")
    assert shown(io.StringIO(), progress=True) == shown(Terminal()) == ""


# --- Resuming -------------------------------------------------------------------------------------------------------


METHODS = {
    "CG": bl.Implicit(bl.CG(2)),
    "Neumann": bl.Implicit(bl.Neumann(1, 0.1)),
    "Unrolled": bl.Unrolled(),
    "ForwardUnrolled": bl.ForwardUnrolled(),
    "OneStep": bl.OneStep(),
    "FirstOrder": bl.FirstOrder(),
    "FiniteDifference": bl.FiniteDifference(bl.CG(2)),
    "ValuePenalty": bl.ValuePenalty(100.0),
    "EvolutionStrategies": bl.EvolutionStrategies(1),
}
OPTIMIZERS = {"adam": optax.adam(0.1), "lbfgs": optax.lbfgs(), "momentum": optax.sgd(0.1, momentum=0.9)}
SCHEDULED = bl.Optax(optax.adam(optax.exponential_decay(0.1, 10, 0.9)), 2)


def saved_and_read(state, template):
    """Return a state that went through a file of NumPy arrays."""
    np.savez(file := io.BytesIO(), *jax.tree.leaves(state))
    saved = np.load(io.BytesIO(file.getvalue()))
    return jax.tree.unflatten(jax.tree.structure(template), [saved[name] for name in saved])


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow("compiles each method with each optimiser", fast="Neumann-adam-pytree")
@pytest.mark.parametrize("data", ["pytree", "iterator"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_and_ten_more_are_twenty_to_the_bit(method, optimizer, data):
    condition = diagonal_quadratic(EIGENVALUES)
    solver = bl.GradientDescent(0.2, 2, momentum=0.5) if method == "OneStep" else SCHEDULED
    if method == "FirstOrder":
        condition = bl.Proximal(lambda w, theta, data: 0.5 * w @ (EIGENVALUES * w), 1.0)
    declared = bl.Problem(condition, problem().outer)
    arguments = solver, METHODS[method], OPTIMIZERS[optimizer]

    def call(steps, first=0, **options):
        given = TARGET if data == "pytree" else itertools.islice(batches(20), first, None)
        return bl.minimize(
            declared, jnp.ones(2), jnp.zeros(2), given, *arguments, steps, on_failure="ignore", **options
        )

    whole, half = call(20), call(10)
    state = saved_and_read(half.state, bl.initial_state(declared, jnp.ones(2), jnp.zeros(2), TARGET, *arguments))
    rest = call(10, 10, state=state)
    assert_same_bits(rest.state, whole.state)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), half.history, rest.history)
    assert_same_bits(joined, jax.tree.map(np.asarray, whole.history))
    assert not np.array_equal(whole.w, half.w)
    assert_same_bits(call(10, 10, state=half.state).state, whole.state)  # the state itself, not read from a file


@pytest.mark.slow("starts Python twice")
def test_a_saved_state_is_resumed_in_another_process(tmp_path):
    script = textwrap.dedent("""
        import sys, jax, jax.numpy as jnp, numpy as np, optax
        import bilevel as bl
        eigenvalues = jnp.array([1.0, 4.0])
        condition = bl.Stationary(lambda w, theta, data: 0.5 * w @ (eigenvalues * w) - w @ theta)
        problem = bl.Problem(condition, lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2))
        solver = bl.Optax(optax.adam(optax.exponential_decay(0.1, 10, 0.9)), 2)
        start = jnp.ones(2), jnp.zeros(2), jnp.array([1.0, -2.0])
        arguments = problem, *start, solver, bl.Implicit(bl.CG(2)), optax.adam(0.1)

        def save(name, found):
            np.savez(name, *jax.tree.leaves(found.state))

        if sys.argv[1] == "start":
            save("whole.npz", bl.minimize(*arguments, 20))
            save("half.npz", bl.minimize(*arguments, 10))
        else:
            saved = np.load("half.npz")
            structure = jax.tree.structure(bl.initial_state(*arguments))
            state = jax.tree.unflatten(structure, [saved[name] for name in saved])
            save("rest.npz", bl.minimize(*arguments, 10, state=state))
    """)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for part in ("start", "go on"):
        subprocess.run([sys.executable, "-c", script, part], cwd=tmp_path, env=environment, check=True)
    whole, rest = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "rest.npz")
    assert whole.files == rest.files and int(rest[rest.files[-1]]) == 20
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], rest[name])


def test_a_state_of_another_loop_is_refused():
    solver, method = bl.GradientDescent(0.3, 2), bl.Implicit(bl.CG(1))
    state = run(solver, method, 1, optax.adam(0.1)).state
    for options in ({"optimizer": optax.sgd(0.1)}, {"solver": SCHEDULED}, {"method": bl.ValuePenalty(10.0)}):
        arguments = {"solver": solver, "method": method, "optimizer": optax.adam(0.1)} | options
        with pytest.raises(ValueError, match="the state does not fit"):
            run(steps=1, state=state, **arguments)


@pytest.mark.slow("compiles three outer loops")
def test_the_schedule_and_the_moments_of_the_inner_solver_go_on():
    # Each inner step moves w by −rate(k)·F, where k counts all inner steps. F = w − θ, and θ stays at 1.
    rates = [0.5, 0.25, 0.125, 0.1, 0.05, 0.025]
    schedule = optax.join_schedules([lambda _, rate=rate: rate for rate in rates], list(range(1, 6)))
    declared = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)

    def distances(solver, warm_start=True):
        arguments = solver, bl.Implicit(bl.CG(1)), optax.sgd(0.0), 3
        return bl.minimize(declared, 1.0, 0.0, None, *arguments, warm_start=warm_start).history.inner_residual

    expected = np.cumprod(1 - np.array(rates))
    np.testing.assert_allclose(distances(bl.Optax(optax.sgd(schedule), 2)), expected[1::2], rtol=1e-12)
    np.testing.assert_allclose(distances(bl.Optax(optax.sgd(schedule), 2), False), [expected[1]] * 3, rtol=1e-12)
    whole = bl.solve(bl.GradientDescent(0.1, 6, momentum=0.8), declared.condition, 0.0, 1.0, None)
    steps = distances(bl.GradientDescent(0.1, 2, momentum=0.8))
    np.testing.assert_allclose(steps[-1], whole.residual_norm, rtol=1e-12)


@pytest.mark.slow("compiles the loop for each penalty")
def test_a_value_penalty_needs_one_inner_step_for_each_outer_step():
    declared = bl.Problem(
        diagonal_quadratic(EIGENVALUES),
        lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2) + 0.5 * jnp.sum(theta**2),
    )
    exact = TARGET / EIGENVALUES / (1 / EIGENVALUES**2 + 1)  # where (θ/D − data)/D + θ = 0

    def error(penalty, inner_steps):
        arguments = bl.GradientDescent(0.2, inner_steps), bl.ValuePenalty(penalty), optax.sgd(0.1), 600
        found = bl.minimize(declared, jnp.zeros(2), jnp.zeros(2), TARGET, *arguments)
        return float(np.linalg.norm(found.theta - exact) / np.linalg.norm(exact))

    errors = [error(penalty, 1) for penalty in (10.0, 100.0, 1000.0)]
    assert errors[1] < 0.01 and error(100.0, 10) < 0.01
    # The error is of the order of 1/penalty.
    assert all(after < 0.15 * before for before, after in itertools.pairwise(errors))
