"""`bl.Jaxopt` finds known solutions with each solver of jaxopt, and refuses what a solver cannot solve."""

import functools

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import pytest
from jaxopt.base import LinearOperator

import bilevel as bl

# Most problems minimise ½wᵀQw − wᵀθ with θ = SLOPE, some of them under constraints. Q's smallest eigenvalue is 0.79.
Q, SLOPE = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([1.0, -0.7])
M = np.array([[2.0, 1.0], [-1.0, 3.0]])


def valley(w, theta, data):
    return 0.5 * w @ Q @ w - w @ theta


DESIGN = np.array([[2.0, 1.0], [-1.0, 2.0]])  # DESIGNᵀDESIGN = 5·I


class LeastSquares(jaxopt.objective.CompositeLinearFunction):
    """The objective ½‖Tw − θ‖² with T = DESIGN. TᵀT is a multiple of I, so soft-thresholding solves the lasso."""

    def subfun(self, predictions, theta, data):
        return 0.5 * jnp.sum((predictions - theta) ** 2)

    def make_linop(self, theta, data):
        return LinearOperator(jnp.asarray(DESIGN))

    def columnwise_lipschitz_const(self, theta, data):
        return jnp.full(2, 5.0)


def exponentiated(w, slope, step, outer):
    """Return w after a step of mirror descent on the simplex, with the entropy as mirror map."""
    moved = w * jnp.exp(-step * slope)
    return moved / jnp.sum(moved)


def lasso(strength):
    prox = bl.jaxopt_prox("prox_lasso", lambda theta, data: strength)
    return bl.ProximalGradient(LeastSquares(), prox, 0.1)


def thresholded(strength):
    correlation = DESIGN.T @ SLOPE
    return np.sign(correlation) * np.maximum(np.abs(correlation) - strength, 0) / 5


GRADIENT = (bl.Stationary(valley), np.zeros(2), np.linalg.solve(Q, SLOPE))
EQUATIONS = (bl.Root(lambda w, theta, data: M @ w - theta), np.zeros(2), np.linalg.solve(M, SLOPE))
CUBE = (bl.Root(lambda w, theta, data: w**3 - jnp.sum(theta) - 7.7), np.zeros(()), np.array(2.0))
MAPPING = (bl.FixedPoint(lambda w, theta, data: 0.25 * M @ w + theta), np.zeros(2))
MAPPING = (*MAPPING, np.linalg.solve(np.eye(2) - 0.25 * M, SLOPE))
# The bound w₀ ≤ 0.4 is active, so w₁ is the minimiser of a parabola.
BOUNDS = bl.jaxopt_projection("projection_box", lambda theta, data: (-2.0, 0.4))
IN_A_BOX = (bl.Projected(valley, BOUNDS, 0.4), np.zeros(2), np.array([0.4, SLOPE[1] - 0.5 * 0.4]))
SIMPLEX = bl.jaxopt_projection("projection_simplex")
# On w = (p, 1 − p), p = (θ₀ − θ₁ − Q₀₁ + Q₁₁) / (Q₀₀ − 2Q₀₁ + Q₁₁) is optimal. Shifting θ₀ by −1.2 gives 0 < p < 1.
MIXTURE = bl.Projected(lambda w, theta, data: valley(w, theta - jnp.array([1.2, 0.0]), data), SIMPLEX, 0.4)
SHARE = (SLOPE[0] - 1.2 - SLOPE[1] - 0.5 + 1.0) / 2.0
ON_A_SIMPLEX = (MIXTURE, np.full(2, 0.5), np.array([SHARE, 1 - SHARE]))
LASSO = (lasso(0.3), np.zeros(2), thresholded(0.3))
# With x₀ + x₁ = 0.3 and x₀ ≤ 0.1 active, x = (0.1, 0.2), and the multipliers follow from the gradient.
SUM = dict(equality=lambda x, theta, data: jnp.sum(x) - 0.3)
CORNER = np.array([0.1, 0.2])
LINE = np.linalg.solve(np.block([[Q, np.ones((2, 1))], [np.ones((1, 2)), np.zeros((1, 1))]]), [*SLOPE, 0.3])
ON_A_LINE = (bl.KKT(valley, **SUM), (np.zeros(2), np.zeros(()), None), (LINE[:2], LINE[2], None))
FORCE = SLOPE - Q @ CORNER
PROGRAM = (
    bl.KKT(valley, **SUM, inequality=lambda x, theta, data: x[:1] - 0.1),
    (np.zeros(2), np.zeros(()), np.zeros(1)),
    (CORNER, FORCE[1], FORCE[:1] - FORCE[1]),
)
MINIMUM = -0.5 * SLOPE @ np.linalg.solve(Q, SLOPE)  # Polyak's step size depends on it
# The solvers that bl.Jaxopt takes: name, (condition, init, exact w), options, and the largest error. The test passes
# tol=1e-9 unless the options set another tol.
SOLVED = [
    ("GradientDescent", GRADIENT, {"stepsize": 0.5}, 1e-8),
    ("LBFGS", GRADIENT, {}, 1e-8),
    ("BFGS", GRADIENT, {}, 1e-8),
    ("NonlinearCG", GRADIENT, {}, 1e-8),
    ("ArmijoSGD", GRADIENT, {}, 1e-8),
    # PolyakSGD's step size is (value − minimum)/‖gradient‖². At gradients below √eps the difference is rounding noise.
    ("PolyakSGD", GRADIENT, {"fun_min": MINIMUM, "max_stepsize": 0.5, "tol": 1e-6}, 1e-5),
    ("OptaxSolver", GRADIENT, {"opt": optax.sgd(0.5)}, 1e-8),
    ("ScipyMinimize", GRADIENT, {"method": "BFGS"}, 1e-8),
    ("Broyden", EQUATIONS, {}, 1e-8),
    ("LevenbergMarquardt", EQUATIONS, {}, 1e-8),
    ("GaussNewton", EQUATIONS, {}, 1e-8),
    ("Bisection", CUBE, {"lower": 0.0, "upper": 3.0}, 1e-8),
    ("ScipyRootFinding", EQUATIONS, {}, 1e-8),
    ("ScipyLeastSquares", EQUATIONS, {}, 1e-7),  # takes no tol, and SciPy's tolerances are 1e-8
    ("FixedPointIteration", MAPPING, {}, 1e-7),
    ("AndersonAcceleration", MAPPING, {}, 1e-7),
    ("ProjectedGradient", IN_A_BOX, {"stepsize": 0.4}, 1e-8),
    ("MirrorDescent", IN_A_BOX, {}, 1e-8),
    ("MirrorDescent", ON_A_SIMPLEX, {"projection_grad": exponentiated, "stepsize": 0.5}, 1e-8),
    ("LBFGSB", IN_A_BOX, {}, 1e-8),
    ("BoxCDQP", IN_A_BOX, {}, 1e-8),
    ("ScipyBoundedMinimize", IN_A_BOX, {}, 1e-7),
    ("ProximalGradient", LASSO, {"stepsize": 0.1}, 1e-8),
    ("BlockCoordinateDescent", LASSO, {}, 1e-8),
    ("OSQP", PROGRAM, {}, 1e-7),
    ("BoxOSQP", PROGRAM, {}, 1e-7),
    ("BoxOSQP", ON_A_LINE, {}, 1e-7),
    ("EqualityConstrainedQP", ON_A_LINE, {}, 1e-8),
]
REFUSED = {
    "AndersonWrapper": "it wraps a solver that already has its function",
    "BacktrackingLineSearch": "it is a line search, not a solver",
    "CvxpyQP": "cvxpy works on NumPy arrays, which JAX cannot trace",
    "HagerZhangLineSearch": "it is a line search, not a solver",
    "IterativeRefinement": "it solves linear systems",
    "ScipyBoundedLeastSquares": "it needs a sum of squares in a box",
    "ZoomLineSearch": "it is a line search, not a solver",
}
WITHOUT_MAXITER = ("ScipyRootFinding", "ScipyLeastSquares", "EqualityConstrainedQP")


def test_every_solver_of_jaxopt_is_in_exactly_one_table():
    solvers = {name for name in dir(jaxopt) if name[0].isupper()} - {"OptStep"}  # OptStep is a record
    assert {name for name, *_ in SOLVED} | set(REFUSED) == solvers
    assert not {name for name, *_ in SOLVED} & set(REFUSED)


@pytest.mark.slow(
    "compiles jaxopt's line searches", fast=("*Gradient*", "*SGD*", "Scipy*", "MirrorDescent*", "OptaxSolver*")
)
@pytest.mark.parametrize(("name", "problem", "options", "error"), SOLVED)
def test_a_solver_of_jaxopt_solves_the_condition_it_fits(name, problem, options, error):
    inner, init, exact = problem
    options = ({} if name == "ScipyLeastSquares" else {"tol": 1e-9}) | options
    options |= {} if name in WITHOUT_MAXITER else {"maxiter": 2000}
    run = functools.partial(bl.solve, bl.Jaxopt(name, **options), inner)
    out = (run if name.startswith("Scipy") else jax.jit(run))(jax.tree.map(jnp.asarray, init), jnp.asarray(SLOPE), None)
    jax.tree.map(lambda found, w: np.testing.assert_allclose(found, w, atol=error), out.w, exact)
    # jaxopt's stopping rules do not use this residual, and rounding of the objective may stop a line search early.
    assert float(out.residual_norm) < 10 * error
    assert name == "EqualityConstrainedQP" or 0 < int(out.steps) <= 2000


@pytest.mark.parametrize("name", REFUSED)
def test_a_solver_of_jaxopt_that_fits_nothing_is_refused_with_the_reason(name):
    for inner, init, _ in (GRADIENT, EQUATIONS, PROGRAM):
        with pytest.raises(ValueError, match=rf"{name} does not solve \w+: {REFUSED[name]}.*: use \w+"):
            bl.Jaxopt(name)(inner, jax.tree.map(jnp.asarray, init), jnp.asarray(SLOPE), None)


def test_a_scipy_solver_runs_outside_of_a_trace_and_its_solution_can_be_differentiated():
    solver, (inner, init, exact) = bl.Jaxopt("ScipyMinimize", method="BFGS", tol=1e-10), GRADIENT
    problem, theta = bl.Problem(inner, lambda w, theta, data: jnp.sum(w**2)), jnp.asarray(SLOPE)
    with pytest.raises(ValueError, match=r"ScipyMinimize runs SciPy, .* Solve first, by w = bl.solve"):
        bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.CG(2)))(theta, jnp.asarray(init), None)
    w = bl.solve(solver, inner, jnp.asarray(init), theta, None).w
    already_solved = lambda condition, init, theta, data: init  # noqa: E731
    out = bl.value_and_hypergradient(problem, already_solved, bl.Implicit(bl.CG(2)))(theta, w, None)
    np.testing.assert_allclose(out.gradient, 2 * np.linalg.solve(Q, exact), rtol=1e-8)


def group_lasso(w, theta, data, step_size):
    """Return the proximal operator of 0.3·‖w‖₂, with the norm of all entries of w."""
    return jaxopt.prox.prox_group_lasso(w, 0.3, step_size)


@pytest.mark.slow("compiles block coordinate descent")
def test_block_coordinate_descent_solves_the_group_lasso_of_each_row():
    def rows(w, theta, data, step_size):
        return jax.vmap(lambda row: group_lasso(row, theta, data, step_size))(w)

    theta = jnp.array([[1.0, -0.7, 0.2], [0.4, 0.9, -0.1]])
    solver = bl.Jaxopt("BlockCoordinateDescent", tol=1e-10)
    found = bl.solve(solver, bl.ProximalGradient(LeastSquares(), rows, 0.1), jnp.zeros((2, 3)), theta, None)
    # TᵀT = 5·I, so each row is the row of the least-squares solution, shortened by 0.3/5.
    plain = DESIGN.T @ theta / 5
    exact = plain * (1 - 0.3 / 5 / np.linalg.norm(plain, axis=1, keepdims=True))
    np.testing.assert_allclose(found.w, exact, atol=1e-9)
    assert int(found.status) == bl.Status.CONVERGED
    whole = bl.ProximalGradient(LeastSquares(), group_lasso, 0.1)
    with pytest.raises(
        ValueError, match=r"each row of a matrix w, but the prox of the whole w has another result here: .*jax.vmap"
    ):
        bl.solve(solver, whole, jnp.zeros((2, 3)), theta, None)
    with pytest.raises(ValueError, match="each entry of a vector w"):
        jax.jit(lambda theta: bl.solve(solver, whole, jnp.zeros(2), theta, None).w)(theta[:, 0])


@pytest.mark.parametrize(
    ("name", "inner", "init", "message"),
    [
        ("BlockCoordinateDescent", bl.ProximalGradient(valley, lasso(0.1).prox), np.zeros(2), "use ProximalGradient"),
        ("BlockCoordinateDescent", lasso(jnp.ones(2)), np.zeros(2), "the same for each block, .* use ProximalGradient"),
        ("EqualityConstrainedQP", PROGRAM[0], PROGRAM[1], "does not take inequalities: use OSQP or BoxOSQP"),
        ("Bisection", EQUATIONS[0], np.zeros(2), "finds a scalar w, got .* use Broyden"),
    ],
)
def test_a_problem_that_a_solver_of_jaxopt_cannot_solve_is_refused_with_an_alternative(name, inner, init, message):
    options = {"lower": 0.0, "upper": 1.0} if name == "Bisection" else {}
    with pytest.raises(ValueError, match=message):
        bl.Jaxopt(name, **options)(inner, jax.tree.map(jnp.asarray, init), jnp.asarray(SLOPE), None)


@pytest.mark.parametrize(
    ("name", "inner", "options"),
    [
        ("FixedPointIteration", bl.FixedPoint(lambda w, t, d: 0.5 * w + t), {}),
        ("Broyden", bl.Root(lambda w, t, d: 0.5 * w - t), {}),
        (
            "ProjectedGradient",
            bl.Projected(lambda w, t, d: 0.25 * (w - 2 * t) ** 2, lambda w, t, d: w),
            {"stepsize": 1.0},
        ),
    ],
)
def test_a_users_function_may_name_its_arguments_freely(name, inner, options):
    out = bl.solve(bl.Jaxopt(name, tol=1e-9, maxiter=200, **options), inner, 0.0, jnp.array(1.5), None)
    assert float(out.w) == pytest.approx(3.0, abs=1e-8)


@pytest.mark.slow("compiles jaxopt's LBFGSB")
def test_a_box_solver_on_a_set_that_is_no_box_reports_a_failure():
    ball = bl.Projected(valley, bl.jaxopt_projection("projection_l2_ball"), 0.4)
    out = bl.Jaxopt("LBFGSB", tol=1e-6)(ball, jnp.zeros(2), jnp.asarray(SLOPE), None)
    assert not bl.Status(int(out.status)).ok


def test_a_spent_budget_without_a_tolerance_is_no_failure():
    inner, init, _ = GRADIENT
    solver = bl.Jaxopt("OptaxSolver", opt=optax.sgd(0.1), maxiter=3, tol=0.0)
    out = solver(inner, jnp.asarray(init), jnp.asarray(SLOPE), None)
    assert int(out.status) == bl.Status.BUDGET_USED and int(out.steps) == 3


@pytest.mark.slow("compiles jaxopt's OSQP")
def test_a_quadratic_program_keeps_float32():
    inner, init, exact = PROGRAM
    init, theta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (init, SLOPE))
    narrow = bl.KKT(
        lambda x, theta, data: 0.5 * x @ jnp.asarray(Q, jnp.float32) @ x - x @ theta,
        inner.equality,
        inner.inequality,
    )
    out = bl.Jaxopt("OSQP", tol=1e-6)(narrow, init, theta, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(out.w)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(out.w[0], exact[0], atol=1e-5)


@pytest.mark.parametrize("option", ["has_aux", "value_and_grad"])
def test_an_option_that_describes_the_function_is_refused(option):
    solver = bl.Jaxopt("GradientDescent", **{option: True})
    with pytest.raises(ValueError, match=rf"jaxopt's GradientDescent gets its function .*: leave out {option}"):
        solver(GRADIENT[0], jnp.zeros(2), jnp.asarray(SLOPE), None)


@pytest.mark.slow("compiles each solver", fast="BoxOSQP")
@pytest.mark.parametrize("name", ["OSQP", "BoxOSQP"])
def test_a_program_without_a_feasible_point_is_a_failure_even_without_tol(name):
    infeasible = bl.KKT(valley, inequality=lambda x, theta, data: jnp.stack([x[0], 1 - x[0]]))  # 1 ≤ x₀ ≤ 0
    out = bl.Jaxopt(name, maxiter=20)(infeasible, (jnp.zeros(2), None, jnp.zeros(2)), jnp.asarray(SLOPE), None)
    assert not bl.Status(int(out.status)).ok
