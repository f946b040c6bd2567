"""Numerical faults are reported with a status, the stage that failed, and a remedy."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import symmetric_with

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = [status.name for status in bl.Status]


def system(diagonal, dtype=jnp.float64):
    """Return a diagonal operator and a right-hand side of ones."""
    diagonal = jnp.asarray(diagonal, dtype)
    return lambda v: diagonal * v, jnp.ones_like(diagonal)


def status_of(info):
    return bl.Status(int(info.status)).name


def rotated(eigenvalues, dtype, seed=0):
    """Return a dense symmetric operator with these eigenvalues and a random right-hand side."""
    rng = np.random.default_rng(seed)
    matrix = jnp.asarray(symmetric_with(eigenvalues, rng), dtype)
    return lambda v: matrix @ v, jnp.asarray(rng.normal(size=len(eigenvalues)), dtype)


class TestIndefinite:
    """CG divides by the curvature of a direction even if it is negative, so x may be right although A is indefinite."""

    @pytest.mark.parametrize("steps", [2, 3, 20])
    def test_the_watched_engine_reports_negative_curvature_that_the_solution_does_not_show(self, steps):
        matvec, b = system([2.0, -1.0, 0.5])  # ⟨x, Ax⟩ = ½ − 1 + 2 > 0 at the solution
        x, info = bl.CG(steps, engine="watched")(matvec, b)
        assert status_of(info) == "NEGATIVE_CURVATURE"
        assert float(jnp.vdot(x, matvec(x))) > 0 or steps == 2

    def test_the_default_engine_reports_negative_curvature_along_its_solution_only(self):
        for diagonal in ([1.0, -1.0], [-1.0, -1.0], [1.0, -0.5]):  # ⟨x, Ax⟩ = ⟨x, b⟩ is not above zero
            assert status_of(bl.CG(4)(*system(diagonal))[1]) == "NEGATIVE_CURVATURE"
        # Here ⟨x, Ax⟩ is above zero, and the default engine does not see the search direction of negative curvature.
        assert status_of(bl.CG(4)(*system([2.0, -1.0, 0.5]))[1]) == "BUDGET_USED"

    @pytest.mark.parametrize("diagonal", [[1.0, -1.0], [1.0, -3.0], [-1.0, -1.0]])
    def test_a_saddle_is_negative_curvature(self, diagonal):
        assert status_of(bl.CG(4, engine="watched")(*system(diagonal))[1]) == "NEGATIVE_CURVATURE"

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
    def test_the_watched_engine_computes_what_jaxopt_computes(self, dtype):
        from jaxopt.linear_solve import solve_cg

        matvec, b = rotated(np.linspace(-1, 5, 12), dtype)
        unit = b / jnp.linalg.norm(b.astype(jnp.float64)).astype(dtype)
        eps = float(jnp.finfo(dtype).eps)
        with jax.numpy_dtype_promotion("standard"):
            plain = jax.jit(lambda b: solve_cg(matvec, b, maxiter=6, tol=eps**2))(unit)
            watched, info = jax.jit(lambda b: bl.CG(6, engine="watched")(matvec, b))(unit)
        assert status_of(info) == "NEGATIVE_CURVATURE"
        np.testing.assert_allclose(np.asarray(watched, float), np.asarray(plain, float), rtol=20 * eps, atol=20 * eps)

    @pytest.mark.slow("solves a dozen systems of different scales")
    def test_definite_operators_are_not_reported_at_any_scale(self):
        for scale in (1e-12, 1.0, 1e12):
            for dtype in (jnp.float32, jnp.float64):
                matvec, b = rotated(scale * np.logspace(0, 3, 12), dtype)
                for solver in (bl.CG(30), bl.CG(30, engine="watched")):
                    assert status_of(solver(matvec, b)[1]) == "BUDGET_USED"

    @pytest.mark.slow("tries regularisations until one suffices", fast="0.25-11.0")
    @pytest.mark.parametrize("strength, ridge", [(1.0, 2.0), (0.25, 11.0)])
    def test_the_error_names_the_regularisation_that_suffices(self, strength, ridge):
        # H + λI has the eigenvalues λ − 3 and λ. The ridge is added to I + H/λ, which has the eigenvalue 1 − 3/λ.
        def loss(w, theta, data):
            return 0.5 * jnp.sum(jnp.array([-3.0, 0.0]) * w**2) + jnp.sum(w)

        def at_the_saddle(condition, init, theta, data):
            slope = jnp.array([-3.0, 0.0]) + condition.strength
            return (condition.strength * theta - 1) / slope

        def hypergradient(strength, ridge=0.0):
            problem = bl.Problem(bl.Proximal(loss, strength), lambda w, theta, data: jnp.sum(w))
            linear = bl.CG(5, ridge=ridge, engine="watched")
            return bl.value_and_hypergradient(problem, at_the_saddle, bl.Implicit(linear))(
                jnp.zeros(2), jnp.zeros(2), None
            )

        lacking = 3 - strength
        text = rf"NEGATIVE_CURVATURE.*at most -{lacking:g}: increase λ by more than {lacking:g}, or use a ridge above "
        with pytest.raises(bl.HypergradientError, match=text + f"{ridge:g}, which is added to I"):
            hypergradient(strength)
        with pytest.raises(bl.HypergradientError, match="NEGATIVE_CURVATURE"):
            hypergradient(strength, 0.9 * ridge)
        hypergradient(strength, 1.1 * ridge)
        hypergradient(strength + 1.1 * lacking)


class TestSingular:
    @pytest.mark.parametrize("solver", [bl.CG(5, engine="watched"), bl.LU()])
    @pytest.mark.parametrize("diagonal", [[1.0, 0.0], [0.0, 0.0]])
    def test_a_null_direction_is_singular(self, solver, diagonal):
        assert status_of(solver(*system(diagonal))[1]) == "SINGULAR"

    @pytest.mark.slow("solves with each solver")
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
    def test_least_squares_without_a_penalty_and_with_few_samples_is_singular(self, dtype):
        rng = np.random.default_rng(0)
        x, b = jnp.asarray(rng.normal(size=(5, 12)), dtype), jnp.asarray(rng.normal(size=12), dtype)
        for solver in (bl.CG(8, engine="watched"), bl.LU()):
            assert status_of(solver(lambda v: x.T @ (x @ v), b)[1]) == "SINGULAR"


def stopped_early():
    """Compute a hypergradient whose inner solve ends after 3 steps with the residual ½³, which is above its tol."""
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)
    function = bl.value_and_hypergradient(problem, bl.GradientDescent(0.5, 3, tol=1e-6), bl.Implicit(bl.CG(1)))
    return function(1.0, 0.0, None)


class TestShortOfTheTolerance:
    def test_an_exhausted_budget_is_max_steps_and_a_recursion_that_stops_is_stagnation(self):
        # κ = 1e6 in float32: CG's recursive residual falls below tol. The true residual stays near eps·κ = 0.1.
        matvec, b = rotated(np.logspace(0, 6, 60), jnp.float32)
        _, short = bl.CG(5, tol=1e-5, engine="watched")(matvec, b)
        _, long = bl.CG(3000, tol=1e-5, engine="watched")(matvec, b)
        assert status_of(short) == "MAX_STEPS" and status_of(long) == "STAGNATION"
        assert float(long.relative_residual) > 1e-3

    @pytest.mark.parametrize("engine", ["jaxopt", "watched"])
    def test_a_solve_costs_its_steps_and_one_product_whether_it_meets_its_tolerance_or_not(self, engine):
        calls = []

        def counted(v):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.array([1.0, 2.0, 3.3]) * v

        _, long = bl.CG(3, tol=1e-10, engine=engine)(counted, jnp.ones(3))
        jax.effects_barrier()
        met = len(calls)
        _, short = bl.CG(2, tol=1e-10, engine=engine)(counted, jnp.ones(3))
        jax.effects_barrier()
        assert met == 4  # three steps and the true residual; a start at zero costs no product
        assert len(calls) - met == 3  # two steps and the true residual
        assert status_of(long) == "CONVERGED" and status_of(short) == "MAX_STEPS"

    @pytest.mark.slow("compiles CG with both engines")
    def test_the_watched_engine_reports_the_iterations_it_took(self):
        matvec, b = rotated(np.repeat([1.0, 2.0, 5.0], 4), jnp.float64)  # three eigenvalues: three iterations
        _, info = bl.CG(20, tol=1e-10, engine="watched")(matvec, b)
        assert int(info.iterations) == 3 and status_of(info) == "CONVERGED"
        assert 1.0 <= float(info.least_curvature) <= 5.0
        assert bl.CG(20, tol=1e-10)(matvec, b)[1].iterations is None
        _, zero = bl.CG(20, engine="watched")(matvec, 0 * b)
        assert int(zero.iterations) == 0

    def test_the_least_curvature_is_a_rayleigh_quotient_of_the_operator(self):
        matvec, b = rotated(np.linspace(-1e-3, 5, 8), jnp.float64)
        _, info = bl.CG(8, engine="watched")(matvec, b)
        assert status_of(info) == "NEGATIVE_CURVATURE" and -1e-3 <= float(info.least_curvature) < 0

    def test_an_inner_solve_that_ends_early_is_max_steps(self):
        with pytest.raises(bl.HypergradientError, match="inner solve, MAX_STEPS") as caught:
            stopped_early()
        assert float(caught.value.result.inner.residual_norm) == 0.125


SHEAR = np.array([[1.0, 5.0], [0.0, 1.0]])


def solved_by(matrix):
    """Return an inner solver that finds w = matrix⁻¹θ."""
    return lambda condition, init, theta, data: jnp.linalg.solve(jnp.asarray(matrix), theta)


class TestNotSymmetric:
    """A = [[1, 5], [0, 1]] is not symmetric, so the adjoint system needs Aᵀ.

    With ∂outer/∂w = (−14, −14), solving with Aᵀ gives (−14, 56), and solving with A gives (56, −14).
    """

    @staticmethod
    def problem(matrix):
        condition = bl.Root(lambda w, theta, data: jnp.asarray(matrix) @ w - theta, symmetric=True)
        return bl.Problem(condition, lambda w, theta, data: -14 * w[0] - 14 * w[1])

    @pytest.mark.slow("compiles each solver", fast=("linear0", "linear2"))
    @pytest.mark.parametrize("linear", [bl.CG(2), bl.LU(), bl.Cholesky(), bl.GMRES(2)])
    def test_a_false_declaration_is_reported(self, linear):
        function = bl.value_and_hypergradient(self.problem(SHEAR), solved_by(SHEAR), bl.Implicit(linear))
        with pytest.raises(bl.HypergradientError, match="NONSYMMETRIC: the condition is declared symmetric") as caught:
            function(jnp.ones(2), jnp.zeros(2), None)
        if isinstance(linear, bl.LU | bl.GMRES):  # LU and GMRES need no symmetry, and solve with Aᵀ
            np.testing.assert_allclose(caught.value.result.gradient, [-14.0, 56.0], rtol=1e-12)

    @pytest.mark.slow("compiles each solver in two precisions", fast="float32")
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
    def test_a_true_declaration_is_not_reported(self, dtype):
        matrix = jnp.asarray(symmetric_with(np.logspace(0, 5, 6), np.random.default_rng(0)), dtype)
        condition = bl.Root(lambda w, theta, data: matrix @ w - theta, symmetric=True)
        problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w))
        function = bl.value_and_hypergradient(problem, solved_by(matrix), bl.Implicit(bl.LU()))
        out = function(jnp.ones(6, dtype), matrix[0], None)
        # κ = 1e5 costs more than half of the digits in float32, and less than half of them in float64.
        assert status_of(out) == ("ILL_CONDITIONED" if dtype == jnp.float32 else "BUDGET_USED")

    def test_the_layer_uses_the_transpose_whatever_is_declared(self):
        layer = bl.implicit_layer(self.problem(SHEAR).condition, solved_by(SHEAR), bl.LU())
        jacobian = jax.jacrev(lambda theta: layer(theta, jnp.zeros(2), None))(jnp.ones(2))
        np.testing.assert_allclose(jacobian, np.linalg.inv(SHEAR), rtol=1e-14)


def poisoned(stage):
    """Return a problem in which ``stage`` makes a NaN or an infinity. For "data" the problem itself makes neither."""

    def objective(w, theta, data):
        return 0.5 * (w - theta) ** 2 * (jnp.nan if stage == "loss" else 1.0) + data * w

    def outer(w, theta, data):
        bad = jnp.nan if stage == "outer" else 1.0
        # At zero, the square root has the value 0 and the derivative ∞.
        return w * bad + (jnp.sqrt(theta - 1.0) if stage == "gradient" else 0.0)

    return bl.Problem(bl.Stationary(objective), outer)


class TestNotFinite:
    @pytest.mark.slow("compiles three methods for each stage", fast="method0-*")
    @pytest.mark.parametrize(
        ("stage", "named"),
        [("data", "inner solve"), ("loss", "inner solve"), ("outer", "outer function"), ("gradient", "gradient")],
    )
    @pytest.mark.parametrize("method", [bl.Implicit(bl.CG(2)), bl.Unrolled(), bl.ForwardUnrolled()])
    def test_the_error_names_the_first_stage_that_is_not_finite(self, stage, named, method):
        function = bl.value_and_hypergradient(poisoned(stage), bl.GradientDescent(0.5, 40), method)
        data = jnp.nan if stage == "data" else 0.0
        with pytest.raises(bl.HypergradientError, match=f"^{named}, NONFINITE: [^;]*$") as caught:
            function(1.0, 0.0, data)
        assert status_of(caught.value.result) == "NONFINITE"

    @pytest.mark.slow("compiles a hypergradient that fails")
    def test_a_product_that_is_not_finite_is_reported_by_the_linear_solve(self):
        def residual(w, theta, data):  # finite, with a derivative that is not finite
            return jnp.sqrt(jnp.abs(w - theta))

        problem = bl.Problem(bl.Root(residual), lambda w, theta, data: w)
        function = bl.value_and_hypergradient(problem, lambda c, init, theta, data: theta, bl.Implicit(bl.GMRES(2)))
        with pytest.raises(bl.HypergradientError, match=r"^linear solve, NONFINITE"):
            function(1.0, 0.0, None)

    def test_minimize_does_not_move_theta(self):
        import optax

        found = bl.minimize(
            poisoned("gradient"),
            1.0,
            0.0,
            0.0,
            bl.GradientDescent(0.5, 40),
            bl.Implicit(bl.CG(1)),
            optax.sgd(0.1),
            steps=2,
            on_failure="ignore",
        )
        assert float(found.theta) == 1.0


def test_an_error_can_be_pickled():
    with pytest.raises(bl.HypergradientError) as caught:
        stopped_early()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert float(copy.result.inner.residual_norm) == 0.125


class TestBatches:
    """One bad task among eight is reported, and the numbers of the other tasks do not change."""

    @staticmethod
    def function(on_failure="raise"):
        condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum(data * w**2) - jnp.sum(theta * w))
        problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w**2))
        return bl.value_and_hypergradient(
            problem, bl.HessianFree(3), bl.Implicit(bl.CG(4, engine="watched")), on_failure
        )

    @pytest.mark.slow("compiles a batch for each fault", fast="nan-NONFINITE")
    @pytest.mark.parametrize(
        ("bad", "status"), [(jnp.nan, "NONFINITE"), (-1.0, "NEGATIVE_CURVATURE"), (0.0, "SINGULAR")]
    )
    def test_the_other_tasks_do_not_change(self, bad, status):
        curvatures = jnp.asarray(np.random.default_rng(0).uniform(1, 3, size=(8, 3)))
        batch = jax.jit(jax.vmap(self.function(), in_axes=(None, None, 0)))
        good = batch(jnp.ones(3), jnp.zeros(3), curvatures)
        out = batch(jnp.ones(3), jnp.zeros(3), curvatures.at[5, 1].set(bad))
        others = np.arange(8) != 5
        np.testing.assert_array_equal(out.gradient[others], good.gradient[others])
        assert NAMES[int(out.status[5])] == status and (np.asarray(out.status)[others] <= bl.Status.BUDGET_USED).all()

    @pytest.mark.slow("compiles a failing batch")
    def test_each_policy_names_the_failed_tasks(self):
        curvatures = jnp.ones((8, 3)).at[jnp.array([2, 5]), 1].set(jnp.nan)
        out = jax.vmap(self.function(), in_axes=(None, None, 0))(jnp.ones(3), jnp.zeros(3), curvatures)
        with pytest.raises(bl.HypergradientError, match=r"^inner solve, NONFINITE in 2 of 8 tasks \(2, 5\): "):
            bl.check_status(out)
        with pytest.warns(RuntimeWarning, match="2 of 8"):
            bl.check_status(out, "warn")
        bl.check_status(out, "ignore")
        with pytest.raises(ValueError, match='must be "raise", "warn" or "ignore", got \'shout\''):
            bl.check_status(out, "shout")


LEAVES = st.sampled_from(
    [
        np.float64(0.7),
        np.array([0.3, -0.2], np.float32),
        np.int64(3),
        np.array([True, False]),
        np.zeros((0,)),
        np.zeros((2, 0), np.int32),
    ]
)
TREES = st.recursive(
    LEAVES, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from("ab"), inside)
)
METHODS = [
    bl.Implicit(bl.CG(2)),
    bl.Unrolled(),
    bl.ForwardUnrolled(),
    bl.OneStep(),
    bl.FiniteDifference(bl.CG(2)),
    bl.ValuePenalty(10.0),
    bl.EvolutionStrategies(2),
]


class TestLeaves:
    """Leaves without a derivative pass through every method, in any tree."""

    @staticmethod
    def problem():
        def pull(theta):
            floats = [leaf for leaf in jax.tree.leaves(theta) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            return sum((jnp.sum(leaf.astype(jnp.float64) ** 2) for leaf in floats), jnp.zeros(()))

        def objective(w, theta, data):
            return 0.5 * (w["w"] - pull(theta)) ** 2

        return bl.Problem(bl.Stationary(objective), lambda w, theta, data: w["w"])

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_takes_mixed_leaves(self, method):
        self.check(
            {"x": jnp.array([0.3, -0.2]), "n": 3, "mask": jnp.array([True, False]), "none": jnp.zeros(0)}, method
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_takes_a_theta_without_floating_leaves(self, method):
        self.check({"n": 3, "nothing": None}, method)

    @pytest.mark.slow("compiles a hypergradient for each kind of tree")
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(theta=TREES)
    def test_implicit_takes_any_tree(self, theta):
        self.check(theta, bl.Implicit(bl.CG(2)))

    def check(self, theta, method):
        function = bl.value_and_hypergradient(self.problem(), bl.GradientDescent(1.0, 1), method)
        theta = jax.tree.map(jnp.asarray, theta)
        out = function(theta, {"w": 0.0, "empty": jnp.zeros(0)}, {"count": 1, "none": jnp.zeros(0, bool)})
        assert jax.tree.structure(out.gradient) == jax.tree.structure(theta)
        for leaf, slope in zip(jax.tree.leaves(theta), jax.tree.leaves(out.gradient), strict=True):
            assert slope.dtype == leaf.dtype and slope.shape == leaf.shape
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                assert not slope.any()
            else:  # dw/dθ = 2θ. FiniteDifference has an error of eps^⅔. EvolutionStrategies(2) samples both directions.
                np.testing.assert_allclose(slope, 2 * leaf, rtol=1e-6, atol=1e-9)

    def test_the_layer_takes_mixed_leaves(self):
        layer = bl.implicit_layer(self.problem().condition, bl.GradientDescent(1.0, 1), bl.CG(1))
        slope = jax.grad(lambda x: layer({"x": x, "n": 3}, {"w": 0.0}, None)["w"])(0.7)
        assert float(slope) == pytest.approx(1.4)

    def test_complex_and_integer_variables_are_refused_with_a_reason(self):
        function = bl.value_and_hypergradient(self.problem(), bl.GradientDescent(1.0, 1), bl.Implicit(bl.CG(1)))
        with pytest.raises(TypeError, match=r"outer variables are real, got complex128 at theta\['z'\]: .*imaginary"):
            function({"z": 1j}, {"w": 0.0}, None)
        with pytest.raises(TypeError, match=r"inner variables are floating point, got int64 at init\['w'\]"):
            function({"x": 1.0}, {"w": 0}, None)
        with pytest.raises(TypeError, match="inner variables are floating point, got complex128"):
            function({"x": 1.0}, lambda theta, data: {"w": 1j}, None)

    def test_complex_data_are_allowed(self):
        problem = bl.Problem(
            bl.Stationary(lambda w, theta, data: 0.5 * jnp.abs(data["z"]) ** 2 * w**2 - theta * w),
            lambda w, theta, data: w,
        )
        function = bl.value_and_hypergradient(problem, bl.GradientDescent(0.2, 200), bl.Implicit(bl.CG(1)))
        assert float(function(1.0, 0.0, {"z": 1j + 1, "steps": 3}).gradient) == pytest.approx(0.5)


class TestDtypes:
    @pytest.mark.slow("compiles a hypergradient for each dtype", fast=("bfloat16-True", "float32-False"))
    @pytest.mark.parametrize("x64", [True, False])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
    def test_dtypes_are_kept(self, dtype, x64):
        if dtype == jnp.float64 and not x64:
            pytest.skip("there is no float64 without x64")
        with jax.enable_x64(x64):
            condition = bl.Proximal(lambda w, theta, data: jnp.sum((w["a"] - data) ** 2), 1.0)
            problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w["a"] * w["a"]))
            function = bl.value_and_hypergradient(problem, bl.GradientDescent(0.25, 30), bl.Implicit(bl.CG(2)))
            theta = {"a": jnp.array([1.0, -2.0], dtype)}
            out = function(theta, bl.identity_center, jnp.ones(2, dtype))
            assert out.gradient["a"].dtype == out.inner.w["a"].dtype == dtype
            accumulation_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
            assert out.inner.residual_norm.dtype == out.linear.relative_residual.dtype == accumulation_dtype
            # w = (2·data + θ)/3, and the gradient 2w/3.
            expected = 2 / 3 * (2 + np.array([1.0, -2.0])) / 3
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(np.asarray(out.gradient["a"], float), expected, rtol=8 * eps, atol=8 * eps)

    @pytest.mark.slow("compiles each method in half precision", fast=("LU-*", "FiniteDifference-bfloat16"))
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize(
        "method",
        [
            bl.Implicit(bl.LU()),
            bl.Implicit(bl.Cholesky()),
            bl.Implicit(bl.Nystrom(2, ridge=1e-3)),
            bl.FiniteDifference(bl.CG(2)),
            bl.EvolutionStrategies(2, scale=0.5),
        ],
        ids=["LU", "Cholesky", "Nystrom", "FiniteDifference", "EvolutionStrategies"],
    )
    def test_every_method_takes_narrow_dtypes(self, dtype, method):
        # The solution is θ, the value is ½‖θ‖², and the gradient is θ, so finite differences have only rounding errors.
        condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2))
        problem = bl.Problem(condition, lambda w, theta, data: 0.5 * jnp.sum(w * w))
        theta = jnp.array([1.5, -0.625], dtype)
        out = bl.value_and_hypergradient(problem, bl.GradientDescent(1.0, 1), method)(theta, 0 * theta, None)
        assert out.gradient.dtype == dtype
        bound = 4 * float(jnp.finfo(dtype).eps) ** (2 / 3)  # the error of finite differences
        np.testing.assert_allclose(np.asarray(out.gradient, float), [1.5, -0.625], rtol=bound)

    def test_leaves_of_mixed_dtypes_keep_their_own(self):
        condition = bl.Stationary(
            lambda w, theta, data: (
                0.5 * (w["wide"] - theta["wide"]) ** 2 + 0.5 * ((w["slim"] - theta["slim"]) ** 2).astype(jnp.float64)
            )
        )
        problem = bl.Problem(condition, lambda w, theta, data: w["wide"] * w["slim"].astype(jnp.float64))
        theta = {"wide": jnp.array(2.0), "slim": jnp.array(3.0, jnp.float32)}
        function = bl.value_and_hypergradient(problem, bl.GradientDescent(1.0, 1), bl.Implicit(bl.CG(2)))
        out = function(theta, jax.tree.map(jnp.zeros_like, theta), None)
        assert jax.tree.map(lambda leaf: leaf.dtype, out.gradient) == jax.tree.map(lambda leaf: leaf.dtype, theta)
        assert float(out.gradient["wide"]) == pytest.approx(3.0) and float(out.gradient["slim"]) == pytest.approx(2.0)
