"""Tests of the approximate methods.

A gradient is compared with the closed form of what the method computes, with the exact hypergradient within a stated
error, or with another method that must give the same result.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EIGENVALUES, affine_root, descent_problem, imaml, newton, quadratic, ridge

import bilevel as bl

RATE, STEPS = 0.1, 6
THETA = np.array([0.5, -2.0])
CONTRACTION = 1 - RATE * EIGENVALUES


DESCENTS = pytest.mark.parametrize(
    "solver",
    [bl.GradientDescent(RATE, STEPS), bl.GradientDescent(RATE, STEPS, momentum=0.5), bl.Optax(optax.sgd(RATE), STEPS)],
    ids=["gd", "momentum", "optax"],
)


def gradient(problem, solver, method, theta, init=None, data=None):
    init = jnp.zeros(2) if init is None else init
    return bl.value_and_hypergradient(problem, solver, method)(jax.tree.map(jnp.asarray, theta), init, data)


@pytest.mark.slow("compiles each solver in both modes", fast=("gd-zero", "optax-theta"))
@pytest.mark.parametrize("init", [np.zeros(2), bl.identity_center], ids=["zero", "theta"])
@DESCENTS
def test_forward_and_backward_unrolling_give_the_same_gradient(solver, init):
    forward = gradient(descent_problem(), solver, bl.ForwardUnrolled(), THETA, init)
    backward = gradient(descent_problem(), solver, bl.Unrolled(), THETA, init)
    np.testing.assert_allclose(forward.gradient, backward.gradient, rtol=1e-13)
    np.testing.assert_allclose(forward.value, backward.value, rtol=1e-14)


@pytest.mark.slow("compiles each solver with and without checkpoints", fast=("gd-False", "momentum-True"))
@pytest.mark.parametrize("checkpoint", [False, True])
@DESCENTS
def test_first_order_unrolling_differentiates_the_start_only(solver, checkpoint):
    method = bl.Unrolled(first_order=True, checkpoint=checkpoint)
    from_theta = gradient(descent_problem(), solver, method, THETA, bl.identity_center)
    np.testing.assert_allclose(
        from_theta.gradient, from_theta.inner.w, rtol=1e-14
    )  # ∂outer/∂w = w, and dw/dinit counts as I
    full = gradient(descent_problem(), solver, bl.Unrolled(), THETA, bl.identity_center)
    np.testing.assert_array_equal(from_theta.inner.w, full.inner.w)
    assert np.abs(full.gradient - from_theta.gradient).max() > 0.01
    # The θ of the inner objective contributes nothing. The θ of the outer function keeps its direct derivative.
    problem = bl.Problem(descent_problem().condition, lambda w, theta, data: w @ w + theta @ theta)
    np.testing.assert_allclose(gradient(problem, solver, method, THETA).gradient, 2 * THETA, rtol=1e-14)


def test_forward_unrolling_allows_a_tol():
    out = gradient(descent_problem(), bl.GradientDescent(0.4, 500, tol=1e-12), bl.ForwardUnrolled(), THETA)
    np.testing.assert_allclose(out.gradient, THETA / EIGENVALUES**2, rtol=1e-10)
    assert int(out.status) == bl.Status.CONVERGED


@pytest.mark.slow("compiles unrolled fixed-point iterations")
@pytest.mark.parametrize("solver", [bl.FixedPointIteration(5), bl.Anderson(4, history=1)], ids=["plain", "anderson"])
def test_fixed_point_solvers_are_unrolled(solver):
    problem = bl.Problem(
        bl.FixedPoint(lambda w, theta, data: 0.3 * jnp.cos(w) + theta), lambda w, theta, data: jnp.sum(w**2)
    )
    out = gradient(problem, solver, bl.Unrolled(), THETA)
    forward = gradient(problem, solver, bl.ForwardUnrolled(), THETA)
    # Anderson divides by ‖ΔF‖², where ΔF is the last change of the residual. After four steps ‖ΔF‖ has shrunk by the
    # factor 0.3⁴, which leaves an error of eps·0.3⁻⁸.
    np.testing.assert_allclose(out.gradient, forward.gradient, rtol=100 * 2.2e-16 * 0.3**-8)
    w = out.inner.w
    exact = 2 * w / (1 + 0.3 * np.sin(w))
    if isinstance(solver, bl.FixedPointIteration):  # each step contracts by 0.3
        np.testing.assert_allclose(out.gradient, exact, rtol=0.3**5 * 10)


def test_one_step_is_the_derivative_of_one_step_at_the_solution():
    out = gradient(descent_problem(), bl.GradientDescent(RATE, STEPS), bl.OneStep(), THETA)
    w = (1 - CONTRACTION**STEPS) / EIGENVALUES * THETA
    np.testing.assert_allclose(out.gradient, RATE * w, rtol=1e-13)
    problem = bl.Problem(bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta**2), lambda w, theta, data: w @ theta)
    out = gradient(problem, bl.Anderson(20, tol=1e-12), bl.OneStep(), THETA)
    w = 2 * THETA**2
    np.testing.assert_allclose(out.gradient, w + 2 * THETA * THETA, rtol=1e-10)


def test_first_order_on_a_proximal_problem_is_first_order_maml():
    case = imaml()
    out = gradient(case.problem, newton, bl.FirstOrder(), case.theta, case.init, case.data)
    w = case.exact(case.theta, case.data)
    expected = jax.grad(case.outer)(w, case.theta, case.data)
    for name in expected:
        np.testing.assert_allclose(out.gradient[name], expected[name], rtol=case.tolerance)


def test_first_order_on_a_mapping_replaces_the_matrix_by_the_identity():
    problem = bl.Problem(bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta**2), lambda w, theta, data: w @ theta)
    out = gradient(problem, bl.FixedPointIteration(80), bl.FirstOrder(), THETA)
    np.testing.assert_allclose(out.gradient, 2 * THETA**2 + 2 * THETA * THETA, rtol=1e-12)


@pytest.mark.slow("compiles for each problem")
@pytest.mark.parametrize("make", [ridge, quadratic, imaml])
def test_finite_differences_of_gradients_have_an_error_of_the_documented_order(make):
    case = make()
    out = gradient(case.problem, newton, bl.FiniteDifference(bl.CG(5)), case.theta, case.init, case.data)
    expected = jax.flatten_util.ravel_pytree(case.gradient)[0]
    # The bound is the documented error, eps^⅔ = 4e-11, times κ and a factor of 100 for the third derivative.
    actual = jax.flatten_util.ravel_pytree(out.gradient)[0]
    bound = 4e-11 * 100 * case.kappa * float(jnp.linalg.norm(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)
    assert bl.Status(int(out.status)).ok


def test_one_neumann_term_by_differences_is_darts():
    out = gradient(descent_problem(), bl.GradientDescent(RATE, STEPS), bl.FiniteDifference(bl.Neumann(1, RATE)), THETA)
    w = (1 - CONTRACTION**STEPS) / EIGENVALUES * THETA
    np.testing.assert_allclose(out.gradient, RATE * w, rtol=1e-8)


@pytest.mark.parametrize("penalty", [1.0, 10.0, 1e4])
def test_the_gradient_of_the_value_penalty_has_a_closed_form(penalty):
    # The minimum of the objective is w* = D⁻¹θ. The minimum of objective + outer/ρ is w_ρ = (D + I/ρ)⁻¹θ. The
    # objective's derivative in θ is −w, so the gradient is ρ(w* − w_ρ). For a large ρ it tends to D⁻²θ.
    solver = bl.GradientDescent(0.4, 2000, tol=1e-14)
    out = gradient(descent_problem(), solver, bl.ValuePenalty(penalty), THETA)
    expected = penalty * (THETA / EIGENVALUES - THETA / (EIGENVALUES + 1 / penalty))
    np.testing.assert_allclose(out.gradient, expected, rtol=1e-12 * max(penalty, 10.0))
    np.testing.assert_allclose(out.gradient, THETA / EIGENVALUES**2, rtol=1.1 / penalty)
    assert int(out.status) == bl.Status.CONVERGED


def test_a_failed_second_solve_of_the_value_penalty_is_reported():
    inner = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2))
    problem = bl.Problem(inner, lambda w, theta, data: -jnp.sum(w**2))  # objective + outer/ρ has no minimum
    function = bl.value_and_hypergradient(
        problem, bl.GradientDescent(0.5, 50, tol=1e-9), bl.ValuePenalty(1.0), "ignore"
    )
    assert int(function(jnp.ones(2), jnp.zeros(2), None).status) == bl.Status.MAX_STEPS


def test_evolution_strategies_in_a_full_basis_are_exact_on_a_quadratic():
    def black_box(condition, init, theta, data):
        return jax.pure_callback(lambda t: np.asarray(t) / EIGENVALUES, jax.ShapeDtypeStruct((2,), np.float64), theta)

    out = gradient(descent_problem(), black_box, bl.EvolutionStrategies(pairs=5, scale=0.1), THETA)
    np.testing.assert_allclose(out.gradient, THETA / EIGENVALUES**2, rtol=1e-13)


@pytest.mark.slow("compiles the method with forty seeds")
def test_evolution_strategies_with_few_pairs_are_unbiased():
    solver = lambda condition, init, theta, data: theta / EIGENVALUES  # noqa: E731

    @jax.jit
    def average(theta):
        seeds = range(40)
        methods = [bl.EvolutionStrategies(pairs=1, scale=0.1, seed=seed) for seed in seeds]
        return jnp.stack([m(descent_problem(), solver, theta, jnp.zeros(2), None).gradient for m in methods])

    samples, exact = np.asarray(average(jnp.asarray(THETA))), THETA / EIGENVALUES**2
    standard_error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - exact) < 4 * standard_error)
    assert np.all(standard_error > 0)


@pytest.mark.slow("compiles each method under vmap")
def test_methods_return_aux_and_work_under_vmap():
    case = ridge()
    problem = bl.Problem(case.condition, lambda w, theta, data: (case.outer(w, theta, data), w), has_aux=True)
    solver = bl.GradientDescent(0.3, 20)
    methods = [bl.ForwardUnrolled(), bl.OneStep(), bl.FiniteDifference(bl.CG(3)), bl.ValuePenalty(10.0)]
    for method in [*methods, bl.EvolutionStrategies(1)]:
        function = bl.value_and_hypergradient(problem, solver, method, on_failure="ignore")
        out = jax.vmap(lambda theta, f=function: f(theta, case.init, case.data))(jnp.array([0.5, 0.7]))
        np.testing.assert_allclose(out.aux, out.inner.w)
        single = function(0.7, case.init, case.data)
        np.testing.assert_allclose(out.gradient[1], single.gradient, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.FiniteDifference(bl.CG(3), step=0.0), "step above 0, got 0.0"),
        (lambda: bl.FiniteDifference(bl.LU()), "CG or Neumann, got LU"),
        (lambda: bl.ValuePenalty(0.0), "above 0, got 0.0"),
        (lambda: bl.EvolutionStrategies(0), "pairs of at least 1 .* got 0"),
    ],
)
def test_invalid_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (bl.FiniteDifference(bl.CG(3)), "Root is not the gradient of one: use Stationary, Proximal or LeastSquares"),
        (bl.ValuePenalty(1.0), "Root is not the gradient of one: use Stationary, Proximal or LeastSquares"),
        (bl.FirstOrder(), "use it with Proximal, FixedPoint, Projected"),
        (bl.OneStep(), "use GradientDescent, FixedPointIteration or Anderson"),
    ],
)
def test_an_unsupported_condition_or_solver_is_refused_with_alternatives(method, message):
    case = affine_root()
    with pytest.raises(ValueError, match=message):
        gradient(case.problem, newton, method, case.theta, case.init, case.data)
