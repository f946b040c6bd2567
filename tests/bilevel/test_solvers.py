"""Inner solvers: their own formula, step for step, and what they say of how it ended."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic, ridge

import bilevel as bl

CASE = quadratic()
RATE = 0.05


DIAGONAL = np.array([1.0, 3.0])


def condition():
    return bl.Stationary(lambda w, theta, data: 0.5 * w @ (DIAGONAL * w) - w @ theta)


def test_gradient_descent_is_its_formula():
    theta, init = jnp.array([1.0, 2.0]), jnp.array([0.5, -0.5])
    out = bl.GradientDescent(0.1, steps=7)(condition(), init, theta, None)
    exact = theta / DIAGONAL
    expected = exact + (1 - 0.1 * DIAGONAL) ** 7 * (init - exact)
    np.testing.assert_allclose(out.w, expected, rtol=1e-14)
    np.testing.assert_allclose(out.residual_norm, jnp.linalg.norm(DIAGONAL * out.w - theta), rtol=1e-14)
    assert int(out.steps) == 7 and int(out.status) == bl.Status.BUDGET_USED


def test_heavy_ball_is_its_formula():
    theta, w, memory = jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.zeros(2)
    for _ in range(5):
        memory = 0.9 * memory + DIAGONAL * w - theta
        w = w - 0.1 * memory
    out = bl.GradientDescent(0.1, steps=5, momentum=0.9)(condition(), jnp.zeros(2), theta, None)
    np.testing.assert_allclose(out.w, w, rtol=1e-14)


def test_optax_sgd_is_gradient_descent():
    arguments = (CASE.condition, CASE.init, CASE.theta, CASE.data)
    ours, theirs = bl.GradientDescent(RATE, 20)(*arguments), bl.Optax(optax.sgd(RATE), 20)(*arguments)
    np.testing.assert_allclose(theirs.w, ours.w, rtol=1e-14)


def test_a_tol_stops_early_and_running_out_is_told():
    case = ridge()
    arguments = (case.condition, case.init, case.theta, case.data)
    out = bl.GradientDescent(0.3, steps=1000, tol=1e-8)(*arguments)
    assert int(out.status) == bl.Status.CONVERGED and 1 < int(out.steps) < 1000 and float(out.residual_norm) <= 1e-8
    out = bl.GradientDescent(0.3, steps=3, tol=1e-8)(*arguments)
    assert int(out.status) == bl.Status.MAX_STEPS and int(out.steps) == 3


def test_divergence_is_nonfinite():
    out = bl.GradientDescent(1e3, steps=200)(condition(), jnp.ones(2), jnp.ones(2), None)
    assert int(out.status) == bl.Status.NONFINITE
    out = bl.GradientDescent(1e3, steps=2000, tol=1e-3)(condition(), jnp.ones(2), jnp.ones(2), None)
    assert int(out.status) == bl.Status.NONFINITE


def test_any_function_is_a_solver_and_is_judged_by_its_residual():
    out = bl.solve(lambda c, init, theta, data: theta / DIAGONAL, condition(), jnp.zeros(2), jnp.ones(2), None)
    assert float(out.residual_norm) == 0 and int(out.status) == bl.Status.BUDGET_USED


def test_float32_stays_float32():
    theta = jnp.ones(2, jnp.float32)
    inner = bl.Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2))
    for tol in (None, 1e-3):
        out = jax.jit(lambda t, tol=tol: bl.GradientDescent(0.1, 5, tol)(inner, jnp.zeros_like(t), t, None))(theta)
        assert out.w.dtype == out.residual_norm.dtype == jnp.float32


@pytest.mark.parametrize("solver", [bl.GradientDescent(0.1, 3), bl.Optax(optax.sgd(0.1), 3)], ids=["gd", "optax"])
def test_descent_on_a_root_is_refused_with_the_right_ones(solver):
    class Rotation:
        symmetric = False

        def residual(self, w, theta, data):
            return w

    with pytest.raises(ValueError, match=r"Rotation is not one: use .*Stationary"):
        solver(Rotation(), jnp.zeros(2), jnp.zeros(2), None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bl.GradientDescent(0.1, -1),
        lambda: bl.GradientDescent(-0.1, 1),
        lambda: bl.GradientDescent(0.1, 1, tol=-1.0),
        lambda: bl.GradientDescent(0.1, 1, momentum=1.0),
        lambda: bl.Optax(optax.sgd(0.1), -1),
    ],
)
def test_senseless_options_are_refused_with_the_number(make):
    with pytest.raises(ValueError, match=r"needs .* got"):
        make()
