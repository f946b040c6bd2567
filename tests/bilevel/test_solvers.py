"""Inner solvers: their own formula, step for step, and what they say of how it ended."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic, ridge

import bilevel as bl

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
    case = quadratic()
    arguments = (case.condition, case.init, case.theta, case.data)
    ours, theirs = bl.GradientDescent(RATE, 20)(*arguments), bl.Optax(optax.sgd(RATE), 20)(*arguments)
    np.testing.assert_allclose(theirs.w, ours.w, rtol=1e-14)


def test_optax_adam_works_under_strict_promotion():
    case = quadratic()
    out = bl.Optax(optax.adam(0.1), 1000, tol=1e-6)(case.condition, case.init, case.theta, case.data)
    assert int(out.status) == bl.Status.CONVERGED and out.w.dtype == jnp.float64


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
    with pytest.raises(ValueError, match=r"Root is not one: use .*Stationary"):
        solver(ROOT, jnp.zeros(2), jnp.zeros(2), None)


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


def turn(angle=np.pi / 2):
    """w = Rw + θ for a rotation R: the plain iteration circles, at the same distance for ever."""
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return bl.FixedPoint(lambda w, theta, data: rotation @ w + theta), rotation


def test_anderson_works_on_a_rotation_where_the_plain_iteration_does_not():
    mapping, rotation = turn()
    theta = jnp.array([1.0, 0.3])
    exact = np.linalg.solve(np.eye(2) - rotation, theta)
    plain = bl.FixedPointIteration(200, tol=1e-6)(mapping, jnp.zeros(2), theta, None)
    assert int(plain.status) == bl.Status.MAX_STEPS and np.linalg.norm(plain.w - exact) > 0.1
    out = bl.Anderson(20, tol=1e-12)(mapping, jnp.zeros(2), theta, None)
    assert int(out.status) == bl.Status.CONVERGED and int(out.steps) < 8
    np.testing.assert_allclose(out.w, exact, rtol=1e-11)


def test_anderson_beats_the_plain_iteration_where_both_converge():
    mapping = bl.FixedPoint(lambda w, theta, data: jnp.cos(w) + theta)
    arguments = (mapping, jnp.zeros(3), jnp.array([0.0, 0.2, -0.4]), None)
    plain, fast = bl.FixedPointIteration(500, tol=1e-12)(*arguments), bl.Anderson(500, tol=1e-12)(*arguments)
    np.testing.assert_allclose(fast.w, plain.w, atol=1e-11)
    assert int(fast.steps) < int(plain.steps) / 2


def test_fixed_point_iteration_is_its_formula():
    mapping = bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta)
    out = bl.FixedPointIteration(10)(mapping, jnp.zeros(()), jnp.array(1.0), None)
    assert float(out.w) == pytest.approx(2 * (1 - 0.5**10), rel=1e-15) and int(out.steps) == 10


def test_hessian_free_is_newton_where_cg_has_as_many_steps_as_unknowns():
    case = quadratic()
    out = bl.HessianFree(3, cg_steps=4, tol=1e-10)(case.condition, case.init, case.theta, case.data)
    assert int(out.status) == bl.Status.CONVERGED and int(out.steps) <= 2
    np.testing.assert_allclose(out.w, case.exact(case.theta, case.data), rtol=1e-9)


def test_hessian_free_passes_a_saddle_and_walks_down_a_curved_valley():
    rosenbrock = bl.Stationary(lambda w, theta, data: (theta - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    # At (0, 1) the Hessian has a negative eigenvalue, 2 − 400: Newton's direction would go uphill.
    out = bl.HessianFree(60, cg_steps=2, tol=1e-8)(rosenbrock, jnp.array([0.0, 1.0]), jnp.array(1.0), None)
    assert int(out.status) == bl.Status.CONVERGED
    np.testing.assert_allclose(out.w, [1.0, 1.0], rtol=1e-6)


ROOT = bl.Root(lambda w, theta, data: jnp.array([[2.0, 1.0], [-1.0, 3.0]]) @ w + 0.1 * w**3 - theta)
MAP = bl.FixedPoint(lambda w, theta, data: 0.5 * jnp.cos(w) + theta)
BOX = bl.Projected(
    lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2), bl.jaxopt_projection("projection_non_negative"), 0.5
)
LASSO = bl.ProximalGradient(
    lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2), bl.jaxopt_prox("prox_lasso", lambda t, d: 0.1), 0.5
)


@pytest.mark.parametrize(
    ("name", "inner", "options"),
    [
        ("LBFGS", condition(), {}),
        ("GradientDescent", bl.Proximal(lambda w, theta, data: jnp.sum(w**4), 1.0), {}),
        ("Broyden", ROOT, {}),
        ("LevenbergMarquardt", ROOT, {}),
        ("FixedPointIteration", MAP, {}),
        ("AndersonAcceleration", MAP, {}),
        ("ProjectedGradient", BOX, {}),
        ("ProximalGradient", LASSO, {}),
    ],
)
def test_any_jaxopt_solver_on_the_condition_it_fits(name, inner, options):
    theta = jnp.array([1.0, -0.7])
    out = jax.jit(lambda t: bl.Jaxopt(name, tol=1e-8, maxiter=500, **options)(inner, jnp.zeros(2), t, None))(theta)
    assert float(out.residual_norm) < 1e-7 and 0 < int(out.steps) < 500
    assert out.w.dtype == jnp.float64


@pytest.mark.parametrize(
    ("solver", "inner", "remedy"),
    [
        (bl.GradientDescent(0.1, 3), MAP, "use .*FixedPointIteration, Anderson"),
        (bl.HessianFree(3), ROOT, r"Root is not one: use .*\(Stationary, Proximal\)"),
        (bl.Anderson(3), ROOT, r"Root has none: use .*\(FixedPoint, Projected"),
        (bl.FixedPointIteration(3), condition(), "GradientDescent, Optax or HessianFree"),
        (bl.Jaxopt("LBFGS"), BOX, "LBFGS does not solve Projected: use ProjectedGradient"),
        (bl.Jaxopt("Moon"), BOX, "no solver 'Moon'; it has .*LBFGS"),
    ],
)
def test_a_combination_that_makes_no_sense_names_those_that_do(solver, inner, remedy):
    with pytest.raises(ValueError, match=remedy):
        solver(inner, jnp.zeros(2), jnp.zeros(2), None)
