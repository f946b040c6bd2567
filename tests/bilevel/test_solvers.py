"""Inner solvers follow their formulas step by step, and the status says how a solve ended."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EIGENVALUES, diagonal_quadratic, quadratic, ridge

import bilevel as bl
from bilevel import tree

RATE = 0.05


def test_gradient_descent_follows_its_formula():
    theta, init = jnp.array([1.0, 2.0]), jnp.array([0.5, -0.5])
    out = bl.GradientDescent(0.1, max_steps=7)(diagonal_quadratic(), init, theta, None)
    exact = theta / EIGENVALUES
    expected = exact + (1 - 0.1 * EIGENVALUES) ** 7 * (init - exact)
    np.testing.assert_allclose(out.w, expected, rtol=1e-14)
    np.testing.assert_allclose(out.residual_norm, jnp.linalg.norm(EIGENVALUES * out.w - theta), rtol=1e-14)
    assert int(out.steps) == 7 and int(out.status) == bl.Status.BUDGET_USED


def test_momentum_follows_the_formula_of_the_heavy_ball():
    theta, w, memory = jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.zeros(2)
    for _ in range(5):
        memory = 0.9 * memory + EIGENVALUES * w - theta
        w = w - 0.1 * memory
    out = bl.GradientDescent(0.1, max_steps=5, momentum=0.9)(diagonal_quadratic(), jnp.zeros(2), theta, None)
    np.testing.assert_allclose(out.w, w, rtol=1e-14)


def test_sgd_of_optax_is_gradient_descent():
    case = quadratic()
    arguments = (case.condition, case.init, case.theta, case.data)
    ours, theirs = bl.GradientDescent(RATE, 20)(*arguments), bl.Optax(optax.sgd(RATE), 20)(*arguments)
    np.testing.assert_allclose(theirs.w, ours.w, rtol=1e-14)


def test_adam_of_optax_works_under_strict_promotion():
    case = quadratic()
    out = bl.Optax(optax.adam(0.1), 1000, tol=1e-6)(case.condition, case.init, case.theta, case.data)
    assert int(out.status) == bl.Status.CONVERGED and out.w.dtype == jnp.float64


def test_tol_stops_early_and_a_budget_spent_above_tol_is_max_steps():
    case = ridge()
    arguments = (case.condition, case.init, case.theta, case.data)
    out = bl.GradientDescent(0.3, max_steps=1000, tol=1e-8)(*arguments)
    assert int(out.status) == bl.Status.CONVERGED and 1 < int(out.steps) < 1000 and float(out.residual_norm) <= 1e-8
    out = bl.GradientDescent(0.3, max_steps=3, tol=1e-8)(*arguments)
    assert int(out.status) == bl.Status.MAX_STEPS and int(out.steps) == 3


def test_divergence_is_nonfinite():
    out = bl.GradientDescent(1e3, max_steps=200)(diagonal_quadratic(), jnp.ones(2), jnp.ones(2), None)
    assert int(out.status) == bl.Status.NONFINITE
    out = bl.GradientDescent(1e3, max_steps=2000, tol=1e-3)(diagonal_quadratic(), jnp.ones(2), jnp.ones(2), None)
    assert int(out.status) == bl.Status.NONFINITE


def test_a_plain_function_is_a_solver_and_the_library_computes_the_residual():
    out = bl.solve(
        lambda c, init, theta, data: theta / EIGENVALUES, diagonal_quadratic(), jnp.zeros(2), jnp.ones(2), None
    )
    assert float(out.residual_norm) == 0 and int(out.status) == bl.Status.BUDGET_USED


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda theta: {"w": theta}, r"\{'w': \(2,\)\}"),
        (lambda theta: (theta, 3), r"\(\(2,\), \(\)\)"),
        (lambda theta: jnp.zeros(3), r"\(3,\)"),
        (lambda theta: None, "None"),
        (lambda theta: bl.Solution(theta[0], theta[0], 1, bl.Status.CONVERGED), r"\(\)"),
    ],
    ids=["tree", "aux", "shape", "None", "Solution"],
)
def test_a_function_that_returns_something_else_than_w_is_refused(returned, got):
    problem = bl.Problem(diagonal_quadratic(), lambda w, theta, data: jnp.sum(w))
    function = bl.value_and_hypergradient(problem, lambda c, init, theta, data: returned(theta), bl.Implicit(bl.LU()))
    with pytest.raises(ValueError, match=rf"like init of shapes \(2,\), .* got shapes {got}: return w without"):
        function(jnp.ones(2), jnp.zeros(2), None)


def test_a_function_may_return_numpy_in_another_precision():
    out = bl.solve(lambda *_: np.array([1.0, 2.0], np.float32), diagonal_quadratic(), jnp.zeros(2), jnp.ones(2), None)
    assert out.w.dtype == jnp.float64 and out.w.tolist() == [1.0, 2.0]


def test_a_transformation_that_asks_for_the_value_is_refused_with_alternatives():
    with pytest.raises(ValueError, match=r"needs more .*'value'.*: use another one"):
        bl.Optax(optax.polyak_sgd(), 3)(diagonal_quadratic(), jnp.zeros(2), jnp.ones(2), None)


@pytest.mark.parametrize("rates", [optax.cosine_decay_schedule(0.3, 8), optax.linear_schedule(0.3, 0.1, 8)])
def test_a_schedule_is_followed_step_by_step(rates):
    theta, w = jnp.array([1.0, 2.0]), jnp.zeros(2)
    for step in range(8):
        w = w - float(rates(step)) * (EIGENVALUES * w - theta)
    out = bl.Optax(optax.sgd(rates), 8)(diagonal_quadratic(), jnp.zeros(2), theta, None)
    np.testing.assert_allclose(out.w, w, rtol=1e-6)  # optax computes schedules in float32


def test_float32_stays_float32():
    theta = jnp.ones(2, jnp.float32)
    inner = bl.Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2))
    for tol in (None, 1e-3):
        out = jax.jit(lambda t, tol=tol: bl.GradientDescent(0.1, 5, tol)(inner, jnp.zeros_like(t), t, None))(theta)
        assert out.w.dtype == out.residual_norm.dtype == jnp.float32


@pytest.mark.parametrize("solver", [bl.GradientDescent(0.1, 3), bl.Optax(optax.sgd(0.1), 3)], ids=["gd", "optax"])
def test_descent_on_a_root_is_refused_with_alternatives(solver):
    with pytest.raises(
        ValueError, match=r"needs a condition that is the gradient of an objective, and Root is not: use .*Stationary"
    ):
        solver(ROOT, jnp.zeros(2), jnp.zeros(2), None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bl.GradientDescent(0.1, -1),
        lambda: bl.GradientDescent(-0.1, 1),
        lambda: bl.GradientDescent(float("inf"), 1),
        lambda: bl.GradientDescent(float("nan"), 1),
        lambda: bl.GradientDescent(0.1, 1, tol=-1.0),
        lambda: bl.GradientDescent(0.1, 1, momentum=1.0),
        lambda: bl.Optax(optax.sgd(0.1), -1),
    ],
)
def test_invalid_options_are_refused_and_the_message_names_the_number(make):
    with pytest.raises(ValueError, match=r"needs .* got"):
        make()


def rotated_fixed_point(angle=np.pi / 2):
    """Return the condition w = Rw + θ and the rotation R.

    Under the plain iteration w ← Rw + θ, the distance to the solution stays constant.
    """
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return bl.FixedPoint(lambda w, theta, data: rotation @ w + theta), rotation


def test_anderson_converges_on_a_rotation_and_the_plain_iteration_does_not():
    mapping, rotation = rotated_fixed_point()
    theta = jnp.array([1.0, 0.3])
    exact = np.linalg.solve(np.eye(2) - rotation, theta)
    plain = bl.FixedPointIteration(200, tol=1e-6)(mapping, jnp.zeros(2), theta, None)
    assert int(plain.status) == bl.Status.MAX_STEPS and np.linalg.norm(plain.w - exact) > 0.1
    out = bl.Anderson(20, tol=1e-12)(mapping, jnp.zeros(2), theta, None)
    assert int(out.status) == bl.Status.CONVERGED and int(out.steps) < 8
    np.testing.assert_allclose(out.w, exact, rtol=1e-11)


def test_anderson_takes_less_than_half_the_steps_of_the_plain_iteration():
    mapping = bl.FixedPoint(lambda w, theta, data: jnp.cos(w) + theta)
    arguments = (mapping, jnp.zeros(3), jnp.array([0.0, 0.2, -0.4]), None)
    plain, fast = bl.FixedPointIteration(500, tol=1e-12)(*arguments), bl.Anderson(500, tol=1e-12)(*arguments)
    np.testing.assert_allclose(fast.w, plain.w, atol=1e-11)
    assert int(fast.steps) < int(plain.steps) / 2


def test_anderson_takes_the_steps_of_its_definition():
    matrix = np.random.default_rng(0).normal(size=(6, 6)) / 4
    mapping = bl.FixedPoint(lambda w, theta, data: jnp.tanh(matrix @ w) + theta)
    theta = jnp.linspace(-1, 1, 6)
    iterates, values = [np.zeros(6)], [np.asarray(theta)]
    for _ in range(9):  # more steps than the history holds
        recent = slice(max(0, len(values) - 4), None)
        steps_value = np.diff(np.stack(values[recent]), axis=0)
        residuals = np.stack(values[recent]) - np.stack(iterates[recent])
        mix = np.linalg.lstsq(np.diff(residuals, axis=0).T, residuals[-1])[0]
        iterates.append(values[-1] - mix @ steps_value)
        values.append(np.tanh(matrix @ iterates[-1]) + np.asarray(theta))
    for steps in (1, 4, 9):
        found = bl.Anderson(steps, history=3)(mapping, jnp.zeros(6), theta, None)
        np.testing.assert_allclose(found.w, iterates[steps], atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e30])
def test_anderson_converges_where_squares_over_or_underflow(scale):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)) / 4, jnp.float32)
    mapping = bl.FixedPoint(lambda w, theta, data: matrix @ w + theta)
    theta = jnp.linspace(-1, 1, 6, dtype=jnp.float32)
    exact = np.linalg.solve(np.eye(6) - np.asarray(matrix, float), theta)

    def solve(theta):
        return bl.Anderson(20)(mapping, jnp.zeros(6, jnp.float32), theta, None).w

    np.testing.assert_allclose(solve(scale * theta) / scale, exact, atol=1e-5)
    batch = jax.vmap(solve)(jnp.stack([theta, scale * theta]))
    np.testing.assert_allclose(batch / jnp.float32([[1], [scale]]), [exact, exact], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_anderson_mixes_in_float32_and_returns_each_leaf_in_its_own_dtype(dtype):
    mapping = bl.FixedPoint(lambda w, theta, data: jax.tree.map(lambda leaf, t: 0.5 * jnp.cos(leaf) + t, w, theta))
    theta = {"slim": jnp.array([0.2, -0.4], dtype), "wide": jnp.array(0.3, jnp.float32), "none": jnp.zeros(0, dtype)}
    out = bl.Anderson(12)(mapping, jax.tree.map(jnp.zeros_like, theta), theta, None)
    assert jax.tree.map(lambda leaf: leaf.dtype, out.w) == jax.tree.map(lambda leaf: leaf.dtype, theta)
    for name, leaf in out.w.items():
        bound = 8 * float(jnp.finfo(leaf.dtype).eps)  # a few roundings of numbers near one
        w = np.asarray(leaf, float)
        np.testing.assert_allclose(w, 0.5 * np.cos(w) + np.asarray(theta[name], float), atol=bound)


def test_anderson_takes_an_empty_w_and_a_start_at_the_solution():
    mapping = bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta)
    assert bl.Anderson(3)(mapping, jnp.zeros(0), jnp.zeros(0), None).w.shape == (0,)
    out = bl.Anderson(7, history=30)(mapping, jnp.full(2, 2.0), jnp.ones(2), None)
    assert out.w.tolist() == [2.0, 2.0] and float(out.residual_norm) == 0


def test_fixed_point_iteration_follows_its_formula():
    mapping = bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta)
    out = bl.FixedPointIteration(10)(mapping, jnp.zeros(()), jnp.array(1.0), None)
    assert float(out.w) == pytest.approx(2 * (1 - 0.5**10), rel=1e-15) and int(out.steps) == 10


def lasso():
    """Return the condition of a lasso with a separable objective, the penalty θ, and the solution.

    The curvatures go from 1 to 0.01. Two of the six unknowns are zero at the solution.
    """
    curvatures, slopes = jnp.logspace(0, -2, 6), jnp.array([1.0, -0.2, 0.03, 0.3, -0.04, 0.1])
    theta = jnp.array(0.05)

    def fit(w, theta, data):
        return 0.5 * jnp.vdot(curvatures, w**2) - jnp.vdot(slopes, w)

    condition = bl.ProximalGradient(fit, bl.jaxopt_prox("prox_lasso", lambda theta, data: theta))
    return condition, theta, jnp.sign(slopes) * jnp.maximum(jnp.abs(slopes) - theta, 0) / curvatures


@pytest.mark.parametrize(("restart", "tol", "factor"), [(False, 1e-4, 1.5), (True, 1e-10, 8)])
def test_fista_solves_a_lasso_problem_in_fewer_steps_than_the_plain_iteration(restart, tol, factor):
    condition, theta, exact = lasso()
    out = bl.solve(bl.FISTA(1000, tol=tol, restart=restart), condition, jnp.zeros(6), theta, None)
    plain = bl.solve(bl.FixedPointIteration(5000, tol=tol), condition, jnp.zeros(6), theta, None)
    assert int(out.status) == int(plain.status) == bl.Status.CONVERGED
    np.testing.assert_allclose(out.w, exact, atol=200 * tol)  # the least curvature is 0.01
    assert int(out.steps) < int(plain.steps) / factor


def test_fista_takes_the_steps_of_jaxopt():
    condition, theta, _ = lasso()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jaxopt warns that it is not maintained
        import jaxopt

        theirs = jaxopt.ProximalGradient(
            lambda w, *_: condition.objective(w, theta, None), jaxopt.prox.prox_lasso, stepsize=1.0, maxiter=17, tol=0.0
        ).run(jnp.zeros(6), theta)
    ours = bl.solve(bl.FISTA(17, restart=False), condition, jnp.zeros(6), theta, None)
    np.testing.assert_allclose(ours.w, theirs.params, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"tol": 1e-2}], ids=str)
def test_fista_ends_in_the_set_of_a_projection(options):
    condition = bl.Projected(
        lambda w, theta, data: 0.5 * jnp.vdot(EIGENVALUES, (w - theta) ** 2),
        bl.jaxopt_projection("projection_non_negative"),
        0.5 / float(max(EIGENVALUES)),
    )
    out = bl.solve(bl.FISTA(3, **options), condition, jnp.ones(2), jnp.array([0.5, -0.5]), None)
    assert bool(jnp.all(out.w >= 0))
    np.testing.assert_allclose(out.residual_norm, tree.norm(condition.residual(out.w, jnp.array([0.5, -0.5]), None)))


@pytest.mark.parametrize("method", [bl.Implicit(bl.LU()), bl.Unrolled()], ids=lambda method: type(method).__name__)
def test_fista_is_differentiated_by_the_theorem_and_by_its_steps(method):
    condition, theta, w = lasso()
    problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w**2))
    out = bl.value_and_hypergradient(problem, bl.FISTA(300), method)(theta, jnp.zeros(6), None)
    assert int(jnp.sum(out.inner.w == 0)) == 2
    # An unknown that is not zero is w = (slope ∓ θ)/curvature.
    np.testing.assert_allclose(out.gradient, -2 * jnp.vdot(jnp.abs(w), 1 / jnp.logspace(0, -2, 6)), rtol=1e-8)


def test_a_schedule_gives_each_step_its_size_and_goes_on_in_minimize():
    rates = jnp.array([0.2, 0.1, 0.05, 0.02])

    def schedule(step):
        return rates[jnp.minimum(step, 3)]

    theta, w, velocity = jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.zeros(2)
    for rate in rates:
        velocity = 0.9 * velocity + EIGENVALUES * w - theta
        w = w - rate * velocity
    solver = bl.GradientDescent(schedule, 4, momentum=0.9)
    np.testing.assert_allclose(solver(diagonal_quadratic(), jnp.zeros(2), theta, None).w, w, rtol=1e-14)
    # Two outer steps with an outer learning rate of 0 are one inner run of twice as many steps.
    problem = bl.Problem(diagonal_quadratic(), lambda w, theta, data: jnp.sum(w))
    half = bl.GradientDescent(schedule, 2, momentum=0.9)
    found = bl.minimize(problem, theta, jnp.zeros(2), None, half, bl.Implicit(bl.CG(2)), optax.sgd(0.0), 2)
    np.testing.assert_allclose(found.w, w, rtol=1e-14)


@pytest.mark.slow("compiles a failing solve and its remedy")
def test_a_schedule_that_diverges_is_told_the_limit_of_its_steps():
    problem = bl.Problem(diagonal_quadratic(), lambda w, theta, data: jnp.sum(w))
    limit = 2 / max(EIGENVALUES)
    solver = bl.GradientDescent(lambda step: jnp.where(step < 20, 1.5 * limit, 0.1 * limit), 25, tol=1e-6)
    with pytest.raises(bl.HypergradientError, match=rf"the step_size must be below {limit:.3g}"):
        bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.CG(2)))(jnp.ones(2), jnp.zeros(2), None)


def test_minibatches_takes_the_gradient_of_the_drawn_samples_and_reports_the_residual_of_all():
    samples = {"x": np.arange(6.0), "row": np.arange(6)}
    mean = bl.Stationary(lambda w, theta, data: 0.5 * jnp.mean((w - data["x"]) ** 2))
    out = bl.solve(bl.Minibatches(bl.GradientDescent(0.5, 3), 2, seed=7), mean, jnp.array(0.0), None, samples)
    w = 0.0
    for step in range(3):
        drawn = jax.random.randint(jax.random.fold_in(jax.random.key(7), step), (2,), 0, 6)
        w = w - 0.5 * (w - np.mean(samples["x"][np.asarray(drawn)]))
    np.testing.assert_allclose(out.w, w, rtol=1e-14)
    np.testing.assert_allclose(out.residual_norm, abs(w - 2.5), rtol=1e-13)
    assert int(out.steps) == 3 and int(out.status) == bl.Status.BUDGET_USED


@pytest.mark.slow("compiles a solve with each solver", fast="Optax")
@pytest.mark.parametrize("transformed", [False, True], ids=["GradientDescent", "Optax"])
def test_minibatches_with_a_falling_step_size_approaches_the_solution_and_its_hypergradient(transformed):
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 3))
    data = x, x @ np.array([1.0, -2.0, 0.5]) + 0.1 * random.normal(size=500)

    def fit(w, theta, data):
        return 0.5 * jnp.mean((data[0] @ w - data[1]) ** 2) + 0.5 * theta * jnp.sum(w**2)

    def exact(theta):
        return jnp.sum(jnp.linalg.solve(x.T @ x / 500 + theta * jnp.eye(3), x.T @ data[1] / 500))

    falling = optax.exponential_decay(0.3, 200, 0.3)
    descent = bl.Optax(optax.sgd(falling), 1500) if transformed else bl.GradientDescent(falling, 1500)
    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: jnp.sum(w))
    hypergradient = bl.value_and_hypergradient(problem, bl.Minibatches(descent, 16), bl.Implicit(bl.CG(3)))
    out = hypergradient(0.1, jnp.zeros(3), data)
    assert float(out.inner.residual_norm) < 3e-3
    np.testing.assert_allclose(out.gradient, jax.grad(exact)(0.1), rtol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: bl.Minibatches(bl.GradientDescent(0.1, 3, tol=1e-3), 2),
            "needs a GradientDescent or an Optax with tol",
        ),
        (lambda: bl.Minibatches(bl.HessianFree(3), 2), "needs a GradientDescent or an Optax"),
        (lambda: bl.Minibatches(bl.GradientDescent(0.1, 3), 0), "batch of at least 1 sample, got 0"),
    ],
)
def test_minibatches_refuses_solvers_without_a_fixed_number_of_gradient_steps(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("data", [None, 1.0, np.zeros((0, 2)), {"x": np.zeros((3, 2)), "y": np.zeros(4)}])
def test_minibatches_refuses_data_without_one_axis_of_samples(data):
    solver = bl.Minibatches(bl.GradientDescent(0.1, 3), 2)
    with pytest.raises(ValueError, match="Minibatches needs arrays with one common leading axis of samples"):
        solver(diagonal_quadratic(), jnp.zeros(2), jnp.zeros(2), data)


def test_hessian_free_is_newtons_method_if_cg_has_as_many_steps_as_unknowns():
    case = quadratic()
    out = bl.HessianFree(3, cg_steps=4, tol=1e-10)(case.condition, case.init, case.theta, case.data)
    assert int(out.status) == bl.Status.CONVERGED and int(out.steps) <= 2
    np.testing.assert_allclose(out.w, case.exact(case.theta, case.data), rtol=1e-9)


@pytest.mark.slow("compiles a solve for each scale", fast=("1e+25", "1e-12"))
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_hessian_free_takes_the_same_steps_at_every_scale_of_the_objective(scale):
    # In float32 the square of a slope of size 1e-25 is zero, and the square of 1e25 is infinite.
    valley = bl.Stationary(lambda w, theta, data: data * (0.5 * jnp.sum((w - theta) ** 2) + 0.25 * jnp.sum(w**4)))
    theta = jnp.array([1.0, 2.0], jnp.float32)
    one, scaled = (
        bl.HessianFree(6)(valley, jnp.zeros(2, jnp.float32), theta, jnp.float32(factor)).w for factor in (1.0, scale)
    )
    np.testing.assert_allclose(scaled, one, rtol=1e-5)
    np.testing.assert_allclose(one + one**3, theta, rtol=1e-5)


def test_hessian_free_leaves_a_region_of_negative_curvature_and_follows_a_curved_valley():
    rosenbrock = bl.Stationary(lambda w, theta, data: (theta - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2)
    # At (0, 1) the Hessian is diag(2 − 400, 200). A Newton step would ascend along w[0].
    out = bl.HessianFree(60, cg_steps=2, tol=1e-8)(rosenbrock, jnp.array([0.0, 1.0]), jnp.array(1.0), None)
    assert int(out.status) == bl.Status.CONVERGED
    np.testing.assert_allclose(out.w, [1.0, 1.0], rtol=1e-6)


ROOT = bl.Root(lambda w, theta, data: jnp.array([[2.0, 1.0], [-1.0, 3.0]]) @ w + 0.1 * w**3 - theta)
MAP = bl.FixedPoint(lambda w, theta, data: 0.5 * jnp.cos(w) + theta)
BOX = bl.Projected(
    lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2), bl.jaxopt_projection("projection_non_negative"), 0.5
)


@pytest.mark.parametrize(
    ("solver", "inner", "remedy"),
    [
        (bl.GradientDescent(0.1, 3), MAP, "use .*FixedPointIteration, Anderson"),
        (bl.HessianFree(3), ROOT, "Root is not: use Stationary, .* or solve it by LevenbergMarquardt, GaussNewton"),
        (bl.GradientDescent(0.1, 3), BOX, "Projected is not: .* or solve it by FISTA"),
        (bl.Anderson(3), ROOT, r"repeats a mapping, and Root has no mapping: use FixedPoint, Projected"),
        (bl.FixedPointIteration(3), diagonal_quadratic(), "GradientDescent, Optax or HessianFree"),
        (bl.Jaxopt("LBFGS"), BOX, "LBFGS does not solve Projected: use ProjectedGradient, MirrorDescent"),
        (bl.Jaxopt("Moon"), BOX, "no solver 'Moon'; it has .*LBFGS"),
    ],
)
def test_an_unsupported_condition_is_refused_with_alternatives(solver, inner, remedy):
    with pytest.raises(ValueError, match=remedy):
        solver(inner, jnp.zeros(2), jnp.zeros(2), None)
