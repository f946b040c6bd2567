"""bl.Optimistix and bl.Lineax run two other libraries' solvers, with the reports and derivatives of this library."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from conditions_solved import CASES

import bilevel as bl

lineax = pytest.importorskip("lineax")
optimistix = pytest.importorskip("optimistix")

pytestmark = pytest.mark.usefixtures("quick_compilation")

FINE = {"rtol": 1e-10, "atol": 1e-10}
MATRIX = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
TWISTED = MATRIX + np.array([[0.0, 0.4, 0.0], [-0.4, 0.0, 0.3], [0.0, -0.3, 0.0]])
RIGHT = {"a": np.array([1.0, -2.0]), "b": np.array(0.5)}
SYMMETRIC_ONLY = {"CG": lineax.CG(**FINE), "Cholesky": lineax.Cholesky()}
GENERAL = {
    "GMRES": lineax.GMRES(**FINE),
    "BiCGStab": lineax.BiCGStab(**FINE),
    "NormalCG": lineax.Normal(lineax.CG(**FINE)),
    "LSMR": lineax.LSMR(**FINE),
    "LU": lineax.LU(),
    "QR": lineax.QR(),
    "SVD": lineax.SVD(),
    "Auto": lineax.AutoLinearSolver(well_posed=None),
}
LINEAR = SYMMETRIC_ONLY | GENERAL
NEWTON, LM = optimistix.Newton(**FINE), optimistix.LevenbergMarquardt(**FINE)
BFGS = optimistix.BFGS(rtol=1e-12, atol=1e-12)
ITERATION = optimistix.FixedPointIteration(rtol=1e-13, atol=1e-13)


def matvec_of(matrix):
    """Return the function that multiplies a matrix by a pytree like RIGHT."""

    def matvec(v):
        product = jnp.asarray(matrix, v["b"].dtype) @ jnp.append(v["a"], v["b"])
        return {"a": product[:2], "b": product[2]}

    return matvec


def flat(v):
    return np.append(np.asarray(v["a"], np.float64), np.asarray(v["b"], np.float64))


def right(dtype=np.float64, scale=1.0):
    return jax.tree.map(lambda leaf: jnp.asarray(scale * leaf, dtype), RIGHT)


def status(record):
    return bl.Status(int(record.status))


@pytest.mark.slow("compiles each solver", fast=("CG", "LU", "GMRES"))
@pytest.mark.parametrize("name", LINEAR)
def test_a_solver_of_lineax_agrees_with_numpy_and_reports_the_true_residual(name):
    matrix = MATRIX if name in SYMMETRIC_ONLY else TWISTED
    solver = bl.Lineax(LINEAR[name], tol=1e-9, ridge=0.25)
    x, info = jax.jit(lambda b: solver(matvec_of(matrix), b))(right())
    shifted = matrix + 0.25 * np.eye(3)
    np.testing.assert_allclose(flat(x), np.linalg.solve(shifted, flat(RIGHT)), rtol=1e-8)
    residual = np.linalg.norm(flat(RIGHT) - shifted @ flat(x)) / np.linalg.norm(flat(RIGHT))
    assert abs(float(info.relative_residual) - residual) < 1e-14 and status(info) == bl.Status.CONVERGED
    iterative = name in ("CG", "GMRES", "BiCGStab", "NormalCG", "LSMR")
    assert (info.iterations is not None) == iterative
    assert not iterative or 1 <= int(info.iterations) <= 6
    assert solver.needs_symmetry == (name in SYMMETRIC_ONLY)


@pytest.mark.parametrize(("name", "expected"), [("CG", 3), ("BiCGStab", None)])
def test_a_warm_start_saves_iterations(name, expected):
    b, solver = right(), bl.Lineax(LINEAR[name], tol=1e-8)
    x, cold = solver(matvec_of(MATRIX), b)
    _, warm = solver(matvec_of(MATRIX), b, x)
    assert int(warm.iterations) < int(cold.iterations)
    assert expected is None or int(cold.iterations) <= expected + 1
    assert status(warm) == status(cold) == bl.Status.CONVERGED


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_size_of_the_right_hand_side_does_not_matter(scale):
    x, info = bl.Lineax(lineax.CG(rtol=1e-6, atol=1e-6), tol=1e-5)(matvec_of(MATRIX), right(np.float32, scale))
    np.testing.assert_allclose(flat(x) / scale, np.linalg.solve(MATRIX, flat(RIGHT)), rtol=1e-4)
    assert status(info) == bl.Status.CONVERGED


@pytest.mark.parametrize("name", ["CG", "GMRES", "BiCGStab", "LU"])
def test_a_right_hand_side_of_zero_has_the_solution_zero(name):
    x, info = bl.Lineax(LINEAR[name])(matvec_of(MATRIX), right(scale=0.0))
    assert not flat(x).any() and status(info).ok


def test_half_precision_is_solved_in_single_precision():
    x, info = bl.Lineax(lineax.LU(), tol=0.02)(matvec_of(MATRIX), right(jnp.bfloat16))
    assert x["a"].dtype == jnp.bfloat16 and status(info) == bl.Status.CONVERGED
    np.testing.assert_allclose(flat(x), np.linalg.solve(MATRIX, flat(RIGHT)), rtol=0.02)


SINGULAR = np.diag([1.0, 0.0, 2.0])
LINEAR_STATUSES = {
    "fixed budget": (lineax.CG(rtol=0.0, atol=0.0, max_steps=2), None, MATRIX, "BUDGET_USED"),
    "fixed budget, tol": (lineax.CG(rtol=0.0, atol=0.0, max_steps=2), 1e-9, MATRIX, "MAX_STEPS"),
    "budget too small": (lineax.CG(rtol=1e-12, atol=0.0, max_steps=2), 1e-9, MATRIX, "MAX_STEPS"),
    "coarse criterion": (lineax.CG(rtol=0.5, atol=0.5), 1e-9, MATRIX, "STOPPED"),
    "indefinite": (lineax.CG(rtol=1e-9, atol=0.0), 1e-6, -MATRIX, "NEGATIVE_CURVATURE"),
    "indefinite Cholesky": (lineax.Cholesky(), None, -MATRIX, "NEGATIVE_CURVATURE"),
    "LU": (lineax.LU(), None, MATRIX, "CONVERGED"),
    "singular LU": (lineax.LU(), None, SINGULAR, "SINGULAR"),
    "inconsistent SVD": (lineax.SVD(), None, SINGULAR, "BREAKDOWN"),
    "ill-conditioned": (lineax.QR(), None, MATRIX + np.diag([0.0, 0.0, 1e9]), "ILL_CONDITIONED"),
    "NaN": (lineax.LU(), None, MATRIX * np.nan, "NONFINITE"),
}


@pytest.mark.parametrize("case", LINEAR_STATUSES)
def test_the_status_of_lineax(case):
    solver, tol, matrix, expected = LINEAR_STATUSES[case]
    _, info = bl.Lineax(solver, tol)(matvec_of(matrix), right())
    assert status(info).name == expected


@pytest.mark.slow("compiles each solver", fast=("solver1", "solver2"))
@pytest.mark.parametrize("solver", [lineax.LU(), lineax.QR(), lineax.SVD(), lineax.AutoLinearSolver(well_posed=None)])
def test_a_direct_solver_of_lineax_is_judged_as_ours(solver):
    matrix, b = scipy.linalg.hilbert(8), np.array([1.0, -1, 2, -2, 3, -3, 4, -4])
    x, info = bl.Lineax(solver)(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b))
    _, ours = bl.LU()(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b))
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-6)
    assert status(info) == status(ours) == bl.Status.ILL_CONDITIONED
    np.testing.assert_allclose(info.rcond, ours.rcond)
    # In float32 the matrix is singular to rounding. Only the solvers for singular systems, SVD and Auto, accept it.
    single = matrix.astype(np.float32)
    _, info = bl.Lineax(solver)(lambda v: jnp.asarray(single) @ v, jnp.ones(8, jnp.float32))
    accepts = isinstance(solver, lineax.SVD | lineax.AutoLinearSolver)
    assert status(info).name == ("ILL_CONDITIONED" if accepts else "SINGULAR")


@pytest.mark.slow("compiles second derivatives")
@pytest.mark.parametrize("name", ["CG", "GMRES", "LU"])
def test_a_layer_solved_by_lineax_is_differentiated_and_batched(name):
    def matrix(theta):
        return jnp.asarray(MATRIX) + theta[0] * jnp.eye(3)

    def exact(theta):
        return jnp.linalg.solve(matrix(theta), theta[1:])

    condition = bl.Root(lambda w, theta, data: matrix(theta) @ w - theta[1:], symmetric=True)
    layer = bl.implicit_layer(condition, lambda c, init, theta, data: exact(theta), bl.Lineax(LINEAR[name], tol=1e-9))

    def compare(transform):
        theta = jnp.append(0.3, flat(RIGHT))
        found = jax.jit(transform(lambda theta: layer(theta, jnp.zeros(3), None)))(theta)
        expected = transform(exact)(theta)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)

    compare(lambda x: jax.grad(lambda theta: jnp.sum(x(theta) ** 2)))
    compare(lambda x: jax.hessian(lambda theta: jnp.sum(x(theta) ** 2)))
    compare(lambda x: lambda theta: jax.vmap(jax.jacobian(x))(jnp.stack([theta, 2 * theta])))


def test_a_solve_that_ends_early_under_a_derivative_raises_no_error():
    solver, b = bl.Lineax(lineax.CG(rtol=1e-14, atol=0.0, max_steps=1), tol=1e-9), jnp.asarray(flat(RIGHT))

    def x_of(shift, b):
        return solver(lambda v: jnp.asarray(MATRIX) @ v + shift * v, b)[0]

    value, slope = jax.jvp(x_of, (0.3, b), (1.0, b))
    # For JAX, the x that bl.Lineax returns has a zero derivative. A layer adds the derivative by another linear solve.
    assert np.isfinite(value).all() and not slope.any()


OF_CONDITION = {
    "Stationary": BFGS,
    "Proximal": optimistix.NonlinearCG(rtol=1e-13, atol=1e-13),
    "Root": optimistix.Dogleg(**FINE),
    "FixedPoint": ITERATION,
    "Projected": ITERATION,
    "ProximalGradient": ITERATION,
    "KKT, equality": NEWTON,
    "KKT, inequality": NEWTON,
}


@pytest.mark.parametrize("linear", ["CG", "GMRES", "LU"])
@pytest.mark.parametrize("condition", OF_CONDITION)
@pytest.mark.slow("compiles each condition with each linear solver")
def test_hypergradients_agree_with_the_closed_forms(condition, linear):
    case = CASES[condition]()
    init, theta, data = jax.tree.map(jnp.asarray, (case.init, case.theta, case.data))
    if condition == "KKT, inequality":  # Newton's method would never change an inactive multiplier that starts at zero
        init = jax.tree.map(lambda leaf: leaf + 0.1, init)
    method = bl.Implicit(bl.Lineax(LINEAR[linear], tol=1e-7))
    inner = bl.Optimistix(OF_CONDITION[condition], tol=1e-8)
    function = bl.value_and_hypergradient(case.problem, inner, method)
    if linear == "CG" and not case.condition.symmetric:
        with pytest.raises(ValueError, match="needs a symmetric operator"):
            function(theta, init, data)
        return
    with jax.numpy_dtype_promotion("standard" if condition == "Projected" else "strict"):
        out = function(theta, init, data)
        batch = jnp.stack([theta, theta + 0.02])
        many = jax.jit(jax.vmap(lambda theta: function(theta, init, data).gradient))(batch)
        hessian = jax.hessian(lambda theta: function(theta, init, data).value)(theta)
    assert status(out.inner) == status(out.linear) == bl.Status.CONVERGED
    assert int(out.inner.steps) > 0
    slope = jax.grad(case.value)
    np.testing.assert_allclose(out.gradient, slope(theta), atol=1e-6)
    np.testing.assert_allclose(many, jax.vmap(slope)(batch), atol=1e-6)
    np.testing.assert_allclose(hessian, jax.hessian(case.value)(theta), atol=1e-5)


def cubic(w, theta, data):
    return {"a": w["a"] ** 3 + w["b"] - theta, "b": 2 * w["b"] - w["a"]}


CUBIC = bl.Root(cubic)  # a³ + a/2 = θ, which is 1.5 at a = 1
CUBIC_START = {"a": np.float32(2.0), "b": np.float32(0.3)}
FIT = bl.LeastSquares(lambda w, theta, data: jnp.exp(-w * jnp.arange(3.0)) - data * theta)


@pytest.mark.parametrize("solver", [NEWTON, LM, optimistix.GaussNewton(**FINE), optimistix.Dogleg(**FINE)])
def test_solvers_of_roots_find_a_pytree_in_its_dtype(solver):
    found = bl.solve(bl.Optimistix(solver), CUBIC, CUBIC_START, np.float32(1.5), None)
    assert found.w["a"].dtype == np.float32
    np.testing.assert_allclose([found.w["a"], found.w["b"]], [1.0, 0.5], rtol=1e-5)
    a, b = (np.float64(found.w[name]) for name in "ab")
    assert abs(float(found.residual_norm) - np.hypot(a**3 + b - 1.5, 2 * b - a)) < 1e-6


SINGLE = {"rtol": 1e-5, "atol": 1e-5}
MINIMISERS = [
    optimistix.BFGS(**SINGLE),
    optimistix.LBFGS(**SINGLE),
    optimistix.NonlinearCG(**SINGLE),
    optimistix.GradientDescent(0.3, **SINGLE),
]


@pytest.mark.parametrize("solver", MINIMISERS)
def test_minimisers_keep_the_dtype_of_w_next_to_wider_data(solver):
    condition = bl.Stationary(lambda w, theta, data: jnp.sum((w - data.astype(w.dtype)) ** 2) + theta * w[0] ** 2)
    found = bl.solve(bl.Optimistix(solver, tol=1e-2), condition, jnp.zeros(2, np.float32), 1.0, jnp.ones(2))
    assert found.w.dtype == np.float32 and status(found) == bl.Status.CONVERGED
    np.testing.assert_allclose(found.w, [0.5, 1.0], atol=5e-3)


@pytest.mark.parametrize("solver", [LM, optimistix.Dogleg(**FINE), BFGS])
def test_solvers_of_least_squares_and_minimisers_fit_residuals(solver):
    data = jnp.array([1.0, 0.5, 0.25])
    found = bl.solve(bl.Optimistix(solver, tol=1e-6), FIT, jnp.float64(0.1), 1.0, data)
    assert abs(float(found.w) - np.log(2)) < 1e-6 and status(found) == bl.Status.CONVERGED


DIVERGING = bl.Root(lambda w, theta, data: jnp.sign(w) * jnp.abs(w) ** 0.25)  # Newton multiplies w by −3
COARSE = optimistix.Newton(rtol=0.5, atol=0.5)
INNER_STATUSES = {
    "no tol": (NEWTON, 256, None, CUBIC, "BUDGET_USED"),
    "tol": (NEWTON, 256, 1e-8, CUBIC, "CONVERGED"),
    "short, no tol": (NEWTON, 2, None, CUBIC, "BUDGET_USED"),
    "short": (NEWTON, 2, 1e-8, CUBIC, "MAX_STEPS"),
    "coarse": (COARSE, 256, 1e-8, CUBIC, "STOPPED"),
    "diverging": (optimistix.Newton(**FINE, cauchy_termination=False), 256, None, DIVERGING, "BREAKDOWN"),
    "NaN": (NEWTON, 256, None, bl.Root(lambda w, theta, data: w * jnp.nan), "NONFINITE"),
}


@pytest.mark.parametrize("case", INNER_STATUSES)
def test_the_status_of_optimistix(case):
    solver, max_steps, tol, condition, expected = INNER_STATUSES[case]
    init = jax.tree.map(jnp.float64, CUBIC_START) if condition is CUBIC else jnp.float64(1.0)
    found = bl.solve(bl.Optimistix(solver, max_steps, tol), condition, init, 1.5, None)
    assert status(found).name == expected
    assert 0 < int(found.steps) <= max_steps


def test_forward_mode_through_optimistix_differentiates_its_steps():
    """After one Newton step from w₀, w = w₀ − (w₀² − θ)/(2w₀), so dw/dθ = 1/(2w₀), not the 1/(2√θ) of the root."""
    condition = bl.Root(lambda w, theta, data: w**2 - theta)
    solver = bl.Optimistix(NEWTON, max_steps=1)
    _, slope = jax.jvp(lambda theta: solver(condition, jnp.float64(3.0), theta, None).w, (2.0,), (1.0,))
    assert abs(float(slope) - 1 / 6) < 1e-12


@pytest.mark.parametrize(
    ("solver", "condition", "message"),
    [
        (NEWTON, "Stationary", "Newton does not solve Stationary: use a minimiser"),
        (ITERATION, "Root", "FixedPointIteration does not solve Root: use a root finder"),
        (BFGS, "Projected", "BFGS does not solve Projected: use FixedPointIteration"),
        (ITERATION, "KKT, equality", "FixedPointIteration does not solve KKT: use a root finder .* or a minimiser"),
        (LM, "ProximalGradient", "LevenbergMarquardt does not solve ProximalGradient"),
    ],
)
def test_a_solver_that_does_not_fit_is_refused_with_alternatives(solver, condition, message):
    case = CASES[condition]()
    with pytest.raises(ValueError, match=message):
        bl.solve(bl.Optimistix(solver), case.condition, case.init, case.theta, case.data)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="Bisection needs bounds"):
        bl.Optimistix(optimistix.Bisection(**FINE))
    with pytest.raises(TypeError, match="instance of a solver of optimistix"):
        bl.Optimistix(optimistix.BFGS)
    with pytest.raises(ValueError, match="max_steps and tol"):
        bl.Optimistix(BFGS, tol=-1.0)
    with pytest.raises(TypeError, match="instance of a solver of lineax"):
        bl.Lineax("CG")
    with pytest.raises(ValueError, match="Tridiagonal needs a matrix of known structure"):
        bl.Lineax(lineax.Tridiagonal())
    with pytest.raises(ValueError, match="ridge of at least 0"):
        bl.Lineax(lineax.LU(), ridge=-1.0)
    with pytest.raises(ValueError, match="needs a square operator"):
        bl.Lineax(lineax.LU())(lambda v: v[:2], jnp.ones(3))


def test_bilevel_imports_neither_package_and_names_the_extra_where_one_is_missing():
    code = """
import sys
import bilevel as bl
assert not {"lineax", "optimistix", "equinox"} & set(sys.modules)
sys.modules["lineax"] = sys.modules["optimistix"] = None  # an import of these now raises ImportError
for make, extra in ((bl.Lineax, "lineax"), (bl.Optimistix, "optimistix")):
    try:
        make(None)
    except ImportError as error:
        assert f"pip install {extra}" in str(error), error
    else:
        raise AssertionError(extra)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
