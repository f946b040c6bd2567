"""The checks of `bilevel.verify` pass right methods and valid points, and name the fault of wrong or invalid ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel.spectrum import ritz_values
from bilevel.verify.comparison import Deviation, Tolerance

NEWTON = problems.newton


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compilation):
    """Skip most optimisations of XLA, because these tests spend nearly all their time in compilation."""


# --- check_hypergradient -------------------------------------------------------------------------------------------


def dense_method(fault="none"):
    """Return a method: the implicit function theorem with dense Jacobians and one planted fault."""

    def method(problem, solver, theta, init, data, linear_init=None):
        inner = bl.solve(solver, problem.condition, init, theta, data)
        w, unravel = ravel_pytree(init if fault == "initial point" else inner.w)
        if fault == "iterate before":
            one_less = replace(solver, max_steps=solver.max_steps - 1)
            w = ravel_pytree(bl.solve(one_less, problem.condition, init, theta, data).w)[0]
        flat_theta, unravel_theta = ravel_pytree(theta)

        def residual(w, theta):
            return ravel_pytree(problem.condition.residual(unravel(w), unravel_theta(theta), data))[0]

        def outer(w, theta):
            return problem.outer(unravel(w), unravel_theta(theta), data)

        a, b = jax.jacrev(residual, (0, 1))(w, flat_theta)
        value, (g, h) = jax.value_and_grad(outer, (0, 1))(w, flat_theta)
        if fault == "λ dropped":
            a = a - problem.condition.strength * jnp.eye(len(a))
        v = jnp.linalg.solve(a if fault == "transpose" else a.T, g)
        v = g / problem.condition.strength if fault == "first order" else v
        gradient = {
            "sign of implicit": h + b.T @ v,
            "sign": b.T @ v - h,
            "direct missing": -(b.T @ v),
            "implicit missing": h,
            "factor": 1.5 * (h - b.T @ v),
            "one entry": (h - b.T @ v).at[0].add(0.01),
        }.get(fault, h - b.T @ v)
        return bl.Hypergradient(value, unravel_theta(gradient), None, inner, None)

    return method


def check(case, method, solver=NEWTON, against=("dense",), **options):
    return bl.check_hypergradient(case.problem, case.theta, case.init, case.data, solver, method, against, **options)


@pytest.mark.slow("compiles every reference")
@pytest.mark.parametrize("name", ["contraction", "affine root", "imaml"])
def test_a_right_method_agrees_with_every_reference(name):
    report = check(problems.CASES[name](), bl.Implicit(bl.LU()), against=("finite_differences", "unrolled", "dense"))
    assert report.ok and [entry.counts for entry in report.comparisons] == [True] * 3
    assert report.verdict == "the gradient agrees with finite_differences and unrolled and dense."
    assert max(len(line) for line in str(report).splitlines()) <= 100


@pytest.mark.slow("compiles a reference once for each planted fault", fast="affine root-transpose-*")
@pytest.mark.parametrize(
    "name, fault, words",
    [
        ("affine root", "sign of implicit", "the sign of the term through w is flipped"),
        ("affine root", "sign", "the sign of the whole gradient is flipped"),
        ("affine root", "transpose", "a transpose is dropped"),
        ("affine root", "direct missing", "the direct term ∂outer/∂θ is missing"),
        ("affine root", "implicit missing", "the term through w is missing"),
        ("affine root", "factor", "the whole gradient is multiplied by 1.5"),
        ("affine root", "one entry", "its formula is wrong"),
        ("imaml", "λ dropped", "dropped from A"),
        ("imaml", "first order", "a first-order approximation"),
    ],
)
def test_the_fault_of_a_wrong_method_is_named(name, fault, words):
    report = check(problems.CASES[name](), dense_method(fault))
    assert not report.ok and words in report.verdict
    assert not report.comparisons[0].agrees


@pytest.mark.slow("compiles a reference for two problems")
def test_the_dense_method_without_a_fault_is_right():
    assert check(problems.affine_root(), dense_method()).ok and check(problems.imaml(), dense_method()).ok


@pytest.mark.slow("compiles a check with differences")
def test_the_worst_coordinate_and_both_numbers_are_named():
    case = problems.affine_root()
    (entry,) = check(case, dense_method("one entry")).comparisons
    exact = float(case.gradient["a"][0])
    assert entry.worst == "theta['a'][0]" and entry.error == pytest.approx(0.01, rel=1e-6)
    assert entry.theirs == pytest.approx(exact) and entry.ours == pytest.approx(exact + 0.01)


def quartic():
    """Return the case w³ = θ. The formula of the implicit function theorem depends on w, so an inexact w shows."""
    condition = bl.Stationary(lambda w, theta, data: jnp.sum(0.25 * w**4 - theta * w))
    return problems.Case(
        condition, lambda w, theta, data: jnp.sum(w), jnp.array([2.0, 3.0]), jnp.ones(2), None, lambda t, d: t, 1.0
    )


@pytest.mark.slow("compiles the references for several methods")
def test_an_unsolved_inner_problem_is_distinguished_from_a_wrong_formula():
    few = bl.GradientDescent(0.1, 3)
    all_references = ("finite_differences", "unrolled", "dense")
    unsolved = check(quartic(), bl.Implicit(bl.CG(2)), few, all_references)
    assert not unsolved.ok and unsolved.verdict.startswith("the formula is right and the inner problem is not solved")
    assert "not counted" in str(unsolved)  # unrolled differentiates steps that have not converged
    unrolled = check(quartic(), bl.Unrolled(), few, all_references)
    assert not unrolled.ok and unrolled.verdict.startswith("this is the derivative of the solver's steps")
    assert check(quartic(), bl.Unrolled(), few, ("unrolled",)).ok
    stale = check(quartic(), dense_method("iterate before"), few)
    assert not stale.ok and "evaluated at the iterate before the last" in stale.verdict
    start = check(quartic(), dense_method("initial point"))
    assert not start.ok and "evaluated at the initial point" in start.verdict


@pytest.mark.slow("compiles every reference")
def test_an_unfinished_linear_solve_is_distinguished_from_a_wrong_formula():
    case = problems.quadratic()
    truncated = check(case, bl.Implicit(bl.CG(1)))
    assert not truncated.ok and "the linear solve is not finished" in truncated.verdict


@pytest.mark.slow("compiles a reference for several solvers")
def test_an_error_within_a_tol_that_was_met_is_allowed():
    """With tol=1e-3 an error of that size is allowed. Without a tol the same number of steps fails the check."""
    with_tol = check(quartic(), bl.Implicit(bl.CG(2)), bl.GradientDescent(0.1, 500, tol=1e-3))
    assert with_tol.ok and with_tol.comparisons[0].error > 1e-6
    steps = int(with_tol.out.inner.steps)
    assert not check(quartic(), bl.Implicit(bl.CG(2)), bl.GradientDescent(0.1, steps)).ok
    assert check(quartic(), bl.Implicit(bl.CG(2)), bl.GradientDescent(0.1, steps), rtol=1e-2).ok


@pytest.mark.slow("compiles methods in float32 and a reference in float64")
def test_float32_is_judged_by_its_own_precision():
    case = problems.ridge()
    with jax.enable_x64(False):
        narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (case.theta, case.init, case.data))
        outer = lambda w, theta, data: jnp.sum((w - jnp.array([0.5, -0.2, 0.1])) ** 2)  # noqa: E731
        problem = bl.Problem(case.condition, outer)
        found = [bl.check_hypergradient(problem, *narrow, NEWTON, m, ("dense",)) for m in (bl.Implicit(bl.LU()),
                 dense_method("factor"))]  # fmt: skip
    assert found[0].ok and found[0].out.gradient.dtype == jnp.float32
    assert 1e-9 < found[0].comparisons[0].error < 1e-6
    assert not found[1].ok


@pytest.mark.slow("differentiates along many directions")
def test_a_large_theta_is_compared_along_directions():
    condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - jnp.mean(jnp.sin(theta["x"]))) ** 2))
    problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w**3))
    arguments = problem, {"x": jnp.linspace(0.0, 1.0, 100)}, jnp.zeros(2), None, NEWTON
    right = bl.check_hypergradient(*arguments, dense_method(), ("finite_differences",))
    assert right.ok and len(right.derivatives) == 8
    length = float(jnp.linalg.norm(right.out.gradient["x"]))
    assert right.derivatives[0] == pytest.approx(length)  # the first direction is the gradient's own
    assert not bl.check_hypergradient(*arguments, dense_method("factor"), ("finite_differences",)).ok


def test_a_gradient_without_an_available_reference_is_not_ok():
    """The Hessian is singular, so the dense reference has an infinite uncertainty."""
    condition = bl.Stationary(lambda w, theta, data: 0.5 * (jnp.sum(w) - theta) ** 2)
    problem = bl.Problem(condition, lambda w, theta, data: w[0])
    arguments = problem, 1.0, jnp.zeros(2), None, bl.GradientDescent(0.5, 2)
    report = bl.check_hypergradient(*arguments, dense_method("implicit missing"), ("dense",))
    assert not report.ok and "no reference is available" in report.verdict and "singular" in str(report)


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match=r"finite_differences, unrolled, dense, got \('sense',\)"):
        check(quartic(), bl.Implicit(bl.CG(2)), against=("sense",))


# --- The comparison that checks and assertions share ---------------------------------------------------------------


def test_the_worst_entry_is_the_one_furthest_off_in_units_of_what_is_allowed():
    """Entry b has the larger error, but its uncertainty allows for that."""
    got, expected, uncertainty = np.array([1.2, 2.25]), np.array([1.0, 2.0]), np.array([0.0, 0.1])
    found = Deviation(("a", "b"), got, expected, uncertainty, Tolerance(rtol=0.09))
    assert found.decided and not found.agrees and found.off.tolist() == [True, False] and found.worst == 0
    assert found.mismatch("w", "dense").startswith("w is wrong at a: got 1.2, expected 1.0 (dense), relative error 0.1")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_never_agree(number):
    found = Deviation(("a",), np.array([number]), np.array([np.inf]), np.zeros(1), Tolerance(rtol=0.1))
    assert not found.agrees and found.worst == 0 and found.relative_error == np.inf


# --- check_condition -----------------------------------------------------------------------------------------------


def failed(report):
    return [row.name for row in report.checks if not row.ok]


def stationary(objective, outer=lambda w, theta, data: jnp.sum(w**2)):
    return bl.Problem(bl.Stationary(objective), outer)


@pytest.mark.slow("compiles every check for each problem", fast=("quadratic", "imaml"))
@pytest.mark.parametrize("name", problems.CASES)
def test_every_check_passes_at_the_solution_of_a_smooth_problem(name):
    case = problems.CASES[name]()
    w = case.exact(case.theta, case.data)
    report = bl.check_condition(case.problem, case.theta, w, case.data)
    assert report.ok and report["kinks"].value == np.inf
    assert max(len(line) for line in str(report).splitlines()) <= 110


def test_away_from_the_solution_the_residual_row_fails():
    case = problems.quadratic()
    report = bl.check_condition(case.problem, case.theta, case.init, case.data)
    assert failed(report) == ["residual"] and "residual: solve the inner problem" in str(report)
    far = np.linalg.norm(case.exact(case.theta, case.data))
    assert f"{far:.3g}" in report["residual"].found  # at w = 0 the row shows the distance to the solution


def kinked(activation):
    """Return the problem ½(Σact(w))² + ½‖w − θ‖². With act = ReLU it has a kink where an entry of w is zero."""
    return stationary(lambda w, theta, data: 0.5 * jnp.sum(activation(w)) ** 2 + 0.5 * jnp.sum((w - theta) ** 2))


@pytest.mark.slow("compiles every check twice")
def test_a_kink_is_found_and_its_smooth_variant_is_not():
    """θ is chosen so that w = (0, ½) solves act'(w)·Σact(w) + w − θ = 0."""
    w = jnp.array([0.0, 0.5])
    for activation, has_kink in ((jax.nn.relu, True), (lambda x: jax.nn.softplus(50 * x) / 50, False)):
        problem = kinked(activation)
        theta = problem.condition.residual(w, jnp.zeros(2), None)
        report = bl.check_condition(problem, theta, w, None)
        assert failed(report) == (["kinks"] if has_kink else [])
    assert bl.check_condition(kinked(jax.nn.relu), theta, w + 0.01, None, tol=1.0)["kinks"].ok


def test_a_projection_at_its_bound_is_a_kink():
    clip = bl.Projected(lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2), lambda w, t, d: jnp.maximum(w, 0.0))
    problem = bl.Problem(clip, lambda w, theta, data: jnp.sum(w))
    assert failed(bl.check_condition(problem, jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]), None)) == ["kinks"]
    inside = bl.check_condition(problem, jnp.array([-0.01, 1.0]), jnp.array([0.0, 1.0]), None)
    assert inside.ok and 0.005 < inside["kinks"].value < 1.0  # the value shows how near the bound is


def test_a_false_declaration_of_symmetry_is_found():
    shear = jnp.array([[1.0, 5.0], [0.0, 1.0]])
    for symmetric in (True, False):
        condition = bl.Root(lambda w, theta, data: shear @ w - theta, symmetric=symmetric)
        problem = bl.Problem(condition, lambda w, theta, data: w @ w)
        report = bl.check_condition(problem, jnp.ones(2), jnp.array([-4.0, 1.0]), None)
        assert failed(report) == (["symmetry"] if symmetric else [])


@pytest.mark.parametrize(
    "diagonal, row, words", [([2.0, -1.0, 0.5], "curvature", "more than 1"), ([1.0, 0.0], "curvature", "singular")]
)
def test_an_indefinite_or_singular_operator_is_found(diagonal, row, words):
    curvature = jnp.array(diagonal)
    problem = stationary(lambda w, theta, data: 0.5 * w @ (curvature * w) - theta @ (curvature * w))
    theta = jnp.ones(len(diagonal))
    report = bl.check_condition(problem, theta, theta, None)
    assert failed(report) == [row] and words in report[row].remedy


def test_a_declared_strong_convexity_above_the_curvature_is_found():
    for declared in (2.0, 2.1):
        condition = bl.Stationary(lambda w, theta, data: (w - theta) ** 2, strong_convexity=declared)
        report = bl.check_condition(bl.Problem(condition, lambda w, t, d: w), 1.0, 1.0, None)
        assert failed(report) == ([] if declared == 2.0 else ["strong convexity"])


@pytest.mark.slow("runs every check of a large operator")
def test_the_spectrum_of_a_large_operator_is_estimated_by_lanczos():
    curvature = jnp.linspace(-1.0, 10.0, 1200)
    problem = stationary(lambda w, theta, data: 0.5 * jnp.sum(curvature * (w - theta) ** 2))
    report = bl.check_condition(problem, jnp.ones(()), jnp.ones(1200), None)
    assert failed(report) == ["curvature"] and "Lanczos" in report["curvature"].found
    # Ritz values lie within the spectrum, and 40 steps on an even spectrum come within a few per cent of its ends.
    assert -1.0 <= report["curvature"].value < -0.9


def test_lanczos_finds_the_ends_of_a_spectrum():
    rng = np.random.default_rng(0)
    matrix = problems.symmetric_with([-5.0, *np.linspace(1, 2, 28), 50.0], rng)
    ritz = ritz_values(lambda u: matrix @ u, jnp.zeros(30), 20, jnp.asarray(rng.normal(size=30)))
    np.testing.assert_allclose([ritz[0], ritz[-1]], [-5.0, 50.0], atol=1e-8)


def test_a_theta_that_enters_only_the_initial_point_is_found():
    report = bl.check_condition(stationary(lambda w, theta, data: 0.5 * (w - 1.0) ** 2), 3.0, 1.0, None)
    assert failed(report) == ["θ in the condition"]
    assert "enters only the initial point" in report["θ in the condition"].found
    assert "Unrolled" in report["θ in the condition"].remedy
    with pytest.raises(KeyError, match="the report has no row 'strong convexity': it has leaves, "):
        report["strong convexity"]


def test_an_unused_leaf_and_an_ignored_w_are_found():
    problem = stationary(lambda w, theta, data: 0.5 * (w - theta["a"]) ** 2, outer=lambda w, theta, data: theta["a"])
    report = bl.check_condition(problem, {"a": 1.0, "b": 2.0}, 1.0, None)
    assert failed(report) == ["θ in the condition", "w in outer"]
    assert "theta['b']" in report["θ in the condition"].found
    squared = stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2)
    at_zero = bl.check_condition(squared, 0.0, 0.0, None)
    assert at_zero.ok and "but not nearby" in at_zero["θ in the condition"].found


def test_a_captured_theta_is_found():
    theta = jnp.array([1.0, 2.0])
    problem = stationary(lambda w, ignored, data: 0.5 * jnp.sum((w - theta) ** 2) + 0.0 * jnp.sum(ignored))
    assert "captured θ" in failed(bl.check_condition(problem, theta, theta, None))
    assert "captured θ" not in failed(bl.check_condition(problem, theta + 0.0, theta, None))


def test_complex_integer_and_nonfinite_leaves_are_named():
    problem = stationary(lambda w, theta, data: 0.5 * (w - theta["x"] * theta["n"] - 0.0 * data) ** 2)
    good = {"x": jnp.ones(()), "n": jnp.int32(1)}
    assert "theta['n']" in bl.check_condition(problem, good, 1.0, 0.0)["leaves"].found
    assert failed(bl.check_condition(problem, {**good, "x": jnp.ones((), complex)}, 1.0, 0.0)) == ["leaves"]
    assert failed(bl.check_condition(problem, good, 1.0, jnp.nan)) == ["finite"]
    root = stationary(lambda w, theta, data: 0.5 * (w - jnp.sqrt(theta)) ** 2)
    report = bl.check_condition(root, 0.0, 0.0, None)
    assert failed(report) == ["finite"]  # √θ is finite at 0, but its derivative is not


# --- compare_methods -----------------------------------------------------------------------------------------------


@pytest.mark.slow("compiles four methods, with and without a count of products")
def test_methods_are_measured_and_compared():
    case = problems.quadratic()  # 4 unknowns
    methods = [bl.Implicit(bl.CG(4)), bl.Implicit(bl.LU()), bl.Unrolled(), dense_method("factor")]
    arguments = case.problem, case.theta, case.init, case.data, bl.GradientDescent(0.1, 30)
    found = bl.compare_methods(*arguments, methods, runs=2)
    implicit, lu, unrolled, wrong = found.methods
    exact = np.asarray(case.gradient)
    for row in (implicit, unrolled):
        error = np.linalg.norm(np.asarray(row.out.gradient) - exact) / np.linalg.norm(exact)
        assert row.error == pytest.approx(error, rel=1e-6)
    assert wrong.error == pytest.approx(0.5, abs=0.05) and lu.error == pytest.approx(implicit.error, rel=1e-3)
    # CG takes one product for each of its four iterations, and one for the true residual.
    assert (implicit.products, lu.products, unrolled.products) == (5, None, 30)
    assert all(row.seconds > 0 and row.compile_seconds > 0 and row.steps == 30 for row in found.methods)
    assert found.ok and "dense at the solution" in str(found)
    lines = str(found).splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= 100 and lines[1].startswith("Implicit(CG(4))")


@pytest.mark.slow("compiles a method, with and without a count of products")
def test_a_failed_status_fails_the_comparison():
    case = problems.quadratic()
    solver = bl.GradientDescent(0.1, 2, tol=1e-9)
    arguments = case.problem, case.theta, case.init, case.data, solver
    found = bl.compare_methods(*arguments, [bl.Implicit(bl.CG(4))], runs=1)
    assert not found.ok and "MAX_STEPS" in str(found)
    with pytest.raises(ValueError, match="at least one method"):
        bl.compare_methods(*arguments, [])
