"""Certificates agree with closed forms: the estimate, the bound, the correction, the kind and the findings."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import CASES

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = float(np.finfo(np.float64).eps)
ROOT = Path(__file__).parents[2]
KINDS = bl.CertificateKind


@functools.cache
def case_of(name):
    return CASES[name]()


def norm(tree):
    return float(jnp.linalg.norm(ravel_pytree(tree)[0]))


def distance(a, b):
    return norm(jax.tree.map(jnp.subtract, a, b))


def result_at(problem, w, theta, data, adjoint=None, gradient=None):
    """Return the `Hypergradient` of an exact method at w. A given adjoint or gradient replaces the exact one."""
    value, (g, h) = jax.value_and_grad(problem.outer, (0, 1))(w, theta, data)
    residual, pull_back = jax.vjp(lambda w, theta: problem.condition.residual(w, theta, data), w, theta)
    if adjoint is None:
        flat, unravel = ravel_pytree(w)
        matrix = jax.jacobian(lambda flat: ravel_pytree(problem.condition.residual(unravel(flat), theta, data))[0])(
            flat
        )
        adjoint = unravel(jnp.linalg.solve(matrix.T, ravel_pytree(g)[0]))
    if gradient is None:
        gradient = jax.tree.map(jnp.subtract, h, pull_back(adjoint)[1])
    zero = jnp.int32(0)
    info = bl.LinearInfo(adjoint, jnp.zeros(()), zero, zero)
    return bl.Hypergradient(
        value, gradient, None, bl.Solution(w, jnp.linalg.norm(ravel_pytree(residual)[0]), zero, zero), info
    )


def perturbed(tree, amount, seed=0):
    flat, unravel = ravel_pytree(tree)
    return unravel(flat + amount * np.random.default_rng(seed).normal(size=flat.size))


@functools.cache
def quadratic_everywhere(name):
    """Return two things: a problem with the case's condition and the outer function ½‖w‖², and the case itself.

    The gradient of this outer function is affine in w.
    """
    case = case_of(name)

    def outer(w, theta, data):
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))

    return bl.Problem(case.condition, outer), case


@pytest.mark.slow("compiles a certificate for each problem")
@pytest.mark.parametrize("name", CASES)
def test_the_error_after_correction_is_of_second_order_in_the_perturbation(name):
    """w and the adjoint are perturbed by a size δ. The gradient's error is then O(δ), and O(δ²) after the correction.

    The residual and ∂outer/∂w are affine in w, so the Newton step in w is exact. The remaining error
    is a product of the errors of w and of the adjoint.
    """
    problem, case = quadratic_everywhere(name)
    exact = jax.grad(lambda theta: problem.outer(case.exact(theta, case.data), theta, case.data))(case.theta)
    errors, corrected, first_order = [], [], []
    for amount in (1e-2, 1e-3, 1e-4, 1e-5):
        w = perturbed(case.exact(case.theta, case.data), amount)
        adjoint = perturbed(result_at(problem, w, case.theta, case.data).linear.solution, amount, seed=1)
        certificate = bl.certify(
            problem, case.theta, out := result_at(problem, w, case.theta, case.data, adjoint), case.data
        )
        errors.append(distance(out.gradient, exact))
        corrected.append(distance(certificate.gradient, exact))
        first_order.append(float(certificate.estimate))
    floor = 1000 * EPS * case.kappa**2 * (1 + norm(exact))
    # The estimate's relative error is of the order of the perturbation, 1e-5, times a constant of the problem.
    assert errors[-1] == pytest.approx(first_order[-1], rel=0.05)
    # If the perturbation is 10 times smaller, so is the error, and the error after the correction is 100 times smaller.
    for k in range(3):
        assert 5 < errors[k] / errors[k + 1] < 20
        assert corrected[k + 1] < floor or 50 < corrected[k] / corrected[k + 1] < 200
    if name == "imaml":  # ∂residual/∂θ is constant, so the corrected gradient is exact
        assert max(corrected) < floor


@pytest.mark.slow("compiles a certificate for each number of steps")
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32])
def test_the_bound_covers_the_error_of_too_few_inner_steps(steps):
    """A quadratic's Newton step is exact, so the estimate equals the error, and the bound is at most 1 % above it."""
    problem, case = quadratic_everywhere("imaml")
    out = bl.value_and_hypergradient(
        problem,
        bl.GradientDescent(0.02, steps, tol=1e-9),
        bl.Implicit(bl.CG(3)),
        on_failure="ignore",
    )(case.theta, case.init, case.data)
    assert int(out.status) == bl.Status.MAX_STEPS
    exact = jax.grad(lambda theta: problem.outer(case.exact(theta, case.data), theta, case.data))(case.theta)
    certificate = bl.certify(problem, case.theta, out, case.data, 2.0, bl.Lipschitz(outer_w=1.0, jacobian=0.0))
    error = distance(out.gradient, exact)
    assert int(certificate.kind) == KINDS.CERTIFIED
    assert error <= float(certificate.bound) <= 1.01 * error  # after an exact Newton step only rounding is added
    assert float(certificate.estimate) == pytest.approx(error, rel=1e-9)
    assert distance(certificate.gradient, exact) <= float(certificate.corrected_bound)


@pytest.mark.slow("compiles a certificate for each problem", fast="contraction")
@pytest.mark.parametrize("name", ["affine root", "contraction", "quadratic"])
def test_kantorovich_where_convexity_is_not_declared(name):
    """Where the Jacobian is constant, Kantorovich's condition holds at every w, without a declared convexity."""
    problem, case = quadratic_everywhere(name)
    # In each of these cases ∂residual/∂θ is Lipschitz in w with a constant below 10.
    constants = bl.Lipschitz(outer_w=1.0, jacobian=0.0, mixed=10.0)
    w = perturbed(case.exact(case.theta, case.data), 0.1)
    exact = jax.grad(lambda theta: problem.outer(case.exact(theta, case.data), theta, case.data))(case.theta)
    out = result_at(problem, w, case.theta, case.data)
    certificate = bl.certify(problem, case.theta, out, case.data, lipschitz=constants)
    assert int(certificate.kind) == KINDS.CERTIFIED
    assert not certificate.convex
    assert distance(out.gradient, exact) <= float(certificate.bound)
    assert distance(w, case.exact(case.theta, case.data)) <= float(certificate.inner_error) * (1 + 100 * EPS)


def scalar(coefficient=1.0, **options):
    """Return the problem c·w³/3 + w = θ in one unknown. Its Jacobian is A = 1 + c·w², whose derivative is 2c·w."""
    condition = bl.Root(lambda w, theta, data: coefficient * w**3 / 3 + w - theta, **options)
    return bl.Problem(condition, lambda w, theta, data: w)


def certify_scalar(problem, w, theta, *arguments, **options):
    w, theta = jnp.float64(w), jnp.float64(theta)
    return bl.certify(problem, theta, result_at(problem, w, theta, None), None, *arguments, **options)


@pytest.mark.slow("compiles a certificate for each kind")
def test_each_reason_for_a_kind_below_certified():
    cubic, constants = scalar(), bl.Lipschitz(outer_w=0.0, mixed=0.0, jacobian=3.0)
    certified = certify_scalar(cubic, 1.0, 1.3, lipschitz=constants)
    assert int(certified.kind) == KINDS.CERTIFIED
    assert not certified.probed and certified.ok
    estimated = certify_scalar(cubic, 1.0, 1.3)
    assert int(estimated.kind) == KINDS.ESTIMATED
    assert estimated.probed == ("outer_w", "jacobian", "adjoint", "mixed")
    assert "Probed at one point" in " ".join(estimated.reasons)

    unproved = certify_scalar(cubic, 3.0, 0.1, lipschitz=bl.Lipschitz(outer_w=0.0, mixed=0.0, jacobian=60.0))
    assert int(unproved.kind) == KINDS.INVALID and not np.isfinite(unproved.bound)
    assert int(unproved.findings) & bl.Finding.UNPROVED
    nonlinear = certify_scalar(cubic, 3.0, 0.1, 1.0)
    assert int(nonlinear.kind) == KINDS.INVALID and not bool(nonlinear.first_order)
    disproved = certify_scalar(scalar(-1.0), 1.0, 0.7, 0.5, bl.Lipschitz(outer_w=0.0, mixed=0.0, jacobian=0.0))  # A = 0
    assert int(disproved.kind) == KINDS.INVALID and int(disproved.findings) & bl.Finding.CURVATURE
    indefinite = certify_scalar(scalar(-1.0, positive_definite=True), 2.0, -0.6, lipschitz=constants)  # A = −3
    assert int(indefinite.kind) == KINDS.INVALID and int(indefinite.findings) & bl.Finding.CURVATURE
    nonfinite = certify_scalar(cubic, np.nan, 0.1, 1.0, constants)
    assert int(nonfinite.kind) == KINDS.INVALID and int(nonfinite.findings) & bl.Finding.NONFINITE
    for certificate in (unproved, nonlinear, disproved, indefinite, nonfinite):
        assert not certificate.ok and len(certificate.reasons) > 2 and "invalid" in str(certificate)
    singular = certify_scalar(scalar(-1.0), 1.0, 0.7, lipschitz=constants)  # A = 0, no convexity is declared
    assert int(singular.kind) == KINDS.INVALID


@pytest.mark.slow("compiles a certificate")
def test_a_certified_bound_holds_where_the_first_order_test_fails():
    certificate = certify_scalar(scalar(), 3.0, 0.1, 1.0, bl.Lipschitz(outer_w=0.0, mixed=0.0, jacobian=60.0))
    assert int(certificate.kind) == KINDS.CERTIFIED and not bool(certificate.first_order)
    assert "not first order" in str(certificate)
    root = np.roots([1 / 3, 0, 1, -0.1])
    exact = 1 / (1 + float(root[np.abs(root.imag) < 1e-9].real[0]) ** 2)
    assert abs(1 / (1 + 9) - exact) <= float(certificate.bound)


@pytest.mark.slow("compiles four certificates")
def test_the_estimate_covers_unrolled_gradients_and_a_gradient_of_wrong_sign_is_detected():
    problem, case = quadratic_everywhere("affine root")
    exact = jax.grad(lambda theta: problem.outer(case.exact(theta, case.data), theta, case.data))(case.theta)
    w = case.exact(case.theta, case.data)
    wrong = jax.tree.map(jnp.negative, exact)
    flipped = bl.certify(problem, case.theta, result_at(problem, w, case.theta, case.data, gradient=wrong), case.data)
    assert float(flipped.estimate) == pytest.approx(2 * norm(exact), rel=1e-6)
    assert int(flipped.findings) & bl.Finding.OTHER_GRADIENT

    ridge = case_of("ridge")
    unrolled = bl.value_and_hypergradient(ridge.problem, bl.GradientDescent(0.1, max_steps=15), bl.Unrolled())
    out = unrolled(ridge.theta, ridge.init, ridge.data)
    certificate = bl.certify(ridge.problem, ridge.theta, out, ridge.data)
    assert float(certificate.estimate) == pytest.approx(distance(out.gradient, ridge.gradient), rel=0.2)
    # An unrolled result has no adjoint vector to compare with.
    assert not int(certificate.findings) & bl.Finding.OTHER_GRADIENT
    assert distance(certificate.gradient, ridge.gradient) < 0.2 * distance(out.gradient, ridge.gradient)


@pytest.mark.slow("compiles a certificate with each linear solver")
@pytest.mark.parametrize("linear", [bl.GMRES(20, tol=1e-12), bl.NormalCG(30)], ids=["GMRES", "NormalCG"])
def test_a_linear_solver_replaces_the_factorisation(linear):
    problem, case = quadratic_everywhere("affine root")
    out = result_at(problem, perturbed(case.exact(case.theta, case.data), 0.01), case.theta, case.data)
    dense, free = (bl.certify(problem, case.theta, out, case.data, linear=solver) for solver in (None, linear))
    assert float(free.estimate) == pytest.approx(float(dense.estimate), rel=1e-8)
    assert int(free.kind) == KINDS.ESTIMATED
    with pytest.raises(ValueError, match="symmetric"):
        bl.certify(problem, case.theta, out, case.data, linear=bl.CG(5))


@pytest.mark.slow("compiles a certificate of an inaccurate solve")
def test_inaccurate_linear_solves_are_detected():
    case = case_of("ridge")
    out = result_at(case.problem, perturbed(case.exact(case.theta, case.data), 0.1), case.theta, case.data)
    certificate = bl.certify(case.problem, case.theta, out, case.data, linear=bl.Neumann(1, step_size=1e-3))
    assert int(certificate.findings) & bl.Finding.SLOPPY and int(certificate.kind) == KINDS.INVALID


@pytest.mark.slow("compiles a certificate")
def test_a_bound_holds_however_inaccurate_the_linear_solves_are():
    """w is exact, the adjoint v̂ is wrong, and one Neumann term with a tiny step corrects almost nothing."""
    case = case_of("ridge")
    w = case.exact(case.theta, case.data)
    adjoint = perturbed(result_at(case.problem, w, case.theta, case.data).linear.solution, 0.1)
    out = result_at(case.problem, w, case.theta, case.data, adjoint)
    # ∂residual/∂θ = w, so the error is ⟨w, v̂ − v*⟩ with the exact adjoint v*.
    constants = bl.Lipschitz(outer_w=2.0, jacobian=0.0, mixed=1.0, mixed_norm=norm(w))
    certificate = bl.certify(
        case.problem, case.theta, out, case.data, float(case.theta), constants, bl.Neumann(1, step_size=1e-3)
    )
    assert int(certificate.kind) == KINDS.CERTIFIED and not bool(certificate.first_order)
    assert distance(out.gradient, case.gradient) <= float(certificate.bound)


@pytest.mark.slow("certifies a problem of 600 unknowns")
def test_certify_works_above_the_dense_limit():
    """In this diagonal case with λ = 1, w* = θ/(1 + curvature), and the hypergradient is w*/(1 + curvature)."""
    curvature = jnp.arange(600.0) % 3.0
    objective = lambda w, theta, data: 0.5 * jnp.sum(curvature * w**2)  # noqa: E731
    problem = bl.Problem(bl.Proximal(objective, 1.0), lambda w, theta, data: 0.5 * jnp.sum(w**2))
    theta = jnp.sin(jnp.arange(600.0))
    out = result_at(problem, theta / (1 + curvature) + 0.01, theta, None)
    certificate = bl.certify(problem, theta, out, None, 1.0, bl.Lipschitz(outer_w=1.0, jacobian=0.0))
    exact = theta / (1 + curvature) ** 2
    assert int(certificate.kind) == KINDS.CERTIFIED
    assert distance(out.gradient, exact) <= float(certificate.bound) <= 1.01 * distance(out.gradient, exact)


@pytest.mark.slow("compiles certificates in float32")
def test_in_float32_the_estimate_and_the_bound_are_at_least_the_rounding_allowance():
    """With κ = 1e4 and w exact to float32, the rounding allowance covers the error against a float64 reference."""
    scales = np.geomspace(1, 1e-4, 8)
    theta = np.random.default_rng(0).normal(size=8)
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum(data * w**2) - jnp.sum(w * theta)),
        lambda w, theta, data: 0.5 * jnp.sum(w**2),
    )
    theta32, data32 = jnp.asarray(theta, jnp.float32), jnp.asarray(scales, jnp.float32)
    exact = np.asarray(theta32, np.float64) / np.asarray(data32, np.float64) ** 2
    out = result_at(problem, theta32 / data32, theta32, data32)
    constants = bl.Lipschitz(outer_w=1.0, jacobian=0.0, mixed=0.0)
    certificate = bl.certify(problem, theta32, out, data32, 0.99e-4, constants)
    error = np.linalg.norm(np.asarray(out.gradient, np.float64) - exact)
    assert certificate.bound.dtype == certificate.gradient.dtype == jnp.float32
    assert int(certificate.kind) == KINDS.CERTIFIED
    assert error <= float(certificate.rounding) <= float(certificate.estimate) <= float(certificate.bound)
    assert int(certificate.findings) & bl.Finding.ROUNDING


@pytest.mark.slow("compiles a certificate in three ways")
def test_vmap_and_jit_equal_a_loop():
    case = case_of("ridge")

    @jax.jit
    @jax.vmap
    def study(shift):
        w = case.exact(case.theta, case.data) + shift
        return bl.certify(case.problem, case.theta, result_at(case.problem, w, case.theta, case.data), case.data)

    shifts = jnp.array([0.1, 1e-3])
    batch = study(shifts)
    for k, shift in enumerate(shifts):
        w = case.exact(case.theta, case.data) + shift
        one = bl.certify(case.problem, case.theta, result_at(case.problem, w, case.theta, case.data), case.data)
        # vmap may sum in another order, and κ amplifies the rounding.
        for name in ("estimate", "bound", "gradient", "inner_error"):
            np.testing.assert_allclose(getattr(batch, name)[k], getattr(one, name), rtol=1e-9)
        assert int(batch.kind[k]) == int(one.kind)
    assert "2 hypergradients" in str(batch)


@pytest.mark.slow("searches for the extreme of each constant")
@pytest.mark.parametrize("loss", ["HALF_SQUARED", "LOGISTIC", "SOFTMAX"])
def test_constants_of_linear_models_hold_and_are_tight(loss):
    """A random search over w and v finds no second or third derivative above the constant that bounds it.

    With one feature, the largest derivative found is within 20 % of the constant.
    """
    functions = {
        "HALF_SQUARED": lambda z: 0.5 * jnp.sum(z**2),
        "LOGISTIC": lambda z: jax.nn.softplus(z[0]),
        "SOFTMAX": lambda z: jax.nn.logsumexp(z),
    }
    classes, model, function = 3 if loss == "SOFTMAX" else 1, getattr(bl, loss), functions[loss]
    for features in (1, 4):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(6, features)) if features > 1 else np.ones((6, 1)))

        def mean(w, x=x, features=features):
            return jnp.mean(jax.vmap(function)(x @ w.reshape(features, classes)))

        @jax.jit
        def derivatives(w, v, mean=mean):
            hessian = jax.hessian(mean)
            third = jax.jvp(lambda w: hessian(w) @ v, (w,), (v,))[1]
            along = jax.jacobian(lambda w: hessian(w) @ v)(w)
            return jnp.linalg.norm(hessian(w), 2), jnp.linalg.norm(along, 2), jnp.linalg.norm(third)

        def constants(v, x=x, features=features):
            return model.hessian_times(x, v.reshape(features, classes)), model.hessian(x) * jnp.linalg.norm(v)

        points = jnp.asarray(rng.normal(size=(3000, features * classes)) * 2)
        directions = jnp.asarray(rng.normal(size=points.shape))
        second, along, _ = jax.vmap(derivatives)(points, directions)
        of_v, of_all = jax.vmap(constants)(directions)
        assert jnp.all(second <= model.gradient(x) * (1 + 1e-12))
        assert jnp.all(along <= of_v * (1 + 1e-12)) and jnp.all(of_v <= of_all * (1 + 1e-12))
        if features == 1:  # all rows are equal, so some w attains the constant, and the random search comes near it
            assert jnp.max(second) > 0.8 * model.gradient(x)
            assert loss == "HALF_SQUARED" or jnp.max(along / of_v) > 0.8


def test_invalid_constants_are_refused():
    with pytest.raises(ValueError, match="jacobian"):
        bl.Lipschitz(jacobian=-1.0)
    with pytest.raises(ValueError, match="strong_convexity"):
        certify_scalar(scalar(), 1.0, 1.0, -1.0)


@pytest.mark.slow("certifies several hundred drawn problems")
def test_the_study_meets_its_requirements_on_a_few_hundred_cases(tmp_path):
    """The study runs in its own process, as from the command line. It exits with 0 if all requirements hold."""
    record = tmp_path / "record.json"
    options = ["--cases", "300", "--seed", "1", "--families", "logistic", "imaml quadratic", "--sizes", "3"]
    command = [sys.executable, "-m", "benchmarks.certification", *options, "--out", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    total = json.loads(record.read_text())["result"]["all"]
    assert total["cases"] == total["certified"] == 300 and total["violations"] == 0
    assert total["tested"] > 100  # the study reports percentages of the cases that passed the first-order test
