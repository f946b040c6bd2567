"""The hypergradient of a condition agrees with a closed form or with central differences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import pytest
from problems import MATRIX, TARGET, WEIGHTS, central_differences, minimum_on_plane, newton
from problems import distance_to_target as objective
from problems import weighted_outer as outer

import bilevel as bl

STEP = 0.2
SOLVER = bl.FixedPointIteration(600, tol=1e-13)


def hypergradient(condition, theta, data=TARGET, solver=SOLVER, linear=None, outer=outer, init=None):
    function = bl.value_and_hypergradient(bl.Problem(condition, outer), solver, bl.Implicit(linear or bl.LU()))
    return function(theta, jnp.zeros(4) if init is None else init, jnp.asarray(data))


def differences(condition, theta, data=TARGET):
    """Return central differences of the outer value. The solver's error of 1e-13 becomes about 1e-8 in them."""

    def value(theta):
        return float(outer(SOLVER(condition, jnp.zeros(4), theta, jnp.asarray(data)).w, theta, data))

    return central_differences(value, jnp.asarray(theta))


def test_the_fixed_point_of_a_cosine_has_a_closed_form():
    condition = bl.FixedPoint(lambda w, theta, data: jnp.cos(w) + theta)
    layer = bl.implicit_layer(condition, bl.FixedPointIteration(400, tol=1e-15), bl.LU())
    for theta in (-0.4, 0.0, 0.3):
        w = layer(theta, 0.0, None)
        assert float(w) == pytest.approx(float(jnp.cos(w) + theta), abs=1e-14)
        assert float(jax.grad(layer)(theta, 0.0, None)) == pytest.approx(1 / (1 + np.sin(w)), rel=1e-12)


@pytest.mark.slow("differentiates in 40,200 outer variables")
def test_an_affine_contraction_in_two_hundred_dimensions_has_the_derivative_of_its_inverse():
    n, rng = 200, np.random.default_rng(1)
    matrix = rng.normal(size=(n, n))
    matrix *= 0.5 / np.linalg.norm(matrix, 2)  # κ(I − M) ≤ 1.5 / 0.5
    vector, weights = rng.normal(size=n), rng.normal(size=n)
    problem = bl.Problem(
        bl.FixedPoint(lambda w, theta, data: theta["M"] @ w + theta["c"]), lambda w, theta, data: weights @ w
    )
    theta = {"M": jnp.asarray(matrix), "c": jnp.asarray(vector)}
    inverse = np.linalg.inv(np.eye(n) - matrix)
    w, adjoint = inverse @ vector, inverse.T @ weights
    for linear in (bl.GMRES(60), bl.LU()):
        out = bl.value_and_hypergradient(problem, bl.FixedPointIteration(60), bl.Implicit(linear))(
            theta, jnp.zeros(n), None
        )
        # Each entry is a sum of 200 terms, with an error of about 100·eps·κ·‖w‖.
        np.testing.assert_allclose(out.gradient["c"], adjoint, atol=1e-12 * np.linalg.norm(adjoint))
        np.testing.assert_allclose(out.gradient["M"], np.outer(adjoint, w), atol=1e-12 * np.abs(adjoint).max() * 20)


@pytest.mark.slow("compiles a hypergradient for each linear solver")
@pytest.mark.parametrize("per_parameter", [False, True])
def test_a_learned_proximal_strength_has_a_closed_form(per_parameter):
    # w = (H + Λ)⁻¹(Ht + Λc) with H = MATRIX, t = TARGET, c = θ["center"] and Λ = diag(exp(θ["log"])).
    def strength(theta, data):
        return jnp.exp(theta["log"])

    def exact(theta):
        pull = jnp.exp(theta["log"]) * jnp.ones(4)
        return jnp.linalg.solve(MATRIX + jnp.diag(pull), MATRIX @ TARGET + pull * theta["center"])

    condition = bl.Proximal(objective, strength, center=lambda theta, data: theta["center"])
    theta = {"log": jnp.array([0.1, -1.0, 0.7, 2.0]) if per_parameter else jnp.array(0.3), "center": jnp.ones(4)}
    expected = jax.grad(lambda theta: outer(exact(theta), theta, None))(theta)
    for linear in (bl.CG(10), bl.LU(), bl.Cholesky()):
        out = hypergradient(condition, theta, solver=newton, linear=linear)
        for name in theta:  # κ < 20
            np.testing.assert_allclose(out.gradient[name], expected[name], rtol=100 * 2.2e-16 * 20)


def test_the_residual_is_the_gradient_of_the_potential():
    conditions = [bl.Stationary(objective), bl.Proximal(objective, 0.7)]
    conditions.append(bl.Proximal(objective, lambda theta, data: jnp.exp(theta), center=lambda theta, data: data))
    w, theta = jnp.arange(4.0), jnp.ones(4)
    for condition in conditions:
        gradient = jax.grad(condition.potential)(w, theta, jnp.asarray(TARGET))
        np.testing.assert_allclose(gradient, condition.residual(w, theta, jnp.asarray(TARGET)), rtol=1e-14)


BALLS = {
    "projection_l2_ball": 0.8,
    "projection_l1_ball": 0.9,
    "projection_linf_ball": 0.5,
    "projection_simplex": 1.3,
    "projection_l2_sphere": 0.8,
    "projection_l1_sphere": 0.9,
    "projection_hypercube": 0.7,
}
SETS = {
    "projection_box": (np.array([-0.2, 0.6]), lambda t: (t[0], t[1])),
    "projection_hyperplane": (np.array([1.0, 0.5, -1.0, 2.0, 0.3]), lambda t: (t[:4], t[4])),
    "projection_halfspace": (np.array([1.0, 0.5, -1.0, 2.0, 0.3]), lambda t: (t[:4], t[4])),
} | {name: (np.array(radius), lambda t: t) for name, radius in BALLS.items()}


@pytest.mark.slow("compiles each projection with two derivatives")
@pytest.mark.parametrize("name", SETS)
def test_a_projection_is_differentiated_in_the_parameters_of_its_set(name):
    theta, params = SETS[name]
    projection = bl.jaxopt_projection(name, params=lambda theta, data: params(theta))
    condition = bl.Projected(objective, projection, STEP)
    out = hypergradient(condition, jnp.asarray(theta))
    np.testing.assert_allclose(out.gradient, differences(condition, theta), rtol=1e-6, atol=1e-8)
    assert np.abs(out.gradient).max() > 1e-2  # the constraint is active


@pytest.mark.slow("compiles each projection with its derivative", fast="projection_box_section")
@pytest.mark.parametrize("name", ["projection_box_section", "projection_affine_set"])
def test_a_projection_that_fixes_a_sum_has_a_closed_form(name):
    # In both sets the entries sum to c. The box section also has bounds. For the set F of entries at no bound,
    # dw_F/dc = H_FF⁻¹1 / 1ᵀH_FF⁻¹1 with H = MATRIX. The other entries do not move.
    ones = jnp.ones(4)
    params = {
        "projection_box_section": lambda c, data: (-0.1 * ones, 0.9 * ones, ones, c),
        "projection_affine_set": lambda c, data: (ones[None], c[None]),
    }
    condition = bl.Projected(objective, bl.jaxopt_projection(name, params=params[name]), STEP)
    out = hypergradient(condition, jnp.array(1.2))
    w = np.asarray(out.inner.w)
    inside = (w > -0.09) & (w < 0.89) if name == "projection_box_section" else np.full(4, True)
    slope = np.zeros(4)
    slope[inside] = np.linalg.solve(MATRIX[np.ix_(inside, inside)], np.ones(inside.sum()))
    np.testing.assert_allclose(out.gradient, (WEIGHTS + 0.6 * w) @ slope / slope.sum(), rtol=1e-11)


@pytest.mark.slow("compiles a projection with its derivative")
def test_a_projection_without_parameters_is_differentiated_in_the_objective():
    condition = bl.Projected(
        lambda w, theta, data: objective(w, theta, theta), bl.jaxopt_projection("projection_non_negative"), STEP
    )
    theta = jnp.asarray(TARGET)
    out = hypergradient(condition, theta)
    np.testing.assert_allclose(out.gradient, differences(condition, theta), rtol=1e-6, atol=1e-8)
    assert float(out.inner.w.min()) == 0.0


def test_the_projection_onto_a_ball_has_a_closed_form():
    # The nearest point to t in a ball of radius r < ‖t‖ is w = r·t/‖t‖, so dw/dr = t/‖t‖.
    condition = bl.Projected(
        lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2),
        bl.jaxopt_projection("projection_l2_ball", lambda t, d: t),
    )
    out = hypergradient(condition, jnp.array(0.8), outer=lambda w, theta, data: WEIGHTS @ w)
    np.testing.assert_allclose(out.gradient, WEIGHTS @ TARGET / np.linalg.norm(TARGET), rtol=1e-13)


@pytest.mark.parametrize("per_feature", [False, True])
def test_the_lasso_has_a_closed_form_on_its_support(per_feature):
    # On the support S with signs s, w_S is a constant minus H_SS⁻¹(λs)_S with H = MATRIX: dw_S/dλ = −H_SS⁻¹s_S.
    condition = bl.ProximalGradient(objective, bl.jaxopt_prox("prox_lasso", lambda t, d: jnp.exp(t)), STEP)
    theta = jnp.log(jnp.array([0.3, 0.8, 0.2, 0.4])) if per_feature else jnp.log(jnp.array(1.3))
    out = hypergradient(condition, theta)
    w = np.asarray(out.inner.w)
    support = np.flatnonzero(w)
    assert 0 < support.size < 4
    inverse = np.linalg.inv(MATRIX[np.ix_(support, support)])
    jacobian = np.zeros((4, 4))
    jacobian[np.ix_(support, support)] = -inverse * (np.sign(w) * np.exp(theta))[support]
    slopes = (WEIGHTS + 0.6 * w) @ jacobian
    np.testing.assert_allclose(out.gradient, slopes if per_feature else slopes.sum(), rtol=1e-10, atol=1e-12)


PENALTIES = {
    "prox_none": lambda t: None,
    "prox_lasso": lambda t: jnp.exp(t[0]),
    "prox_non_negative_lasso": lambda t: jnp.exp(t[0]),
    "prox_elastic_net": lambda t: (jnp.exp(t[0]), jnp.exp(t[1])),
    "prox_group_lasso": lambda t: jnp.exp(t[0]),
    "prox_ridge": lambda t: jnp.exp(t[0]),
    "prox_non_negative_ridge": lambda t: jnp.exp(t[0]),
    "make_prox_from_projection": lambda t: jnp.exp(t[0]),
}


def prox_or_name(name):
    if name != "make_prox_from_projection":
        return name
    return jaxopt.prox.make_prox_from_projection(jaxopt.projection.projection_l2_ball)


def test_the_table_holds_every_prox_of_jaxopt():
    assert set(PENALTIES) == {name for name in dir(jaxopt.prox) if name.startswith(("prox_", "make_prox"))}


@pytest.mark.slow("compiles each proximal operator with differences", fast="prox_lasso")
@pytest.mark.parametrize("name", PENALTIES)
def test_a_prox_is_differentiated_in_its_penalty_and_in_the_objective(name):
    prox = bl.jaxopt_prox(prox_or_name(name), params=lambda theta, data: PENALTIES[name](theta))
    condition = bl.ProximalGradient(lambda w, theta, data: objective(w, theta, data * (1 + 0.1 * theta[1])), prox, STEP)
    theta, step = jnp.array([-1.0, 0.3]), 1e-5
    out = hypergradient(condition, theta)

    @jax.jit
    @jax.vmap
    def value(theta):
        return outer(SOLVER(condition, jnp.zeros(4), theta, jnp.asarray(TARGET)).w, theta, None)

    ahead, behind = (value(theta + sign * step * jnp.eye(2)) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(out.gradient, expected, rtol=1e-6, atol=1e-8)
    is_large = np.abs(out.gradient) > 1e-4  # far above the tolerance of the comparison
    assert is_large[1] and is_large[0] == (name != "prox_none")


def test_the_lasso_with_a_penalty_for_each_feature_agrees_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    x, theta = rng.normal(size=(40, 4)), np.log([0.1, 0.9, 0.3, 0.2])
    y = x @ TARGET + 0.1 * rng.normal(size=40)

    def by_coordinates(theta):  # the columns are divided by their penalties, so that each penalty is 1
        lasso = sklearn.Lasso(alpha=1.0, fit_intercept=False, tol=1e-12, max_iter=100_000)
        return lasso.fit(x / np.exp(theta), y).coef_ / np.exp(theta)

    prox = bl.jaxopt_prox("prox_lasso", lambda theta, data: jnp.exp(theta))
    condition = bl.ProximalGradient(lambda w, theta, data: 0.5 * jnp.mean((x @ w - y) ** 2), prox, 0.3)
    out = hypergradient(condition, jnp.asarray(theta))
    np.testing.assert_allclose(out.inner.w, by_coordinates(theta), atol=1e-5)  # scikit-learn's error is about 1e-6
    assert 0 < np.count_nonzero(out.inner.w) < 4
    # On a fixed support w is affine in exp(θ). The step is large, because central differences divide scikit-learn's
    # error by it.
    expected = central_differences(lambda theta: outer(by_coordinates(theta), None, None), theta, step=1e-2)
    np.testing.assert_allclose(out.gradient, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow("solves a logistic regression for each difference")
def test_a_logistic_penalty_for_each_feature_agrees_with_central_differences():
    x = np.random.default_rng(2).normal(size=(30, 4))
    y = np.where(x @ WEIGHTS > 0, 1.0, -1.0)

    def logistic(w, theta, data):
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)

    theta = jnp.array([-1.0, 0.5, 0.0, -2.0])
    condition = bl.Stationary(logistic)

    def value(theta):
        return outer(newton(condition, jnp.zeros(4), theta, None), theta, None)

    out = hypergradient(condition, theta, solver=newton, linear=bl.CG(8))
    expected = central_differences(value, theta)
    np.testing.assert_allclose(out.gradient, expected, rtol=1e-6)


# min ½xᵀQx + cᵀx subject to Ax = b, Gx ≤ h, with one inequality active and one not.
PROGRAM = {
    "Q": MATRIX,
    "c": np.array([-1.0, 0.5, 0.2, -2.0]),
    "A": np.array([[1.0, 1.0, 1.0, 1.0]]),
    "b": np.array([1.0]),
    "G": np.array([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]),
    "h": np.array([0.3, 50.0]),
}
START = (np.zeros(4), np.zeros(1), np.zeros(2))


def quadratic_program(inequalities=2):
    return bl.KKT(
        lambda x, p, data: 0.5 * x @ p["Q"] @ x + p["c"] @ x,
        equality=lambda x, p, data: p["A"] @ x - p["b"],
        inequality=lambda x, p, data: (p["G"] @ x - p["h"])[:inequalities],
    )


def by_active_set(p):
    """Return the solution x, ν and μ of the program ``p``. Its active inequality is taken as an equality."""
    rows = jnp.concatenate([p["A"], p["G"][:1]])
    x, multipliers = minimum_on_plane(0.5 * (p["Q"] + p["Q"].T), -p["c"], rows, jnp.concatenate([p["b"], p["h"][:1]]))
    return x, multipliers[:1], jnp.append(multipliers[1:], 0.0)


@pytest.mark.slow("differentiates in each matrix of a quadratic program")
def test_a_quadratic_program_is_differentiated_in_all_its_data():
    theta = jax.tree.map(jnp.asarray, PROGRAM)
    solution = by_active_set(theta)
    assert float(solution[2][0]) > 0.1
    problem = bl.Problem(quadratic_program(), lambda w, theta, data: outer(w[0], theta, data))
    solver = bl.Jaxopt("OSQP", tol=1e-12, maxiter=20000)
    out = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()), on_failure="ignore")(theta, START, None)
    expected = jax.grad(lambda p: outer(by_active_set(p)[0], p, None))(theta)
    np.testing.assert_allclose(out.inner.w[0], solution[0], atol=1e-10)
    for name, value in expected.items():
        # OSQP stops at residuals near 1e-12. The condition number of the KKT system, below 1e3, magnifies them.
        np.testing.assert_allclose(out.gradient[name], value, atol=1e-8, err_msg=name)


def test_a_constraint_without_its_multiplier_is_refused_with_a_hint():
    condition = bl.KKT(lambda x, theta, data: jnp.sum(x**2), equality=lambda x, theta, data: x[:2] - theta)
    with pytest.raises(ValueError, match="or start the solver with one multiplier for each constraint"):
        condition.residual((jnp.ones(3), (), None), 1.0, None)


@pytest.mark.slow("compiles two derivatives of a KKT point")
def test_an_inactive_inequality_leaves_the_derivative_unchanged():
    theta = {key: jnp.asarray(value) for key, value in PROGRAM.items()}
    gradients = []
    for count in (1, 2):

        def known(condition, init, theta, data, count=count):
            x, equal, unequal = by_active_set(theta)
            return x, equal, unequal[:count]

        problem = bl.Problem(quadratic_program(count), lambda w, theta, data: outer(w[0], theta, data))
        function = bl.value_and_hypergradient(problem, known, bl.Implicit(bl.LU()))
        gradients.append(function(theta, (jnp.zeros(4), jnp.zeros(1), jnp.zeros(count)), None).gradient)
    for name in theta:
        np.testing.assert_allclose(gradients[0][name], gradients[1][name], atol=1e-12, err_msg=name)


def test_kkt_refuses_a_w_that_is_not_a_triple():
    with pytest.raises(ValueError, match=r"needs w = \(x, ν, μ\), got"):
        quadratic_program().residual((jnp.zeros(4), None, jnp.zeros(2)), PROGRAM, None)


class Triple(NamedTuple):
    x: object
    equal: object
    unequal: object


@pytest.mark.slow("compiles a quadratic program on a named tuple")
def test_kkt_keeps_a_named_tuple():
    def known(condition, init, theta, data):  # the solution is x = θ − ν, with the ν for which Σx = 1
        force = (jnp.sum(theta) - 1) / 2
        parts = (theta - force, force, None)
        return Triple(*parts) if isinstance(init, Triple) else parts

    condition = bl.KKT(
        lambda x, theta, data: 0.5 * jnp.sum((x - theta) ** 2), equality=lambda x, theta, data: jnp.sum(x) - 1
    )
    problem = bl.Problem(condition, lambda w, theta, data: w.x[0] ** 2 if isinstance(w, Triple) else w[0][0] ** 2)
    function = bl.value_and_hypergradient(problem, known, bl.Implicit(bl.LU()))
    for start in (Triple(jnp.zeros(2), 0.0, None), (jnp.zeros(2), 0.0, None)):
        out = function(jnp.array([3.0, 0.5]), start, None)
        np.testing.assert_allclose(out.gradient, [1.75, -1.75], rtol=1e-14)  # x₀ = (θ₀ − θ₁ + 1)/2
        assert isinstance(out.inner.w, type(start))


def test_a_centre_with_another_tree_structure_is_refused_with_a_remedy():
    condition = bl.Proximal(lambda w, theta, data: jnp.sum(w**2), 1.0)
    for function in (condition.residual, condition.potential):
        with pytest.raises(ValueError, match=r"needs a centre .* got .*'log'.*: pass center"):
            function(jnp.zeros(2), {"w": jnp.zeros(2), "log": 0.0}, None)


def test_strengths_with_another_tree_structure_than_w_are_refused():
    condition = bl.Proximal(lambda w, theta, data: jnp.sum(w**2), lambda theta, data: {"a": 1.0, "b": 2.0})
    for function in (condition.residual, condition.potential):
        with pytest.raises(
            ValueError, match=r"needs a strength that is a scalar or has the tree structure of w, .*'b'"
        ):
            function(jnp.zeros(2), jnp.zeros(2), None)


@pytest.mark.slow("compiles a nested hypergradient")
def test_a_problem_of_three_levels_has_a_closed_form():
    # The lowest solution is u(v) = vθ. The middle one is v = argmin ½(v − θ²)² + ½(v − 2u(v))² = θ²/(1 + (1 − 2θ)²).
    # The outer value is v².
    lowest = bl.Stationary(lambda u, upper, data: 0.5 * (u - upper["v"] * upper["theta"]) ** 2)
    low = bl.implicit_layer(lowest, bl.GradientDescent(1.0, 1), bl.CG(1))

    def middle(v, theta, data):
        u = low({"v": v, "theta": theta}, jnp.zeros(()), None)
        return 0.5 * (v - theta**2) ** 2 + 0.5 * (v - 2 * u) ** 2

    problem = bl.Problem(bl.Stationary(middle), lambda v, theta, data: v**2)
    out = bl.value_and_hypergradient(problem, newton, bl.Implicit(bl.CG(2)))(0.7, jnp.zeros(()), None)

    def exact(theta):
        return theta**2 / (1 + (1 - 2 * theta) ** 2)

    np.testing.assert_allclose(out.inner.w, exact(0.7), rtol=1e-13)
    np.testing.assert_allclose(out.gradient, jax.grad(lambda t: exact(t) ** 2)(0.7), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.Proximal(objective, 0.0), "above 0, got 0.0; .*Stationary"),
        (lambda: bl.Stationary(objective, strong_convexity=-1.0), "above 0, got -1.0; leave it None"),
        (lambda: bl.Root(objective, strong_convexity=0.0), "above 0, got 0.0"),
        (lambda: bl.Projected(objective, objective, 0.0), "step_size above 0, got 0.0"),
        (lambda: bl.jaxopt_projection("projection_moon"), "no 'projection_moon'; it has .*projection_simplex"),
        (lambda: bl.jaxopt_prox("prox_moon"), "no 'prox_moon'; it has .*prox_lasso"),
    ],
)
def test_invalid_declarations_are_refused_with_a_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
