"""The outer loop converges, profits from warm starts, and never applies a gradient that is not finite."""

import itertools

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


def problem():
    """Return the problem ½‖w − data‖² with w = D⁻¹θ and D = diag(EIGENVALUES). Its minimum is at θ = D·data."""
    return bl.Problem(diagonal_quadratic(EIGENVALUES), lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2))


def run(solver, method, steps=200, optimizer=None, data=TARGET, **options):
    optimizer = optimizer or optax.sgd(1.0)
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


def test_the_adjoint_solve_starts_from_the_last_adjoint():
    # With one Neumann term a step, a cold adjoint is 0.1·g with g = ∂outer/∂w. A warm one converges to D⁻¹g.
    solver, method = bl.GradientDescent(0.3, 40), bl.Implicit(bl.Neumann(1, 0.1))
    slowly = optax.sgd(0.01)  # θ moves slowly: the adjoint's error shrinks by a factor of 0.9 a step
    warm, cold = run(solver, method, 60, slowly), run(solver, method, 60, slowly, warm_start=False)
    # The cold residual, ‖g − 0.1·Dg‖ / ‖g‖, is between 1 − 0.4 and 1 − 0.1.
    assert float(warm.history.linear_residual[-1]) < 0.2 < 0.59 < float(cold.history.linear_residual[-1])


def test_a_stochastic_single_loop_converges_to_the_minimum_for_the_mean():
    rng, rate = np.random.default_rng(0), 0.2
    samples = (TARGET + 0.1 * rng.normal(size=2) for _ in range(1500))
    decay = optax.sgd(optax.exponential_decay(0.5, 500, 0.3))
    out = run(bl.GradientDescent(rate, 1), bl.Implicit(bl.Neumann(1, rate)), 1500, decay, samples)
    # For the last 500 samples the learning rate of θ is near 0.02. This leaves noise of about 0.1·√0.02 in w = D⁻¹θ.
    np.testing.assert_allclose(out.theta / EIGENVALUES, TARGET, atol=0.06)


def test_two_steps_of_the_single_loop_are_their_formula():
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
def test_theta_stays_where_a_gradient_is_not_finite():
    data = iter([TARGET, np.full(2, np.nan), np.full(2, np.nan)])
    first = run(bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), 1, optax.adam(0.1), iter([TARGET]))
    out = run(bl.GradientDescent(0.3, 40), bl.Implicit(bl.CG(2)), 3, optax.adam(0.1), data, on_failure="ignore")
    np.testing.assert_array_equal(out.theta, first.theta)
    assert [int(status) for status in out.history.status] == [1, 7, 7]
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
    assert [int(status) for status in out.history.status] == [1, bl.Status.NONFINITE, 1, 1, 1]


@pytest.mark.slow("compiles outer loops with warm and with cold starts", fast="1")
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
