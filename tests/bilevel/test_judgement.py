"""The status of each linear solve fits the error of its answer, at every scale, conditioning and precision.

Reference answers come from NumPy and SciPy in float64.
"""

import itertools
import warnings

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import pytest
import scipy.sparse.linalg
from jaxopt.objective import l2_multiclass_logreg_with_intercept
from problems import symmetric_with

import bilevel as bl

F32, F64 = jnp.float32, jnp.float64
SOLVERS = {
    "CG": bl.CG,
    "watched CG": lambda steps: bl.CG(steps, engine="watched"),
    "Cholesky": lambda _: bl.Cholesky(),
    "LU": lambda _: bl.LU(),
    "NormalCG": bl.NormalCG,
    "GMRES": bl.GMRES,
    "BiCGStab": bl.BiCGStab,
}
DEFINITE = ("CG", "watched CG", "Cholesky")
SCALES = (1e-20, 1e-10, 1.0, 1e10, 1e20)
CONDITIONS = (1.0, 1e2, 1e4, 1e6, 1e8, 1e12)


def status_of(record):
    return bl.Status(int(record.status)).name


def system(kappa, n, symmetric, seed):
    """Return a matrix with eigenvalues or singular values from 1/κ to 1, and a right-hand side."""
    rng = np.random.default_rng(seed)
    values = np.logspace(-np.log10(kappa), 0, n)
    if symmetric:
        return symmetric_with(values, rng), rng.normal(size=n)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    return (left * values) @ right, rng.normal(size=n)


def textbook_cg(matrix, b, steps):
    x, r, p = np.zeros_like(b), b, b
    squared = first = r @ r
    for _ in range(steps):
        if squared <= 1e-32 * first:
            break
        product = matrix @ p
        alpha = squared / (p @ product)
        x, r = x + alpha * p, r - alpha * product
        p, squared = r + (r @ r) / squared * p, r @ r
    return x


def by_the_same_algorithm(name, matrix, b, steps):
    """Return the answer of the same kind of algorithm in NumPy or SciPy, in the dtype of ``matrix``."""
    if name in ("LU", "Cholesky", "QR", "SVD"):
        return np.linalg.solve(matrix, b)
    if name == "LSMR":
        return scipy.sparse.linalg.lsmr(matrix, b, atol=1e-14, btol=1e-14, conlim=0, maxiter=steps)[0]
    if name == "NormalCG":
        return textbook_cg(matrix.T @ matrix, matrix.T @ b, steps)
    if name == "GMRES":
        return scipy.sparse.linalg.gmres(matrix, b, rtol=1e-14, restart=20, maxiter=-(-steps // 20))[0]
    if name == "BiCGStab":
        return scipy.sparse.linalg.bicgstab(matrix, b, rtol=1e-14, maxiter=steps)[0]
    return textbook_cg(matrix, b, steps)


def misjudged(name, dtype, steps, n, seeds, scales=SCALES, conditions=CONDITIONS, make=None):
    """Return messages about the solves whose status is wrong, and the number of all solves that were judged.

    ``make(steps)`` returns the solver. If ``make`` is None, the solver is ``SOLVERS[name](steps)``.
    """
    solver, limits = (make or SOLVERS[name])(steps), jnp.finfo(dtype)
    eps = float(limits.eps)
    solve = jax.jit(lambda matrix, b: solver(lambda v: matrix @ v, b))
    wrong, count = [], 0
    for kappa, of_matrix, of_b, seed in itertools.product(conditions, scales, (1e-20, 1.0, 1e20), seeds):
        plain, right = system(kappa, n, name in DEFINITE or seed % 2 == 0, seed)
        matrix, b = jnp.asarray(plain * of_matrix, dtype), jnp.asarray(right * of_b, dtype)
        matrix64, b64 = np.asarray(matrix, float) / of_matrix, np.asarray(b, float) / of_b
        exact, scale = np.linalg.solve(matrix64, b64), of_b / of_matrix
        entries = np.abs(exact) * scale
        if entries.min() < 1e6 * float(limits.tiny) or entries.max() > 0.1 * float(limits.max):
            continue  # the exact answer is out of the range of this dtype
        count += 1
        x, info = solve(matrix, b)
        error = np.linalg.norm(np.asarray(x, float) / scale - exact) / np.linalg.norm(exact)
        case = f"{name} {jnp.dtype(dtype)} {steps=} κ={kappa:g} A·{of_matrix:g} b·{of_b:g} {seed=}: {status_of(info)}"
        residual, true_kappa = float(info.relative_residual), np.linalg.cond(matrix64)
        if bl.Status(int(info.status)).ok:
            if not error <= true_kappa * (1.01 * residual + 10 * eps):
                wrong.append(f"{case} has an ok status and an error of {error:.2g} and a residual of {residual:.2g}")
        elif dtype == F64 or kappa < 1e5:
            # BiCGStab's residual rises before it falls, which costs digits. So in float32 the reference is SciPy's
            # BiCGStab in float32.
            precision = np.float32 if name == "BiCGStab" and dtype == F32 else np.float64
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = by_the_same_algorithm(name, matrix64.astype(precision), b64.astype(precision), steps)
            if np.linalg.norm(other - exact) <= 1e-6 * np.linalg.norm(exact):
                wrong.append(f"{case} has a failed status, and NumPy or SciPy is right to 1e-6")
    return wrong, count


@pytest.mark.slow("compiles each solver in two precisions", fast=("GMRES-float32", "*CG-float64", "LU-*"))
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", SOLVERS)
def test_no_answer_is_wrong_with_an_ok_status_or_right_with_a_failed_one(name, dtype):
    wrong, count = misjudged(name, dtype, 60, 8, (0, 1), (1e-20, 1.0, 1e20), (1.0, 1e4, 1e8))
    assert not wrong and count > 20


@pytest.mark.slow("solves hundreds of systems by each solver of Lineax")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ["LU", "QR", "SVD", "Cholesky", "CG", "NormalCG", "GMRES", "BiCGStab", "LSMR"])
def test_the_table_of_judgements_of_lineax(name, dtype):
    lineax = pytest.importorskip("lineax")
    eps = 1e-12 if dtype == F64 else 1e-5
    options = {"rtol": eps, "atol": eps, "max_steps": 200}
    iterative = {
        "GMRES": lambda: lineax.GMRES(**options, restart=20),
        "NormalCG": lambda: lineax.Normal(lineax.CG(**options)),
    }
    if name in ("LU", "QR", "SVD", "Cholesky"):
        solver = getattr(lineax, name)()
    else:
        solver = iterative.get(name, lambda: getattr(lineax, name)(**options))()
    scales, conditions = (1e-20, 1e-10, 1.0, 1e10, 1e20), (1.0, 1e2, 1e4, 1e8, 1e12)
    wrong, count = misjudged(name, dtype, 200, 6, (0, 1), scales, conditions, lambda steps: bl.Lineax(solver))
    if name == "GMRES" and dtype == F64:  # the only failed statuses of systems that SciPy's GMRES solves
        refused = [message for message in wrong if "κ=1e+12" in message and "STAGNATION has a failed" in message]
        assert len(refused) <= 10
        wrong = [message for message in wrong if message not in refused]
    assert not wrong, count
    assert count > 120


def test_conjugate_gradients_of_lineax_solve_large_systems_in_float32():
    lineax = pytest.importorskip("lineax")
    diagonal = jnp.linspace(0.1, 1.0, 200_000, dtype=F32)
    solver = bl.Lineax(lineax.CG(rtol=1e-5, atol=1e-8, max_steps=100), tol=1e-4)
    x, info = solver(lambda v: diagonal * v, jnp.ones(200_000, F32))
    assert status_of(info) == "CONVERGED"
    np.testing.assert_allclose(x * diagonal, 1.0, atol=1e-3)


@pytest.mark.slow("compiles a hypergradient for each linear solver and precision")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_table_of_judgements_of_least_squares(name, dtype):
    # w minimises ½‖s(Mw − θ)‖², so that the adjoint system has the matrix s²MᵀM, which is scaled from 1e-20 to 1e20.
    def residuals(w, theta, data):
        matrix, scale, _ = data
        return scale * (matrix @ w - theta)

    problem = bl.Problem(bl.LeastSquares(residuals), lambda w, theta, data: w @ data[2])
    solver = SOLVERS[name](60)
    function = bl.value_and_hypergradient(problem, lambda c, init, theta, data: init, bl.Implicit(solver), "ignore")
    solve, eps, wrong, count = jax.jit(function), float(jnp.finfo(dtype).eps), [], 0
    for kappa, scale, seed in itertools.product((1.0, 1e2, 1e4, 1e6), (1e-10, 1e-5, 1.0, 1e5, 1e10), range(3)):
        plain, cost = system(kappa, 6, False, seed)
        data = [jnp.asarray(part, dtype) for part in (plain, scale, cost)]
        matrix, of_matrix, of_cost = (np.asarray(part, float) for part in data)
        theta = data[0] @ jnp.ones(6, dtype)
        info = solve(theta, jnp.ones(6, dtype), data).linear
        squared = matrix.T @ matrix
        exact = np.linalg.solve(squared, of_cost)
        error = np.linalg.norm(np.asarray(info.solution, float) * of_matrix**2 - exact) / np.linalg.norm(exact)
        case = f"{name} κ={kappa:g} s={scale:g} {seed=}: {status_of(info)}, error {error:.2g}"
        condition = np.linalg.cond(squared)
        # A product with MᵀM is a product with M and then one with Mᵀ. Its relative rounding error is up to eps·κ(M)².
        if bl.Status(int(info.status)).ok:
            if not error <= condition * (1.01 * float(info.relative_residual) + 20 * eps):
                wrong.append(case)
        elif dtype == F64 or condition < 1e5:
            precision = np.float32 if name == "BiCGStab" and dtype == F32 else np.float64
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = by_the_same_algorithm(name, squared.astype(precision), of_cost.astype(precision), 60)
            if np.linalg.norm(other - exact) <= 1e-6 * np.linalg.norm(exact):
                wrong.append(f"{case}, and NumPy or SciPy is right to 1e-6")
        count += 1
    assert not wrong and count == 60


@pytest.mark.slow("solves thousands of systems")
@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("steps", [5, 200])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_large_table_of_judgements(name, dtype, steps, n):
    wrong, count = misjudged(name, dtype, steps, n, range(4))
    assert not wrong and count > 200


GENERAL = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.5, 0.0, 1.5]])


@pytest.mark.slow("compiles a hypergradient for each linear solver", fast="linear0")
@pytest.mark.parametrize("linear", [bl.NormalCG(8), bl.GMRES(3), bl.BiCGStab(8), bl.LU()])
def test_a_hypergradient_does_not_depend_on_the_scale_of_the_residual(linear):
    matrix, cost = jnp.asarray(GENERAL, F32), jnp.array([1.0, -1.0, 2.0], F32)
    condition = bl.Root(lambda w, theta, scale: scale * (matrix @ w - theta))
    problem = bl.Problem(condition, lambda w, theta, scale: w @ cost)

    def solved(condition, init, theta, data):
        return jnp.linalg.solve(matrix, theta)

    function = bl.value_and_hypergradient(problem, solved, bl.Implicit(linear))
    for scale in (1e-20, 1e-6, 1.0, 1e12, 1e20):
        out = function(jnp.ones(3, F32), jnp.zeros(3, F32), jnp.asarray(scale, F32))
        np.testing.assert_allclose(out.gradient, np.linalg.solve(GENERAL.T, [1, -1, 2]), rtol=1e-5)


class TestNoBetterThanZero:
    """Without ``tol``, a relative residual of 1 or more is a failure, because x = 0 has the relative residual 1.

    It is no failure if the residual of the start was larger still.
    """

    def test_a_series_that_diverges_is_a_breakdown(self):
        _, info = bl.Neumann(20)(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2))
        assert status_of(info) == "BREAKDOWN" and float(info.relative_residual) > 1e5
        assert status_of(bl.Neumann(20, 0.5)(lambda v: jnp.array([1.0, 3.0]) * v, jnp.ones(2))[1]) == "BUDGET_USED"

    def test_few_steps_of_cg_with_a_residual_below_one_are_a_spent_budget(self):
        matrix = symmetric_with(np.logspace(0, 2, 30), np.random.default_rng(0))
        _, info = bl.CG(5)(lambda v: matrix @ v, jnp.asarray(np.random.default_rng(1).normal(size=30)))
        assert 0.1 < float(info.relative_residual) < 1 and status_of(info) == "BUDGET_USED"

    @pytest.mark.slow("compiles each solver with a start", fast="solver0")
    @pytest.mark.parametrize("solver", [bl.CG(1), bl.Neumann(1, 0.2), bl.GMRES(1)])
    def test_a_start_that_is_worse_than_zero_is_a_spent_budget_if_the_solve_improves_it(self, solver):
        matrix, b = jnp.diag(jnp.array([1.0, 2.0, 4.0])), 1e-3 * jnp.ones(3)
        _, info = solver(lambda v: matrix @ v, b, jnp.array([3.0, -1.0, 1.0]))
        assert float(info.relative_residual) > 1 and status_of(info) == "BUDGET_USED"

    def test_an_answer_that_outgrew_its_residual_is_a_breakdown(self):
        from bilevel.linear import diagnosis

        # A x = (0.9, 0), so the relative residual of 0.14 is below 1. The entry 1e12 of x lies in the null space of A.
        matrix, b = jnp.diag(jnp.array([1.0, 0.0])), jnp.array([1.0, 0.1])
        x = jnp.array([0.9, 1e12])
        judged = diagnosis.report(lambda v: matrix @ v, b, x, None, norm=jnp.float64(1.0))
        assert float(judged.relative_residual) < 0.2 and status_of(judged) == "BREAKDOWN"
        assert status_of(diagnosis.report(lambda v: matrix @ v, b, x, None)) == "BUDGET_USED"

    def test_an_answer_that_overflows_is_nonfinite(self):
        _, info = bl.LU()(lambda v: jnp.asarray(1e-30, F32) * v, jnp.full(2, 1e20, F32))
        assert status_of(info) == "NONFINITE"


class TestSingularAndConsistent:
    """Systems with a singular matrix A of n rows and b = A·1, unless a test says that there is no solution.

    Each iterative solver finds the solution of least norm, and stops there.
    """

    @staticmethod
    def solved(solver, dtype, rank=6, n=8, seeds=(0,)):
        """Return the largest error ‖x − A⁺b‖ over systems of random matrices, and the last report."""
        solve, errors = jax.jit(lambda matrix, b: solver(lambda v: matrix @ v, b)), []
        for seed in seeds:
            factor = np.random.default_rng(seed).normal(size=(rank, n))
            matrix = factor.T @ factor
            b = matrix @ np.ones(n)
            x, info = solve(jnp.asarray(matrix, dtype), jnp.asarray(b, dtype))
            errors.append(np.linalg.norm(np.asarray(x) - np.linalg.pinv(matrix) @ b))
        return max(errors), info

    @pytest.mark.slow("compiles each solver in two precisions", fast=("NormalCG-float64", "watched CG-float64"))
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("name", ["CG", "watched CG", "NormalCG", "GMRES", "BiCGStab"])
    def test_a_budget_that_is_too_large_does_not_move_x_along_the_null_space(self, name, dtype):
        for steps, rank, n in ((20, 6, 8), (1000, 10, 40)):
            error, info = self.solved(SOLVERS[name](steps), dtype, rank, n, range(8))
            assert error < (1e-12 if dtype == "float64" else 1e-3)
            assert status_of(info) == "BUDGET_USED"

    def test_normal_cg_stops_at_its_tolerance(self):
        _, info = self.solved(bl.NormalCG(20, tol=1e-6), F64)
        assert status_of(info) == "CONVERGED" and int(info.iterations) < 10

    @pytest.mark.parametrize("name", ["watched CG", "NormalCG", "GMRES", "LU"])
    def test_a_singular_matrix_without_a_solution_is_singular(self, name):
        _, info = SOLVERS[name](10)(lambda v: jnp.array([1.0, 0.0]) * v, jnp.array([1.0, 2.0]))
        assert status_of(info) == "SINGULAR"


@pytest.mark.parametrize("linear", [bl.LU(), bl.Cholesky()])
def test_a_factorisation_is_judged_by_its_backward_error_and_reports_the_conditioning(linear):
    import scipy.linalg

    b = np.array([1, -1, 2, -2, 3, -3, 4, -4.0])
    hilbert = scipy.linalg.hilbert(8)
    x, info = linear(lambda v: hilbert @ v, jnp.asarray(b))
    np.testing.assert_allclose(x, scipy.linalg.invhilbert(8, exact=True) @ b, rtol=1e-6)
    assert status_of(info) == "ILL_CONDITIONED" and bl.Status.ILL_CONDITIONED.ok
    assert float(info.rcond) == pytest.approx(1 / np.linalg.cond(hilbert, 1), rel=0.5)
    _, easy = linear(lambda v: jnp.array([1.0, 2.0, 4.0]) * v, jnp.ones(3))
    assert status_of(easy) == "CONVERGED" and float(easy.rcond) == 0.25


@pytest.mark.slow("compiles GMRES for each system", fast="2")
@pytest.mark.parametrize("seed", range(3))
def test_gmres_solves_ill_conditioned_systems_in_float32(seed):
    plain, right = system(2e4, 40, False, seed)
    matrix, b = jnp.asarray(plain, F32), jnp.asarray(right, F32)
    x, info = bl.GMRES(40, restart=40)(lambda v: matrix @ v, b)
    exact = np.linalg.solve(np.asarray(matrix, float), right)
    assert np.linalg.norm(np.asarray(x) - exact) < 1e-2 * np.linalg.norm(exact) and status_of(info) == "BUDGET_USED"


@pytest.mark.slow("compiles each solver")
def test_bicgstab_breaks_down_on_a_quarter_turn_and_other_solvers_do_not():
    turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    statuses = {name: status_of(SOLVERS[name](8)(lambda v: turn @ v, jnp.array([1.0, 2.0]))[1]) for name in SOLVERS}
    assert statuses["BiCGStab"] == "BREAKDOWN"
    assert statuses["GMRES"] == statuses["NormalCG"] == "BUDGET_USED" and statuses["LU"] == "CONVERGED"


@pytest.mark.parametrize("solver", [*(make(4) for make in SOLVERS.values()), bl.Neumann(4), bl.Nystrom(2)])
def test_an_operator_that_is_not_square_is_refused(solver):
    wide = jnp.ones((1, 3))
    with pytest.raises(ValueError, match=r"needs a square operator.* pass v ↦ Aᵀ\(Av\) and Aᵀb"):
        solver(lambda v: wide @ v, jnp.ones(3))


def test_a_start_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"init must have the shapes of b: b has \(3,\), init has \(2,\)"):
        bl.NormalCG(4)(lambda v: jnp.ones((3, 2)) @ v, jnp.ones(3), jnp.zeros(2))


@pytest.mark.slow("compiles a solve in two precisions", fast="float32")
@pytest.mark.parametrize("dtype", [F32, F64])
def test_products_that_cancel_are_not_taken_for_an_asymmetry(dtype):
    matrix = np.eye(20) - symmetric_with(np.linspace(1e-4, 3e-4, 20), np.random.default_rng(0))
    matrix = jnp.asarray(matrix + matrix.T, dtype) / 2
    condition = bl.FixedPoint(lambda w, theta, data: matrix @ w + theta, symmetric=True)
    problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w * jnp.arange(20).astype(dtype)))
    function = bl.value_and_hypergradient(problem, lambda condition, init, theta, data: theta, bl.Implicit(bl.LU()))
    assert bl.Status(int(function(jnp.ones(20, dtype), jnp.zeros(20, dtype), None).status)).ok


@pytest.mark.parametrize("linear", [bl.LU(), bl.Cholesky()])
def test_a_factorisation_of_an_exact_matrix_is_accepted_where_its_products_are_noise(linear):
    # The eigenvalues of I − M are about 1e-6, so that rounding makes up several per cent of a product x − Mx.
    matrix = np.eye(20) - symmetric_with(np.linspace(1e-6, 3e-6, 20), np.random.default_rng(0))
    matrix = jnp.asarray(matrix + matrix.T, F32) / 2
    b = jnp.arange(20).astype(F32)
    x, info = linear(lambda v: v - matrix @ v, b)
    exact = np.linalg.solve(np.eye(20) - np.asarray(matrix, float), np.arange(20))
    assert np.linalg.norm(np.asarray(x, float) - exact) < 1e-6 * np.linalg.norm(exact)
    assert float(info.relative_residual) > 1e-3 and status_of(info) == "ILL_CONDITIONED"


@pytest.mark.slow("compiles Newton's method for each number of directions", fast="10-float64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cg_steps", [3, 5, 10, 20])
def test_newton_steps_do_not_diverge_along_a_null_direction(cg_steps, dtype):
    # Adding one number to all intercepts changes no probability, so the objective is convex but not strictly convex.
    solver, condition = bl.HessianFree(30, cg_steps=cg_steps), bl.Stationary(l2_multiclass_logreg_with_intercept)
    solve = jax.jit(lambda theta, init, data: bl.solve(solver, condition, init, theta, data))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        data = jnp.asarray(rng.normal(size=(30, 1)), dtype), jnp.asarray(rng.integers(0, 3, 30))
        found = solve(jnp.asarray(0.1, dtype), (jnp.zeros((1, 3), dtype), jnp.zeros(3, dtype)), data)
        assert float(found.residual_norm) < (1e-12 if dtype == "float64" else 1e-5)
        assert float(jnp.abs(found.w[1]).max()) < 2


def stated(solver, linear, condition, theta, init, outer=None):
    """Return the message of a failed hypergradient."""
    problem = bl.Problem(condition, outer or (lambda w, theta, data: jnp.sum(w)))
    with pytest.raises(bl.HypergradientError) as caught:
        bl.value_and_hypergradient(problem, solver, bl.Implicit(linear))(theta, init, None)
    return str(caught.value)


class TestRemedies:
    """The message about a failed solve names a number that was computed or tried for the problem at hand."""

    curvatures = np.array([1.0, 10.0, 300.0])

    def message(self, solver, linear):
        condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum(self.curvatures * w**2) - jnp.sum(theta * w))
        return stated(solver, linear, condition, jnp.ones(3), jnp.zeros(3))

    def exact(self, condition, init, theta, data):
        return theta / self.curvatures

    @pytest.mark.slow("compiles a failing solve and its remedy", fast="2000")
    @pytest.mark.parametrize("steps", [20, 2000])
    def test_the_limit_of_the_step_size(self, steps):
        message = self.message(bl.GradientDescent(0.01 if steps == 20 else 1.0, steps, tol=1e-6), bl.CG(3))
        assert "the step_size must be below 0.00667" in message
        bl.solve(bl.GradientDescent(0.0066, 5000, tol=1e-6), bl.Stationary(lambda w, t, d: 150 * w**2), 1.0, 0.0, None)

    @pytest.mark.slow("compiles a failing solve and its remedy")
    def test_the_step_size_of_a_series(self):
        message = self.message(self.exact, bl.Neumann(20))
        assert "BREAKDOWN" in message and "a step_size below 2/L = 0.00667" in message and "about 691 terms" in message
        _, info = bl.Neumann(691, 1 / 300)(lambda v: self.curvatures * v, jnp.ones(3))
        assert float(info.relative_residual) < 0.1

    def test_the_steps_of_conjugate_gradients_and_a_factorisation(self):
        message = self.message(self.exact, bl.CG(1, tol=1e-6))
        assert "MAX_STEPS" in message and "at least 300" in message and "LU() solves this system of 3" in message

    @pytest.mark.slow("compiles a failing solve and its remedy")
    def test_a_ridge_for_a_singular_matrix(self):
        condition = bl.Stationary(lambda w, theta, data: 0.5 * w[0] ** 2 - theta * w[0])
        message = stated(
            lambda condition, init, theta, data: theta * jnp.ones(2), bl.LU(), condition, 1.0, jnp.zeros(2)
        )
        assert "SINGULAR" in message and "a ridge of 1e-08" in message


class Eager(jaxopt.GradientDescent):
    """Gradient descent with a hundredth of the gradient's norm as its error measure, so that it stops too early."""

    def update(self, params, state, *arguments, **options):
        step = super().update(params, state, *arguments, **options)
        return step._replace(state=step.state._replace(error=0.01 * step.state.error))


class TestStoppedByItself:
    """jaxopt compares tol with an error measure of its own, and the status compares tol with ‖F‖."""

    def test_the_status_distinguishes_a_solver_that_stopped_from_one_that_spent_its_budget(self):
        objective = bl.Stationary(lambda w, theta, data: 1e-3 * jnp.sum((w - theta) ** 2))
        for steps, status in ((3, "MAX_STEPS"), (2500, "STOPPED"), (5000, "CONVERGED")):
            solver = bl.Jaxopt(Eager, maxiter=steps, tol=1e-6, stepsize=1.0, acceleration=False)
            if status == "CONVERGED":
                solver = bl.Jaxopt("GradientDescent", maxiter=steps, tol=1e-6, stepsize=1.0, acceleration=False)
            found = bl.solve(solver, objective, jnp.zeros(2), jnp.ones(2), None)
            assert status_of(found) == status

    @staticmethod
    def condition(step_size):
        rng = np.random.default_rng(0)
        x, y = jnp.asarray(rng.normal(size=(20, 5))), jnp.asarray(rng.normal(size=20))

        def objective(w, theta, data):
            return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * theta * jnp.sum(w**2)

        return bl.Projected(objective, lambda w, theta, data: jnp.maximum(w, 0), step_size=step_size)

    @pytest.mark.slow("compiles a line search with several tolerances")
    def test_an_early_end_above_tol_has_the_status_stopped_and_the_message_names_a_tol_that_works(self):
        solver = bl.Jaxopt("ProjectedGradient", tol=1e-6, maxiter=5000)
        message = stated(solver, bl.LU(), self.condition(100.0), 1.0, jnp.zeros(5))
        assert "inner solve, STOPPED: the solver stopped by an error measure of its own" in message
        named = float(message.partition("With tol=")[2].partition(",")[0])
        again = bl.Jaxopt("ProjectedGradient", tol=named, maxiter=5000)
        assert float(bl.solve(again, self.condition(100.0), jnp.zeros(5), jnp.array(1.0), None).residual_norm) < 1e-6

    @pytest.mark.slow("runs a line search to the end of its budget")
    def test_a_line_search_that_stalls_is_max_steps_and_the_message_names_a_stepsize_that_works(self):
        solver = bl.Jaxopt("ProjectedGradient", tol=1e-12, maxiter=2000)
        message = stated(solver, bl.LU(), self.condition(0.1), 1.0, jnp.zeros(5))
        named = float(message.partition("With stepsize=")[2].partition(",")[0])
        again = bl.Jaxopt("ProjectedGradient", tol=1e-12, maxiter=2000, stepsize=named)
        found = bl.solve(again, self.condition(0.1), jnp.zeros(5), jnp.array(1.0), None)
        assert "MAX_STEPS" in message and float(found.residual_norm) < 1e-11 and int(found.steps) < 1000
