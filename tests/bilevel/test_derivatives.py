"""Derivatives of a hypergradient are right or refused, for every method, in θ, in data and in captured arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

SOLVER = bl.GradientDescent(0.4, 60)
STRENGTH = 0.5


def problem_in(first, second):
    """Return a problem in two variables t and s. θ holds the one that ``first`` names, and the data hold the other one.

    The inner objective is ½(1 − λ)w² − sin(t)·s·w, and ``Proximal`` adds ½λw², because its centre is 0. The solution is
    w = sin(t)·s. The outer function is w² + t·s.
    """

    def ordered(theta, data):
        found = {first: theta["x"], second: data["x"]}
        return found["t"], found["s"]

    def objective(w, theta, data):
        t, s = ordered(theta, data)
        return 0.5 * (1 - STRENGTH) * w**2 - jnp.sin(t) * s * w

    def outer(w, theta, data):
        t, s = ordered(theta, data)
        return w**2 + t * s

    condition = bl.Proximal(objective, STRENGTH, center=lambda theta, data: jnp.zeros_like(theta["x"]))
    return bl.Problem(condition, outer)


T, S = 0.7, 1.3
EXACT = {"t": 2 * np.sin(T) * np.cos(T) * S**2 + S, "s": 2 * np.sin(T) ** 2 * S + T}
# Second derivatives of (sin(t)·s)² + t·s.
EXACT_SECOND = {
    "tt": 2 * np.cos(2 * T) * S**2,
    "ts": 2 * np.sin(2 * T) * S + 1,
}
# In this problem, the dw/dθ of OneStep is 0.4 times the exact one, and that of FirstOrder is 1/λ times the exact one.
# The relative error of the gradient is about 1/ρ for ValuePenalty, and about σ² for EvolutionStrategies.
EXACT_METHODS = {
    "implicit": bl.Implicit(bl.CG(1)),
    "unrolled": bl.Unrolled(),
    "forward": bl.ForwardUnrolled(),
}
ESTIMATES = {
    "differences": bl.FiniteDifference(bl.CG(1)),
    "one step": bl.OneStep(),
    "first order": bl.FirstOrder(),
    "penalty": bl.ValuePenalty(1e3),
    "samples": bl.EvolutionStrategies(1, scale=1e-3),
    "last steps": bl.Unrolled(last=3),
    "first-order steps": bl.Unrolled(first_order=True),
}
WITHOUT_DATA = ("samples", "first-order steps")
METHODS = EXACT_METHODS | ESTIMATES
FACTORS = {"one step": 0.4, "first order": 1 / STRENGTH, "last steps": 1 - 0.6**3, "first-order steps": 0.0}
TOLERANCES = {"differences": 1e-8, "penalty": 5e-3, "samples": 1e-5}
REFUSED = r" does not know this derivative of its result: use Implicit, or Unrolled\(\)"


def estimate(name, variable):
    """Return the gradient that a method computes. The method's derivative of w is FACTORS[name] times the exact one."""
    direct = {"t": S, "s": T}[variable]
    return direct + FACTORS.get(name, 1.0) * (EXACT[variable] - direct)


def function_of(method, variable="t", solver=SOLVER):
    other = {"t": "s", "s": "t"}[variable]
    compute = bl.value_and_hypergradient(problem_in(variable, other), solver, method)

    def function(theta, data):
        return compute({"x": theta, "count": 3}, 0.0, {"x": data, "mask": jnp.array([True])})

    return function


@pytest.mark.slow("differentiates each method under several transformations", fast="one step")
@pytest.mark.parametrize("name", METHODS)
def test_the_value_differentiates_to_the_gradient(name):
    function, expected = function_of(METHODS[name]), pytest.approx(estimate(name, "t"), rel=TOLERANCES.get(name, 1e-9))

    def value(theta):
        return function(theta, S).value

    assert float(function(T, S).gradient["x"]) == expected
    assert float(jax.grad(value)(T)) == expected
    assert float(jax.jit(jax.grad(jax.jit(value)))(T)) == expected
    assert float(jax.vmap(jax.grad(value))(jnp.array([0.1, T]))[1]) == expected
    assert float(jax.jit(lambda: jax.jvp(value, (T,), (2.0,))[1] / 2)()) == expected
    total = jax.grad(lambda theta: jax.lax.scan(lambda c, _: (c + value(theta), None), 0.0, length=2)[0])(T)
    assert float(total / 2) == expected


@pytest.mark.slow("differentiates each method in data", fast=("one step", "first-order steps"))
@pytest.mark.parametrize("name", METHODS)
def test_the_derivative_of_the_value_in_data_is_right_or_refused(name):
    function = function_of(METHODS[name])
    slope = jax.grad(lambda data: function(T, data).value)
    if name in WITHOUT_DATA:
        with pytest.raises(ValueError, match=REFUSED):
            slope(S)
    else:  # the derivative equals the gradient that the method computes for the problem with θ and data exchanged
        expected = pytest.approx(estimate(name, "s"), rel=TOLERANCES.get(name, 1e-9))
        assert float(slope(S)) == expected
        assert float(function_of(METHODS[name], "s")(S, T).gradient["x"]) == expected


@pytest.mark.slow("differentiates each method twice", fast="one step")
@pytest.mark.parametrize("name", METHODS)
def test_a_second_derivative_is_right_or_refused(name):
    function = function_of(METHODS[name])
    derivatives = {
        "tt": lambda: jax.grad(lambda theta: function(theta, S).gradient["x"])(T),
        "ts": lambda: jax.grad(lambda data: function(T, data).gradient["x"])(S),
        "tt of the value": lambda: jax.grad(jax.grad(lambda theta: function(theta, S).value))(T),
        "tt forwards": lambda: jax.hessian(lambda theta: function(theta, S).value)(T),
        "ts of the value": lambda: jax.grad(lambda d: jax.grad(lambda t: function(t, d).value)(T))(S),
        "st of the value": lambda: jax.grad(lambda t: jax.grad(lambda d: function(t, d).value)(S))(T),
    }
    for key, derivative in derivatives.items():
        if name in EXACT_METHODS:
            expected = EXACT_SECOND["ts" if "s" in key[:2] else "tt"]
            assert float(derivative()) == pytest.approx(expected, rel=1e-8), key
        else:
            with pytest.raises(ValueError, match=REFUSED):
                derivative()


@pytest.mark.parametrize("name", ["one step", "first-order steps"])
def test_other_results_of_an_estimate_have_no_derivative(name):
    function = function_of(METHODS[name])
    for result in (lambda out: out.inner.w, lambda out: out.inner.residual_norm):
        with pytest.raises(ValueError, match=REFUSED):
            jax.grad(lambda theta, result=result: result(function(theta, S)))(T)
    with pytest.raises(ValueError, match=r"for the derivative of the value alone use jax.grad"):
        jax.jvp(lambda theta: function(theta, S).gradient["x"], (T,), (1.0,))


@pytest.mark.slow("compiles each method with a captured array", fast="one step")
@pytest.mark.parametrize("name", METHODS)
def test_a_captured_array_is_differentiated_or_refused(name):
    def function(captured, label):
        condition = bl.Proximal(
            lambda w, theta, data: 0.5 * (1 - STRENGTH) * w**2 - jnp.sin(theta) * captured * label * w,
            STRENGTH,
            center=lambda theta, data: jnp.zeros_like(theta),
        )
        problem = bl.Problem(condition, lambda w, theta, data: w**2)
        return bl.value_and_hypergradient(problem, SOLVER, METHODS[name])(T, 0.0, None)

    value = jax.jit(lambda captured, label: function(captured, label).value)
    if name in WITHOUT_DATA:
        with pytest.raises(ValueError, match=REFUSED):
            jax.grad(value)(S, jnp.array(1.0))
    else:
        expected = FACTORS.get(name, 1.0) * 2 * np.sin(T) ** 2 * S
        assert float(jax.grad(value)(S, jnp.array(1.0))) == pytest.approx(expected, rel=TOLERANCES.get(name, 1e-9))
    if name in EXACT_METHODS:
        expected = 2 * np.sin(2 * T) * S
        assert float(jax.grad(lambda c: function(c, 1.0).gradient)(S)) == pytest.approx(expected, rel=1e-8)
    else:
        with pytest.raises(ValueError, match=REFUSED):
            jax.grad(lambda captured: function(captured, 1.0).gradient)(S)


@pytest.mark.parametrize("name", ["one step", "last steps"])
def test_an_estimate_has_a_derivative_in_theta_if_the_solution_does_not_depend_on_theta(name):
    # The derivative in θ is that of outer alone, and the tangent of the residual in θ is structurally zero.
    condition = bl.Proximal(lambda w, theta, data: 0.0 * w, 1.0, center=lambda theta, data: data)
    problem = bl.Problem(condition, lambda w, theta, data: w * theta**2)
    function = bl.value_and_hypergradient(problem, bl.GradientDescent(1.0, 3), METHODS[name])
    assert float(jax.grad(lambda theta: function(theta, 0.0, 2.0).value)(T)) == pytest.approx(4 * T)


@pytest.mark.slow("differentiates each solver in both modes", fast="tol")
@pytest.mark.parametrize(
    "solver",
    [bl.GradientDescent(0.4, 200, tol=1e-12), bl.Jaxopt("GradientDescent", tol=1e-12)],
    ids=["tol", "jaxopt"],
)
def test_forward_unrolling_of_a_loop_of_unknown_length_has_a_derivative_in_reverse_mode(solver):
    function = function_of(bl.ForwardUnrolled(), solver=solver)
    assert float(jax.grad(lambda theta: function(theta, S).value)(T)) == pytest.approx(EXACT["t"], rel=1e-9)
    forwards = jax.jacfwd(lambda theta: function(theta, S).gradient["x"])(T)
    assert float(forwards) == pytest.approx(EXACT_SECOND["tt"], rel=1e-7)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda data: function(T, data).value)(S)


@pytest.mark.slow("compiles for two devices")
def test_the_value_of_an_estimate_is_differentiated_under_shard_map():
    mesh = jax.make_mesh((2,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
    each, every = jax.sharding.PartitionSpec("task"), jax.sharding.PartitionSpec()
    function = function_of(bl.OneStep())

    def total(theta, data):
        values = jax.shard_map(
            lambda theta, data: function(theta, data[0]).value[None], mesh=mesh, in_specs=(every, each), out_specs=each
        )
        return jnp.sum(values(theta, data))

    expected = sum(float(function(T, data).gradient["x"]) for data in (S, 2 * S))
    assert float(jax.jit(jax.grad(total))(T, jnp.array([S, 2 * S]))) == pytest.approx(expected, rel=1e-12)


def test_leaves_without_a_tangent_pass_through_an_estimate():
    condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta["x"] * data["n"]) ** 2)
    problem = bl.Problem(condition, lambda w, theta, data: (w, {"count": 3, "w": w}), has_aux=True)
    function = bl.value_and_hypergradient(problem, bl.GradientDescent(1.0, 1), bl.OneStep())
    data = {"n": 2, "key": jax.random.key(0)}
    slope = jax.grad(lambda theta: function(theta, 0.0, data).value, allow_int=True)({"x": 2.0, "m": 3})
    assert float(slope["x"]) == 2.0 and slope["m"].dtype == jax.dtypes.float0
    assert int(function({"x": 2.0}, 0.0, data).aux["count"]) == 3
    of_integers = jax.grad(lambda n: function({"x": 2.0}, 0.0, data | {"n": n}).value, allow_int=True)(jnp.array(2))
    assert of_integers.dtype == jax.dtypes.float0


def test_complex_data_of_an_estimate_are_differentiated():
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * jnp.abs(data) ** 2 * w**2 - theta * w), lambda w, theta, data: w
    )
    function = bl.value_and_hypergradient(problem, bl.GradientDescent(0.2, 200), bl.FiniteDifference(bl.CG(1)))
    assert float(jax.grad(lambda theta: function(theta, 0.0, 1j + 1).value)(1.0)) == pytest.approx(0.5)
    # w = θ/|z|² has the derivatives −2·Re z/|z|⁴ in Re z and −2·Im z/|z|⁴ in Im z. JAX's gradient is the first of them
    # minus i times the second.
    slope = jax.grad(lambda data: function(1.0, 0.0, data).value)(1j + 1)
    assert complex(slope) == pytest.approx(-0.5 + 0.5j, rel=1e-6)


def kkt_problem():
    """Return a quadratic program with a matrix that depends on θ, and its exact solution as a solver."""

    def matrix(theta):
        return jnp.array([[2 + theta, 0.3], [0.3, 1 + theta**2]])

    def solver(condition, init, theta, data):
        ones, slope = jnp.ones((2, 1)), jnp.array([1.0, 2.0, 1.0])
        w = jnp.linalg.solve(jnp.block([[matrix(theta), ones], [ones.T, jnp.zeros((1, 1))]]), slope)
        return w[:2], w[2], None

    condition = bl.KKT(
        lambda x, theta, data: 0.5 * x @ matrix(theta) @ x - x @ jnp.array([1.0, 2.0]),
        lambda x, theta, data: jnp.sum(x) - 1,
    )
    return condition, solver


@pytest.mark.slow("differentiates layers twice in reverse mode")
@pytest.mark.parametrize("linear", [bl.LU(), bl.GMRES(10), bl.NormalCG(30)], ids=lambda linear: type(linear).__name__)
def test_a_layer_is_differentiated_twice_in_reverse_mode(linear):
    condition, solver = kkt_problem()
    layer = bl.implicit_layer(condition, solver, linear)
    value = lambda theta: jnp.sum(layer(theta, (jnp.zeros(2), jnp.zeros(()), None), None)[0] ** 3)  # noqa: E731
    exact = lambda theta: jnp.sum(solver(None, None, theta, None)[0] ** 3)  # noqa: E731
    assert float(jax.grad(jax.grad(value))(0.3)) == pytest.approx(float(jax.grad(jax.grad(exact))(0.3)), rel=1e-9)


@pytest.mark.slow("compiles a second derivative")
def test_a_layer_is_differentiated_twice_if_only_some_leaves_of_the_residual_depend_on_theta():
    root = bl.Root(lambda w, theta, data: (w[0] * jnp.exp(theta) + w[1], w[0] - 1.0))
    exact = lambda condition, init, theta, data: (jnp.ones(()), -jnp.exp(theta))  # noqa: E731
    layer = bl.implicit_layer(root, exact, bl.LU())
    derivative = lambda theta: layer(theta, (0.0, 0.0), None)[1]  # noqa: E731
    for _ in range(2):
        derivative = jax.grad(derivative)
        assert float(derivative(0.3)) == pytest.approx(-np.exp(0.3), rel=1e-12)


class TestIntegers:
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * theta * w**2), lambda w, theta, data: w**2
    )
    method = bl.Implicit(bl.CG(1))

    @pytest.mark.slow("runs each check once")
    def test_a_theta_of_python_integers_is_taken_as_floating_point(self):
        function = bl.value_and_hypergradient(self.problem, SOLVER, self.method)
        assert float(function(1, 0.0, 2.0).gradient) == pytest.approx(-1.0)  # w = 2/(1 + θ)
        layer = bl.implicit_layer(self.problem.condition, SOLVER, bl.CG(1))
        assert float(layer(1, 0.0, 2.0)) == pytest.approx(1.0)
        report = bl.check_hypergradient(self.problem, 1, 0.0, 2.0, SOLVER, self.method, against=("dense",))
        assert report.ok and report.derivatives == pytest.approx([-1.0])
        assert bl.check_condition(self.problem, 1, 1.0, 2.0).ok
        assert float(bl.certify(self.problem, 1, report.out, 2.0).gradient) == pytest.approx(-1.0)

    def test_minimize_moves_a_theta_of_python_integers_and_refuses_integer_arrays(self):
        import optax

        problem = bl.Problem(self.problem.condition, lambda w, theta, data: (w - 0.5) ** 2)  # θ* = 3
        found = bl.minimize(problem, 1, 0.0, 2.0, bl.GradientDescent(0.2, 60), self.method, optax.sgd(8.0), steps=60)
        assert float(found.theta) == pytest.approx(3.0, rel=1e-3)
        with pytest.raises(TypeError, match=r"needs a floating-point leaf in theta, got .*int64"):
            bl.minimize(problem, jnp.array([1]), 0.0, 2.0, SOLVER, self.method, optax.sgd(1.0), steps=1)

    def test_an_integer_leaf_is_a_constant_if_another_leaf_is_floating_point(self):
        condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta["x"] * theta["n"]) ** 2)
        problem = bl.Problem(condition, lambda w, theta, data: w)
        out = bl.value_and_hypergradient(problem, bl.GradientDescent(1.0, 1), self.method)(
            {"x": 2.0, "n": 3}, 0.0, None
        )
        assert float(out.gradient["x"]) == 3.0
        assert int(out.gradient["n"]) == 0 and jnp.issubdtype(out.gradient["n"].dtype, jnp.integer)


def ill_conditioned(unknowns=100, kappa=1e4):
    """Return the minimum of ½wᵀAw − θ·bᵀw as a condition, its exact solution as a solver, and Σw at θ = 1.

    The eigenvalues of A are from 1 to κ.
    """
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(unknowns, unknowns)))[0]
    matrix = basis @ np.diag(np.logspace(0, np.log10(kappa), unknowns)) @ basis.T
    b = rng.normal(size=unknowns)
    w = jnp.asarray(np.linalg.solve(matrix, b))
    condition = bl.Stationary(lambda w, theta, data: 0.5 * w @ matrix @ w - theta * b @ w)
    return condition, lambda condition, init, theta, data: theta * w, float(jnp.sum(w))


class TestLayerFailures:
    def slope_of(self, linear, **options):
        condition, solver, exact = ill_conditioned()
        layer = bl.implicit_layer(condition, solver, linear, **options)
        return lambda theta: jnp.sum(layer(theta, jnp.zeros(100), None)), exact

    def test_without_a_linear_solver_an_accurate_one_is_chosen(self):
        total, exact = self.slope_of(None)
        assert float(jax.grad(total)(1.0)) == pytest.approx(exact, rel=1e-9)

    @pytest.mark.slow("solves systems of 600 unknowns iteratively")
    def test_the_iterative_default_runs_to_a_tolerance(self):
        weights = jnp.linspace(1.0, 1e3, 600)
        for condition in (
            bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum(weights * w**2) - theta * jnp.sum(w)),
            bl.Root(lambda w, theta, data: weights * w - theta),
        ):
            layer = bl.implicit_layer(condition, lambda condition, init, theta, data: theta / weights)
            slope = jax.grad(lambda theta, layer=layer: jnp.sum(layer(theta, jnp.zeros(600), None)))(1.0)
            assert float(slope) == pytest.approx(float(jnp.sum(1 / weights)), rel=1e-3)

    @pytest.mark.slow("differentiates a layer in each mode")
    @pytest.mark.parametrize(
        "derivative",
        [
            jax.grad,
            lambda f: lambda t: jax.jvp(f, (t,), (1.0,)),
            jax.jacfwd,
            lambda f: jax.jacrev(lambda t: f(t)[None]),
            lambda f: jax.grad(jax.grad(lambda t: f(t) ** 2)),
        ],
        ids=["grad", "jvp", "jacfwd", "jacrev", "second"],
    )
    def test_a_linear_solve_that_fails_in_the_derivative_is_an_error(self, derivative):
        for linear in (bl.CG(), bl.CG(20, tol=1e-6)):
            total, _ = self.slope_of(linear)
            with pytest.raises(bl.HypergradientError, match="linear solve in the derivative of a layer"):
                derivative(total)(1.0)
        sufficient, exact = self.slope_of(bl.CG(3000, tol=1e-9))
        assert jax.tree.leaves(derivative(sufficient)(1.0))[-1] is not None
        assert float(jax.grad(sufficient)(1.0)) == pytest.approx(exact, rel=1e-5)

    @pytest.mark.slow("compiles a layer for each policy")
    def test_a_failure_is_a_warning_or_ignored_on_request_and_ignored_under_a_trace(self):
        total, _ = self.slope_of(bl.CG(), on_failure="warn")
        with pytest.warns(RuntimeWarning, match="linear solve in the derivative"):
            jax.grad(total)(1.0)
        ignored, exact = self.slope_of(bl.CG(), on_failure="ignore")
        assert abs(float(jax.grad(ignored)(1.0)) - exact) > 0.1 * abs(exact)
        traced, _ = self.slope_of(bl.CG())
        jax.block_until_ready(jax.jit(jax.grad(traced))(1.0))

    def test_a_singular_matrix_is_an_error(self):
        condition = bl.Root(lambda w, theta, data: w**2 - theta)
        layer = bl.implicit_layer(condition, lambda condition, init, theta, data: init, bl.LU())
        with pytest.raises(bl.HypergradientError, match="linear solve in the derivative of a layer, SINGULAR"):
            jax.grad(layer)(0.0, 0.0, None)

    def test_an_inner_solve_that_fails_is_an_error_when_the_layer_is_called(self):
        condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        solver = bl.GradientDescent(0.1, 3, tol=1e-6)
        layer = bl.implicit_layer(condition, solver, bl.CG(1))
        for call in (layer, jax.grad(layer)):
            with pytest.raises(bl.HypergradientError, match="inner solve of a layer, MAX_STEPS") as caught:
                call(1.0, 0.0, None)
            assert int(caught.value.result.status) == bl.Status.MAX_STEPS
        with pytest.warns(RuntimeWarning, match="inner solve of a layer"):
            bl.implicit_layer(condition, solver, bl.CG(1), on_failure="warn")(1.0, 0.0, None)
        assert float(bl.implicit_layer(condition, solver, bl.CG(1), on_failure="ignore")(1.0, 0.0, None)) < 0.5
        assert float(jax.jit(layer)(1.0, 0.0, None)) < 0.5
        with pytest.raises(ValueError, match="got 'shout'"):
            bl.implicit_layer(condition, solver, bl.CG(1), on_failure="shout")  # type: ignore[arg-type]

    def test_a_derivative_in_the_start_warns_that_it_is_zero(self):
        condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        layer = bl.implicit_layer(condition, bl.GradientDescent(1.0, 1), bl.CG(1))
        with pytest.warns(UserWarning, match=r"zero: the arguments are \(theta, init, data\)"):
            assert float(jax.grad(lambda x: layer(0.0, x, None))(1.0)) == 0.0
        assert float(jax.grad(lambda x: layer(x, lambda theta, data: theta, None))(1.0)) == 1.0
        assert float(jax.grad(lambda x: layer(x, jax.lax.stop_gradient(x), None))(1.0)) == 1.0


@pytest.mark.slow("unrolls Anderson's method with each start", fast="unrolled-one entry is solved")
@pytest.mark.parametrize(
    "start",
    [(0.0, np.pi / 2), (0.7390851332151607, np.pi / 2), (0.3, 0.2)],
    ids=["one entry is solved", "both are", "none is"],
)
@pytest.mark.parametrize("method", [bl.Unrolled(), bl.ForwardUnrolled()], ids=["unrolled", "forward"])
def test_unrolling_anderson_is_exact_from_a_start_that_is_partly_or_fully_solved(method, start):
    # The solution of w = cos(w) + θ has dw/dθ = 1/(1 + sin(w)). At θ = (0, π/2) it is w = (0.739…, π/2).
    condition = bl.FixedPoint(lambda w, theta, data: jnp.cos(w) + theta)
    problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w))
    out = bl.value_and_hypergradient(problem, bl.Anderson(12), method)(
        jnp.array([0.0, np.pi / 2]), jnp.array(start), None
    )
    np.testing.assert_allclose(out.inner.w, [0.7390851332151607, np.pi / 2], rtol=1e-13)
    np.testing.assert_allclose(out.gradient, 1 / (1 + np.sin(out.inner.w)), rtol=1e-7)
