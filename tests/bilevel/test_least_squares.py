"""LeastSquares and its solvers, against SciPy, closed forms and a NumPy version of the algorithm of Madsen et al."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import bilevel as bl

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

TIMES = np.linspace(0.0, 2.0, 7)
NOISY = 2 * np.exp(-1.3 * TIMES) + 0.1 * np.random.default_rng(0).normal(size=7)


def decay(w, theta, data):
    """Return a tree of eight residuals in two unknowns. The residuals are not zero at the solution."""
    return {"fit": w["size"] * jnp.exp(-w["rate"] * TIMES) - data, "prior": 0.3 * theta * w["rate"]}


FIT = bl.LeastSquares(decay)
START = {"size": np.array(1.0), "rate": np.array(0.5)}


def decay_by_scipy(theta, data):
    def residuals(x):
        return np.append(x[0] * np.exp(-x[1] * TIMES) - data, 0.3 * theta * x[1])

    size, rate = scipy.optimize.least_squares(residuals, [1.0, 0.5], "3-point", xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    return {"size": size, "rate": rate}


SOLVERS = [bl.GaussNewton(30, tol=1e-9), bl.LevenbergMarquardt(30, tol=1e-9)]
EITHER = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


@EITHER
def test_the_solution_of_scipy_with_a_residual_that_is_not_zero(solver):
    out = solver(FIT, START, 0.7, NOISY)
    assert int(out.status) == bl.Status.CONVERGED and int(out.steps) < 15
    expected = decay_by_scipy(0.7, NOISY)
    jax.tree.map(lambda w, exact: np.testing.assert_allclose(w, exact, rtol=1e-7), out.w, expected)


@pytest.mark.slow("compiles a batch of solves for each solver", fast="LevenbergMarquardt")
@EITHER
def test_vmap_solves_each_task(solver):
    thetas = jnp.array([0.1, 2.0])
    w = jax.vmap(lambda theta: solver(FIT, START, theta, NOISY).w["rate"])(thetas)
    np.testing.assert_allclose(w, [decay_by_scipy(theta, NOISY)["rate"] for theta in thetas], rtol=1e-7)


def test_gauss_newton_solves_linear_least_squares_in_one_step():
    matrix, target = np.random.default_rng(1).normal(size=(5, 3)), np.arange(5.0)
    line = bl.LeastSquares(lambda w, theta, data: matrix @ w - target)
    out = bl.GaussNewton(5, tol=1e-10)(line, jnp.ones(3), None, None)
    assert int(out.steps) == 1
    np.testing.assert_allclose(out.w, np.linalg.lstsq(matrix, target, rcond=None)[0], rtol=1e-12)


@EITHER
@pytest.mark.parametrize("copies", [1, 3], ids=["fewer residuals than unknowns", "rank one"])
def test_a_jacobian_without_full_rank(solver, copies):
    plane = bl.LeastSquares(lambda w, theta, data: jnp.full(copies, w @ np.array([1.0, 2.0]) - 3.0))
    start = jnp.array([1.0, -1.0])
    out = solver(plane, start, None, None)
    assert int(out.status) == bl.Status.CONVERGED
    np.testing.assert_allclose(out.w, start + 4.0 * np.array([1.0, 2.0]) / 5, rtol=1e-7)  # nearest to the start


def banana(w, theta, data):
    return 10 * (w[1] - w[0] ** 2), 1 - w[0]


def levenberg_marquardt_in_numpy(steps, x, first=1e-3):
    """Return w after each step of algorithm 3.16 of Madsen, Nielsen and Tingleff on Rosenbrock's function."""
    path, growth, damping = [], 2.0, None
    for _ in range(steps):
        r, jacobian = np.array(banana(x, None, None)), np.array([[-20 * x[0], 10.0], [-1.0, 0.0]])
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ r
        damping = first * normal.diagonal().max() if damping is None else damping
        step = np.linalg.solve(normal + damping * np.eye(2), -gradient)
        moved = np.array(banana(x + step, None, None))
        gain = (r @ r - moved @ moved) / (step @ (damping * step - gradient))
        if gain > 0:
            x, damping, growth = x + step, damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
        else:
            damping, growth = damping * growth, 2 * growth
        path.append(x)
    return np.array(path)


def test_levenberg_marquardt_takes_the_steps_of_its_algorithm():
    start = np.array([-1.2, 1.0])
    expected = levenberg_marquardt_in_numpy(12, start)
    assert any(np.array_equal(a, b) for a, b in pairwise(expected)), "no step was refused"
    actual = [bl.LevenbergMarquardt(n)(bl.LeastSquares(banana), jnp.asarray(start), None, None).w for n in (1, 4, 12)]
    np.testing.assert_allclose(actual, expected[[0, 3, 11]], rtol=1e-8)


@EITHER
def test_a_step_to_where_the_residuals_are_not_finite_is_shortened(solver):
    logarithm = bl.LeastSquares(lambda w, theta, data: jnp.log(w))  # the full step from 3 leads to 3 − 3·log 3 < 0
    out = solver(logarithm, jnp.float64(3.0), None, None)
    assert int(out.status) == bl.Status.CONVERGED and float(out.w) == pytest.approx(1.0, rel=1e-8)
    assert int(solver(logarithm, jnp.float64(-1.0), None, None).status) == bl.Status.NONFINITE


@EITHER
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_low_precision_keeps_the_dtypes(solver, dtype):
    start = {"size": jnp.ones((), dtype), "rate": jnp.full((), 0.5, jnp.float32)}

    def residuals(w, theta, data):  # the data and the residuals are in float64
        return decay(jax.tree.map(lambda leaf: leaf.astype(float), w), theta, data)

    out = solver(bl.LeastSquares(residuals), start, 0.7, NOISY)
    assert (out.w["size"].dtype, out.w["rate"].dtype) == (dtype, jnp.float32)
    exact = decay_by_scipy(0.7, NOISY)
    assert float(out.w["rate"]) == pytest.approx(exact["rate"], rel=8 * float(jnp.finfo(dtype).eps))


@EITHER
def test_a_system_of_equations(solver):
    matrix = np.array([[2.0, 1.0], [-1.0, 3.0]])
    root = bl.Root(lambda w, theta, data: matrix @ w + 0.1 * w**3 - theta)
    theta = np.array([1.0, 2.0])
    out = solver(root, jnp.zeros(2), theta, None)
    expected = scipy.optimize.root(lambda w: matrix @ w + 0.1 * w**3 - theta, np.zeros(2), tol=1e-13).x
    np.testing.assert_allclose(out.w, expected, rtol=1e-9)


# dw/dθ with each operator for r = (w² − θ, w − 1). The solution satisfies Jᵀr = 2w(w² − θ) + w − 1 = 0.
SCALAR = {
    "exact": lambda w, theta: 2 * w / (6 * w**2 - 2 * theta + 1),
    "gauss_newton": lambda w, theta: 2 * w / (4 * w**2 + 1),
}


@pytest.mark.slow("compiles a layer to second order")
@pytest.mark.parametrize("operator", SCALAR)
def test_the_derivative_of_each_operator(operator):
    condition = bl.LeastSquares(lambda w, theta, data: (w**2 - theta["t"], w - 1.0), operator=operator)
    solver, derivative = bl.GaussNewton(40, tol=1e-13), SCALAR[operator]
    theta = {"t": jnp.array(2.0), "count": jnp.arange(2)}
    problem = bl.Problem(condition, lambda w, theta, data: w)
    out = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.CG(2)))(theta, jnp.ones(()), None)
    expected = derivative(out.value, 2.0)
    np.testing.assert_allclose(out.gradient["t"], expected, rtol=1e-10)

    layer = bl.implicit_layer(condition, solver, bl.LU())

    def solution(t):
        return layer(theta | {"t": t}, jnp.ones(()), None)

    derivatives = jax.jit(lambda t: [mode(solution)(t) for mode in (jax.jacfwd, jax.jacrev, jax.hessian)])(2.0)
    along_w, along_theta = jax.grad(derivative, (0, 1))(out.value, 2.0)
    np.testing.assert_allclose(derivatives, [expected, expected, along_theta + along_w * expected], rtol=1e-9)


@pytest.mark.slow("compiles third derivatives")
def test_gauss_newton_is_exact_to_any_order_where_the_residuals_are_zero():
    def solution(theta):  # w = θ²; the residuals capture θ in a closure
        condition = bl.LeastSquares(lambda w, _, data: (w - theta**2, w**3 - theta**6), operator="gauss_newton")
        return bl.implicit_layer(condition, bl.GaussNewton(30, tol=1e-13), bl.LU())(0.0, 1.0, None)

    derivatives = jax.jit(lambda t: (solution(t), jax.grad(solution)(t), jax.hessian(solution)(t)))(1.5)
    np.testing.assert_allclose(derivatives, [2.25, 3.0, 2.0], rtol=1e-9)


def outer(w, theta, data):
    return w["size"] * w["rate"] + theta**2


def test_the_hypergradient_agrees_with_differences_of_scipy():
    hypergradient = bl.value_and_hypergradient(bl.Problem(FIT, outer), SOLVERS[1], bl.Implicit(bl.Cholesky()))
    out = hypergradient(0.7, START, NOISY)
    values = [outer(decay_by_scipy(theta, NOISY), theta, None) for theta in (0.7 + 1e-3, 0.7 - 1e-3)]
    np.testing.assert_allclose(out.gradient, (values[0] - values[1]) / 2e-3, rtol=1e-5)


@pytest.mark.slow("compiles the references of check_hypergradient")
def test_the_checks_take_the_condition():
    problem = bl.Problem(FIT, outer)
    solver, method = bl.LevenbergMarquardt(50, tol=1e-11), bl.Implicit(bl.LU())
    assert bl.check_condition(problem, 0.7, solver(FIT, START, 0.7, NOISY).w, NOISY).ok
    out = bl.value_and_hypergradient(problem, solver, method)(0.7, START, NOISY)
    assert float(bl.certify(problem, 0.7, out, NOISY).estimate) < 1e-8
    against = ("finite_differences", "dense")
    assert bl.check_hypergradient(problem, 0.7, START, NOISY, solver, method, against).ok
    approximate = bl.Problem(bl.LeastSquares(decay, operator="gauss_newton"), outer)
    assert not bl.check_hypergradient(approximate, 0.7, START, NOISY, solver, method, against).ok


@pytest.mark.parametrize("name", ["LevenbergMarquardt", "GaussNewton", "LBFGS", "ScipyLeastSquares"])
@pytest.mark.slow("compiles the solvers of jaxopt")
def test_jaxopt_solves_more_residuals_than_unknowns(name):
    options = {} if name.startswith("Scipy") else {"tol": 1e-7, "maxiter": 100}
    out = bl.solve(bl.Jaxopt(name, **options), FIT, START, 0.7, NOISY)
    assert bl.Status(int(out.status)).ok
    jax.tree.map(lambda w, exact: np.testing.assert_allclose(w, exact, rtol=1e-6), out.w, decay_by_scipy(0.7, NOISY))


def test_wrong_uses_are_refused():
    bowl = bl.Stationary(lambda w, theta, data: jnp.sum(w**2))
    for solver in SOLVERS:
        with pytest.raises(ValueError, match=r"Stationary has only an objective: declare LeastSquares\(residuals\)"):
            solver(bowl, jnp.zeros(2), None, None)
    with pytest.raises(ValueError, match='operator "exact" or "gauss_newton", got \'newton\''):
        bl.LeastSquares(decay, operator="newton")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"calls residuals\(w, theta, data\)"):
        bl.LeastSquares(lambda w: w)
    counted = bl.LeastSquares(lambda w, theta, data: (w - 1.0, {"calls": 3}))
    with pytest.raises(TypeError, match=r"got int\d+ at residuals\[1\]\['calls'\]: .*pass has_aux=True"):
        bl.GaussNewton(3)(counted, jnp.zeros(2), None, None)
    with pytest.raises(ValueError, match="halvings of at least 0, got -1"):
        bl.GaussNewton(3, halvings=-1)
    with pytest.raises(ValueError, match="finite damping above 0, got 0"):
        bl.LevenbergMarquardt(3, damping=0.0)
    with pytest.raises(ValueError, match="OSQP does not solve LeastSquares: use LevenbergMarquardt, GaussNewton"):
        bl.Jaxopt("OSQP")(FIT, START, 0.7, NOISY)
    with pytest.raises(ValueError, match="for more or fewer residuals than unknowns, use LeastSquares"):
        bl.GaussNewton(3)(bl.Root(lambda w, theta, data: jnp.ones(3)), jnp.zeros(2), None, None)


def test_bounds_with_another_tree_structure_than_w_are_refused():
    root = bl.Root(lambda w, theta, data: w - theta)
    with pytest.raises(ValueError, match=r"bounds that are numbers or have the tree structure of w, .*, got .*'a'"):
        bl.solve(bl.GaussNewton(3, lower={"a": 0.0}), root, jnp.array(1.0), jnp.array(1.0), None)


@pytest.mark.parametrize("bounds", [{"lower": 1.6, "upper": 4.0}, {"lower": {"angle": 1.6}, "upper": {"angle": 4.0}}])
def test_newtons_method_stays_within_its_bounds_and_finds_the_root_there(bounds):
    sine = bl.Root(lambda w, theta, data: {"angle": jnp.sin(w["angle"]) - theta})
    start, theta = {"angle": jnp.array(1.7)}, jnp.array(0.1)
    free = bl.solve(bl.GaussNewton(20, tol=1e-10), sine, start, theta, None)
    assert int(free.status) == bl.Status.CONVERGED and float(free.w["angle"]) > 2 * np.pi  # the first step is 6.9 long
    layer = bl.implicit_layer(sine, bl.GaussNewton(20, tol=1e-10, **bounds), bl.LU())
    angle, slope = jax.value_and_grad(lambda theta: layer(theta, start, None)["angle"])(theta)
    np.testing.assert_allclose(angle, np.pi - np.arcsin(0.1), rtol=1e-10)
    np.testing.assert_allclose(slope, -1 / np.sqrt(1 - 0.1**2), rtol=1e-10)


def test_a_start_outside_of_the_bounds_is_moved_to_them():
    root = bl.Root(lambda w, theta, data: jnp.log(w) - theta)  # not defined at the start
    out = bl.solve(bl.GaussNewton(20, tol=1e-10, lower=0.1), root, jnp.array(-3.0), jnp.array(1.0), None)
    np.testing.assert_allclose(out.w, np.e, rtol=1e-9)


def test_a_solution_on_a_bound_with_a_residual_above_tol_is_max_steps():
    matrix, b = np.array([[3.0, 2.9], [2.9, 3.0]]), np.array([1.0, 2.0])
    fit = bl.LeastSquares(lambda w, theta, data: matrix @ w - b)
    out = bl.solve(bl.GaussNewton(100, tol=1e-8, lower=0.0, upper=5.0), fit, jnp.array([4.0, 0.0]), None, None)
    # With w[0] = 0, the best w[1] is ⟨column, b⟩ / ‖column‖².
    np.testing.assert_allclose(out.w, [0, 8.9 / 17.41], atol=1e-6)
    assert int(out.status) == bl.Status.MAX_STEPS
