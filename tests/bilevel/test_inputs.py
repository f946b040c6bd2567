"""Inputs of every kind: callable starts, dtypes that differ, classes that check their fields, and wrong arguments."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel.linear import run_linear
from bilevel.start import trace

MATRIX = np.array([[2.0, 0.5], [0.5, 3.0]])


def quadratic(w, theta, data):
    """Return ½wᵀMw − wᵀθ, with the minimum M⁻¹θ."""
    return 0.5 * w @ jnp.asarray(MATRIX, w.dtype) @ w - w @ theta.astype(w.dtype)


def squared(w, theta, data):
    return 0.5 * jnp.sum(w**2)


PROBLEM = bl.Problem(bl.Stationary(quadratic), squared)
THETA = np.array([1.0, -2.0])
SOLUTION = np.linalg.solve(MATRIX, THETA)
GRADIENT = np.linalg.solve(MATRIX, SOLUTION)  # of ½‖M⁻¹θ‖²
DESCENT = bl.GradientDescent(0.3, 200)


# --- Starts --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """A pytree that can be called with two arguments. If it is taken for a start function, the start is wrong."""

    slope: jax.Array
    offset: jax.Array

    def __call__(self, x, unused=None):
        return self.slope * x + self.offset


def affine_fit(model, theta, data):
    """Return a squared error that vanishes for the line through (0, θ₀) and (1, θ₁)."""
    return 0.5 * (model(0.0) - theta[0]) ** 2 + 0.5 * (model(1.0) - theta[1]) ** 2


AFFINE = bl.Problem(bl.Stationary(affine_fit), lambda model, theta, data: model(2.0))  # 2θ₁ − θ₀


def affine_start():
    return Affine(jnp.zeros(()), jnp.zeros(()))


def test_a_callable_pytree_is_a_start_and_is_not_called():
    theta = jnp.array([1.0, 3.0])
    solver, method = bl.GradientDescent(0.5, 200), bl.Implicit(bl.CG(4))
    out = bl.value_and_hypergradient(AFFINE, solver, method)(theta, affine_start(), None)
    assert isinstance(out.inner.w, Affine)
    np.testing.assert_allclose(out.value, 5.0, rtol=1e-12)
    np.testing.assert_allclose(out.gradient, [-1.0, 2.0], rtol=1e-12)
    layer = bl.implicit_layer(AFFINE.condition, solver, bl.CG(4))
    slope = jax.grad(lambda theta: layer(theta, affine_start(), None)(2.0))(theta)
    np.testing.assert_allclose(slope, [-1.0, 2.0], rtol=1e-12)
    np.testing.assert_allclose(bl.solve(solver, AFFINE.condition, affine_start(), theta, None).w.slope, 2.0)


@pytest.mark.slow("compiles references and an outer step")
def test_a_callable_pytree_is_a_start_of_the_checks_and_of_minimize():
    optax = pytest.importorskip("optax")
    theta, solver, method = jnp.array([1.0, 3.0]), bl.GradientDescent(0.5, 200), bl.Implicit(bl.CG(4))
    assert bl.check_hypergradient(AFFINE, theta, affine_start(), None, solver, method).ok
    assert bl.compare_methods(AFFINE, theta, affine_start(), None, solver, [method], runs=1).ok
    for warm in (True, False):
        found = bl.minimize(AFFINE, theta, affine_start(), None, solver, method, optax.sgd(0.1), 2, warm_start=warm)
        np.testing.assert_allclose(found.theta, [1.2, 2.6], rtol=1e-12)


@pytest.mark.slow("imports Flax")
def test_modules_of_equinox_and_flax_are_starts():
    eqx, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")

    def problem(bias):
        def objective(model, theta, data):
            return 0.5 * jnp.sum((model(jnp.ones(2)) - theta) ** 2) + 0.5 * sum(
                jnp.sum(leaf**2) for leaf in jax.tree.leaves(model)
            )

        return bl.Problem(bl.Stationary(objective), lambda model, theta, data: jnp.sum(bias(model)))

    # At the minimum, the weights K and the bias b satisfy Kᵀ1 = 2b and b = θ − 3b, so b = θ/4.
    modules = {
        "equinox": (eqx.nn.Linear(2, 1, key=jax.random.key(0)), lambda model: model.bias),
        "nnx": (nnx.Linear(2, 1, rngs=nnx.Rngs(0)), lambda model: model.bias[...]),
    }
    for name, (model, bias) in modules.items():
        model = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model)
        function = bl.value_and_hypergradient(problem(bias), bl.GradientDescent(0.2, 300), bl.Implicit(bl.CG(4)))
        out = function(jnp.array([2.0]), model, None)
        np.testing.assert_allclose(out.value, 0.5, rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(out.gradient, [0.25], rtol=1e-10, err_msg=name)


def count_programs(method, starts, by_name):
    """Return, for each start, the hypergradient and the number of traces of the objective so far."""
    traces = []

    def objective(w, theta, data):
        traces.append(None)
        return 0.5 * (w - theta) ** 2

    problem = bl.Problem(bl.Stationary(objective), lambda w, theta, data: w)
    function = bl.value_and_hypergradient(problem, bl.GradientDescent(0.5, 1), method)
    gradients, counts = [], []
    for start in starts:
        out = function(2.0, data=None, start=start) if by_name else function(2.0, start, None)
        gradients.append(float(out.gradient))
        counts.append(len(traces))
    return gradients, counts


@pytest.mark.slow("compiles each method", fast="True-unrolled")
@pytest.mark.parametrize("method", [bl.Unrolled(), bl.ForwardUnrolled(), bl.EvolutionStrategies(1, 1e-3)],
                         ids=["unrolled", "forward", "evolution"])  # fmt: skip
@pytest.mark.parametrize("by_name", [True, False])
def test_a_start_that_is_written_in_the_call_is_compiled_once_and_differentiated(method, by_name):
    # One step of size ½ from s(θ): w = ½s(θ) + ½θ. A captured array is an argument of the compiled program, so another
    # array needs no new program. A captured Python number is a constant of the program.
    factors = [3.0, 3.0, jnp.asarray(5.0), jnp.asarray(7.0)]
    starts = [lambda theta, data, k=k: k * jnp.tanh(theta) for k in factors]
    gradients, counts = count_programs(method, starts, by_name)
    expected = [0.5 + 0.5 * float(k) / np.cosh(2.0) ** 2 for k in factors]
    np.testing.assert_allclose(gradients, expected, rtol=1e-5 if isinstance(method, bl.EvolutionStrategies) else 1e-12)
    assert counts[0] == counts[1] and counts[2] == counts[3]


def test_starts_of_different_operations_are_different_programs():
    theta = jnp.asarray(2.0)
    starts = [
        lambda theta, data: theta * 2.0,
        lambda theta, data: theta * 3.0,
        lambda theta, data: theta + 2.0,
        lambda theta, data: 2.0 - theta,
        lambda theta, data: theta - 2.0,
        lambda theta, data: theta.astype(jnp.float32),
        lambda theta, data: jnp.cumsum(theta[None])[0],
        lambda theta, data: jnp.cumsum(theta[None], axis=0),
        lambda theta, data: jnp.cumsum(theta[None], axis=0, dtype=jnp.float32),
        lambda theta, data: {"w": theta},
        lambda theta, data: [theta],
        lambda theta, data: jax.lax.fori_loop(0, 3, lambda i, x: x * 2.0, theta),
        lambda theta, data: jax.lax.fori_loop(0, 3, lambda i, x: x * 3.0, theta),
        lambda theta, data: jnp.asarray([1.0, 2.0]) * theta,
    ]
    programs = [trace(start, theta, None)[0] for start in starts]
    assert len(set(programs)) == len(starts)
    assert all(trace(start, theta, None)[0] == program for start, program in zip(starts, programs, strict=True))
    assert trace(starts[0], theta.astype(jnp.float32), None)[0] != programs[0]


def test_a_start_is_a_function_a_method_a_partial_or_any_callable_by_name():
    class Bounds:
        def middle(self, theta, data):
            return theta * data

    function = bl.value_and_hypergradient(
        bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w),
        bl.GradientDescent(0.5, 1),
        bl.Unrolled(),
    )
    # w = ½·3θ + ½θ
    for init in (lambda theta, data: theta * data, Bounds().middle, jax.jit(lambda theta, data: theta * data),
                 functools.partial(lambda factor, theta, data: factor * theta, 3.0)):  # fmt: skip
        assert float(function(2.0, init, 3.0).gradient) == pytest.approx(2.0)
        assert float(function(2.0, data=3.0, start=init).gradient) == pytest.approx(2.0)
    # Given as `init`, this pytree is a point. Given as `start`, it is called, as the function 3θ + 0.
    by_name = function(2.0, data=3.0, start=Affine(jnp.asarray(3.0), jnp.asarray(0.0)))
    assert float(by_name.gradient) == pytest.approx(2.0)


def test_a_start_that_captures_a_traced_array_is_differentiated_in_it():
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)
    function = bl.value_and_hypergradient(problem, bl.GradientDescent(0.5, 1), bl.Unrolled())

    def value(scale):
        return function(2.0, data=None, start=lambda theta, data: scale**2 * theta).value

    for transform in (lambda f: f, jax.jit):
        assert float(jax.grad(transform(value))(3.0)) == pytest.approx(6.0)  # of ½s²θ + ½θ at θ = 2
    np.testing.assert_allclose(jax.vmap(value)(jnp.array([1.0, 3.0])), [2.0, 10.0])


def test_a_start_by_name_in_solve_a_layer_and_minimize():
    optax = pytest.importorskip("optax")
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)
    solver, start = bl.GradientDescent(0.5, 1), lambda theta, data: 3.0 * theta
    assert float(bl.solve(solver, problem.condition, None, 2.0, None, start=start).w) == 4.0
    layer = bl.implicit_layer(problem.condition, solver, bl.CG(1))
    assert float(layer(2.0, data=None, start=start)) == 4.0
    assert float(jax.grad(lambda theta: layer(theta, start=start))(2.0)) == 1.0
    arguments = problem, 2.0, None, None, solver, bl.Unrolled(), optax.sgd(0.1), 1
    found = bl.minimize(*arguments, warm_start=False, start=start)
    assert float(found.theta) == pytest.approx(2.0 - 0.1 * 2.0)  # d(½·3θ + ½θ)/dθ = 2
    report = bl.check_hypergradient(*arguments[:6], against="unrolled", start=start)
    assert report.ok


# --- Dtypes --------------------------------------------------------------------------------------------------------


def two_by_two(dtype):
    """Return a pair (condition, init) by the name of each kind of condition. Each condition has the solution M⁻¹θ.

    ``init`` has the dtype ``dtype``, and the functions compute in the dtype of θ.
    """

    def wide_objective(w, theta, data):
        return quadratic(w.astype(theta.dtype), theta, data)

    def slope(w, theta):
        return jnp.asarray(MATRIX, theta.dtype) @ w.astype(theta.dtype) - theta

    def equal(x, theta, data):
        return x.astype(theta.dtype) - jnp.linalg.solve(jnp.asarray(MATRIX, theta.dtype), theta)

    box = bl.jaxopt_projection("projection_box", lambda theta, data: (theta - 9, theta + 9))
    shrink = bl.jaxopt_prox("prox_lasso", lambda theta, data: 0 * jnp.abs(theta))
    zeros = jnp.zeros(2, dtype)
    return {
        "Stationary": (bl.Stationary(wide_objective), zeros),
        "Proximal": (
            bl.Proximal(lambda w, theta, data: wide_objective(w, theta, data) - 0.5 * jnp.sum((w.astype(theta.dtype)
                        - theta) ** 2), 1.0), zeros),
        "Root": (bl.Root(lambda w, theta, data: slope(w, theta)), zeros),
        "FixedPoint": (bl.FixedPoint(lambda w, theta, data: w.astype(theta.dtype) - 0.3 * slope(w, theta)), zeros),
        "Projected": (bl.Projected(wide_objective, box, 0.3), zeros),
        "ProximalGradient": (bl.ProximalGradient(wide_objective, shrink, 0.3), zeros),
        "KKT": (bl.KKT(lambda x, theta, data: 0.0 * jnp.sum(x), equality=equal), (zeros, zeros, None)),
    }  # fmt: skip


def newton(condition, init, theta, data):
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), init))
    like = functools.partial(jax.tree.map, lambda leaf, start: leaf.astype(start.dtype))

    def residual(flat):
        w = like(unravel(flat), init)
        return ravel_pytree(condition.residual(w, theta, data))[0].astype(flat.dtype)

    return like(unravel(flat - jnp.linalg.solve(jax.jacobian(residual)(flat), residual(flat))), init)


SOLVERS = {
    "Stationary": [DESCENT, bl.GradientDescent(0.2, 200, momentum=0.3), bl.HessianFree(10), bl.Jaxopt("LBFGS")],
    "Proximal": [DESCENT, bl.HessianFree(10), bl.Jaxopt("LBFGS", implicit_diff=True)],
    "Root": [newton, bl.Jaxopt("LevenbergMarquardt"), bl.Jaxopt("GaussNewton")],
    "FixedPoint": [bl.FixedPointIteration(100), bl.Anderson(20), bl.Jaxopt("AndersonAcceleration")],
    "Projected": [bl.FixedPointIteration(100), bl.Anderson(20), bl.Jaxopt("ProjectedGradient", stepsize=0.3, tol=1e-6)],
    "ProximalGradient": [
        bl.FixedPointIteration(100),
        bl.Anderson(20),
        bl.Jaxopt("ProximalGradient", stepsize=0.3, tol=1e-6),
    ],
    "KKT": [newton],
}


@pytest.mark.parametrize("name", ["Root", "FixedPoint"])
def test_a_residual_has_the_dtype_of_w(name):
    condition, init = two_by_two(jnp.dtype("bfloat16"))[name]
    residual = condition.residual(init, jnp.asarray(THETA, jnp.float32), None)
    assert residual.dtype == jnp.bfloat16
    np.testing.assert_allclose(residual.astype(float), -THETA * (0.3 if name == "FixedPoint" else 1.0), rtol=1e-2)


@pytest.mark.slow("compiles each solver in each pair of dtypes")
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("narrow", "wide"), [("float32", "float64"), ("bfloat16", "float32")])
def test_w_may_be_narrower_than_theta(narrow, wide, name):
    condition, init = two_by_two(jnp.dtype(narrow))[name]
    theta, tolerance = jnp.asarray(THETA, wide), 100 * float(jnp.finfo(narrow).eps)
    problem = bl.Problem(condition, lambda w, theta, data: squared(jax.tree.leaves(w)[0], theta, data))
    with jax.numpy_dtype_promotion("standard"):
        for solver in SOLVERS[name]:
            function = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()), on_failure="ignore")
            out = function(theta, init, None)
            w = jax.tree.leaves(out.inner.w)[0]
            assert w.dtype == narrow and out.gradient.dtype == wide
            np.testing.assert_allclose(np.asarray(w, float), SOLUTION, atol=tolerance, err_msg=str(solver))
            np.testing.assert_allclose(out.gradient, GRADIENT, atol=tolerance, err_msg=str(solver))


@pytest.mark.slow("compiles each linear solver and each method")
def test_every_linear_solver_and_method_takes_a_narrow_w():
    condition, init = two_by_two(jnp.dtype("float32"))["FixedPoint"]
    problem, theta = bl.Problem(condition, squared), jnp.asarray(THETA)
    linears = bl.NormalCG(20), bl.GMRES(4), bl.BiCGStab(8), bl.LU(), bl.Neumann(200)
    methods = [bl.Implicit(linear) for linear in linears] + [bl.Unrolled(), bl.ForwardUnrolled()]
    for method in methods:
        out = bl.value_and_hypergradient(problem, bl.FixedPointIteration(100), method)(theta, init, None)
        np.testing.assert_allclose(out.gradient, GRADIENT, rtol=1e-5, err_msg=str(method))
    condition, init = two_by_two(jnp.dtype("float32"))["Stationary"]
    problem = bl.Problem(condition, squared)
    linears = bl.CG(4), bl.CG(4, engine="watched"), bl.Cholesky(), bl.Nystrom(2, 1e-3)
    methods = [*(bl.Implicit(linear) for linear in linears), bl.FiniteDifference(bl.CG(4)), bl.EvolutionStrategies(2),
               bl.Unrolled(), bl.ForwardUnrolled(), bl.ValuePenalty(1e3)]  # fmt: skip
    for method in methods:
        out = bl.value_and_hypergradient(problem, DESCENT, method)(theta, init, None)
        np.testing.assert_allclose(out.gradient, GRADIENT, rtol=1e-2, err_msg=str(method))


# --- Classes that check their fields -------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Checked:
    """A record that refuses a field of another type or shape, as jaxtyping's decorator does."""

    value: jax.Array

    def __post_init__(self):
        if not isinstance(self.value, jax.Array | np.ndarray) or self.value.shape != (2,):
            raise TypeError(f"not a vector of two entries: {self.value}")


def checked(function):
    """Wrap a function of arrays, so that it takes w and θ of the class `Checked` and returns a `Checked`."""
    return lambda w, theta, data: Checked(function(w.value, theta.value, data))


def checked_conditions():
    def objective(w, theta, data):
        return quadratic(w.value, theta.value, data)

    def slope(w, theta, data):
        return jnp.asarray(MATRIX) @ w - theta

    return {
        "Stationary": bl.Stationary(objective),
        "Proximal": bl.Proximal(
            lambda w, theta, data: objective(w, theta, data) - 0.5 * jnp.sum((w.value - theta.value) ** 2), 1.0
        ),
        "Root": bl.Root(checked(slope)),
        "FixedPoint": bl.FixedPoint(checked(lambda w, theta, data: w - 0.3 * slope(w, theta, data))),
        "Projected": bl.Projected(objective, checked(lambda w, theta, data: jnp.clip(w, -9, 9)), 0.3),
        "ProximalGradient": bl.ProximalGradient(objective, lambda w, theta, data, step: w, 0.3),
    }


CHECKED_SOLVERS = {
    "Stationary": [DESCENT, bl.HessianFree(5), bl.Jaxopt("LBFGS", tol=1e-10),
                   bl.Jaxopt("BFGS", tol=1e-10)],
    "Proximal": [DESCENT, bl.HessianFree(5)],
    "Root": [bl.Jaxopt("Broyden", tol=1e-10), bl.GaussNewton(3), bl.Jaxopt("GaussNewton")],
    "FixedPoint": [bl.FixedPointIteration(100), bl.Anderson(20), bl.Jaxopt("AndersonAcceleration", tol=1e-10)],
    "Projected": [bl.FixedPointIteration(100), bl.Jaxopt("ProjectedGradient", tol=1e-10, stepsize=0.3)],
    "ProximalGradient": [bl.Anderson(20), bl.Jaxopt("ProximalGradient", tol=1e-10, stepsize=0.3)],
}  # fmt: skip


def checked_problem(name):
    return bl.Problem(checked_conditions()[name], lambda w, theta, data: squared(w.value, theta, data))


@pytest.mark.slow("compiles each solver")
@pytest.mark.parametrize("name", CHECKED_SOLVERS)
def test_a_class_that_checks_its_fields_gets_arrays_only(name):
    problem, theta, init = checked_problem(name), Checked(jnp.asarray(THETA)), Checked(jnp.zeros(2))
    for solver in CHECKED_SOLVERS[name]:
        out = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()))(theta, init, None)
        np.testing.assert_allclose(out.gradient.value, GRADIENT, rtol=1e-6, err_msg=str(solver))
        layer = bl.implicit_layer(problem.condition, solver, bl.LU())
        slope = jax.grad(lambda theta: squared(layer(theta, init, None).value, None, None))(theta)  # noqa: B023
        np.testing.assert_allclose(slope.value, GRADIENT, rtol=1e-6, err_msg=str(solver))


METHODS = [bl.Implicit(bl.CG(4)), bl.Implicit(bl.CG(4, engine="watched")), bl.Implicit(bl.NormalCG(9)),
           bl.Implicit(bl.GMRES(4)), bl.Implicit(bl.BiCGStab(8)), bl.Implicit(bl.LU()), bl.Implicit(bl.Cholesky()),
           bl.Implicit(bl.Neumann(200, 0.3)), bl.Implicit(bl.Nystrom(2, 1e-8)), bl.Unrolled(), bl.ForwardUnrolled(),
           bl.Unrolled(checkpoint=True), bl.FiniteDifference(bl.CG(4)), bl.FiniteDifference(bl.Neumann(200, 0.3)),
           bl.ValuePenalty(1e6), bl.EvolutionStrategies(2)]  # fmt: skip


@pytest.mark.slow("compiles each method", fast="method0")
@pytest.mark.parametrize("method", METHODS)
def test_each_method_keeps_a_class_that_checks_its_fields(method):
    problem, theta, init = checked_problem("Stationary"), Checked(jnp.asarray(THETA)), Checked(jnp.zeros(2))
    out = bl.value_and_hypergradient(problem, DESCENT, method)(theta, init, None)
    np.testing.assert_allclose(out.gradient.value, GRADIENT, rtol=1e-4)


@pytest.mark.slow("compiles the references")
def test_the_checks_and_minimize_keep_a_class_that_checks_its_fields():
    optax = pytest.importorskip("optax")
    theta, init = Checked(jnp.asarray(THETA)), Checked(jnp.zeros(2))
    for name in ("Stationary", "Proximal", "Root"):
        problem, solver, method = checked_problem(name), CHECKED_SOLVERS[name][0], bl.Implicit(bl.LU())
        assert bl.check_condition(problem, theta, Checked(jnp.asarray(SOLUTION)), None).ok
        assert bl.check_hypergradient(problem, theta, init, None, solver, method).ok
        assert bl.compare_methods(problem, theta, init, None, solver, [method], runs=1).ok
        found = bl.minimize(problem, theta, init, None, solver, method, optax.adam(0.1), 2)
        assert isinstance(found.theta, Checked) and isinstance(found.w, Checked)


# --- Modes of JAX --------------------------------------------------------------------------------------------------


def run_all_entries(on_failure="raise"):
    """Call each entry point and compare its result with the closed form. ``on_failure`` is the policy of the layer."""
    optax = pytest.importorskip("optax")
    theta, init = jnp.asarray(THETA), jnp.zeros(2)
    for method in (bl.Implicit(bl.CG(4)), bl.Implicit(bl.Nystrom(2, 1e-8)), bl.Implicit(bl.GMRES(4)), bl.Unrolled()):
        out = bl.value_and_hypergradient(PROBLEM, bl.GradientDescent(0.3, 60), method)(theta, init, None)
        np.testing.assert_allclose(out.gradient, GRADIENT, rtol=1e-6)
        found = bl.minimize(PROBLEM, theta, init, None, bl.GradientDescent(0.3, 60), method, optax.sgd(1.0), 2)
        np.testing.assert_allclose(found.history.gradient_norm[0], np.linalg.norm(GRADIENT), rtol=1e-6)
        assert bool(jnp.isnan(found.history.linear_residual).all()) == isinstance(method, bl.Unrolled)
    layer = bl.implicit_layer(PROBLEM.condition, bl.HessianFree(4), bl.LU(), on_failure)
    slope = jax.grad(lambda theta: squared(layer(theta, init, None), None, None))(theta)
    np.testing.assert_allclose(slope, GRADIENT, rtol=1e-6)
    np.testing.assert_allclose(bl.solve(DESCENT, PROBLEM.condition, init, theta, None).w, SOLUTION, rtol=1e-6)
    fixed = bl.FixedPoint(lambda w, theta, data: w - 0.3 * jax.grad(quadratic)(w, theta, data))
    np.testing.assert_allclose(bl.solve(bl.Anderson(9), fixed, init, theta, None).w, SOLUTION, rtol=1e-6)


def run_checks():
    theta, init = jnp.asarray(THETA), jnp.zeros(2)
    assert bl.check_hypergradient(PROBLEM, theta, init, None, DESCENT, bl.Implicit(bl.CG(4))).ok
    assert bl.check_condition(PROBLEM, theta, jnp.asarray(SOLUTION), None).ok
    assert bl.compare_methods(PROBLEM, theta, init, None, DESCENT, [bl.Implicit(bl.CG(4))], runs=1).ok
    out = bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Implicit(bl.CG(4)))(theta, init, None)
    assert bl.certify(PROBLEM, theta, out, None, strong_convexity=1.0).estimate < 1e-6


MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "leaks": jax.checking_leaks,
    "disable_jit": jax.disable_jit,
}


def test_minimize_of_unrolled_steps_works_under_debug_nans():
    optax = pytest.importorskip("optax")
    arguments = jnp.asarray(THETA), jnp.zeros(2), None, bl.GradientDescent(0.3, 60), bl.Unrolled(), optax.sgd(1.0), 2
    with jax.debug_nans(True):
        history = bl.minimize(PROBLEM, *arguments).history
    np.testing.assert_allclose(history.gradient_norm[0], np.linalg.norm(GRADIENT), rtol=1e-6)
    assert bool(jnp.isnan(history.linear_residual).all())


@pytest.mark.slow("compiles everything again in each mode")
@pytest.mark.parametrize("mode", MODES)
def test_each_entry_point_works_in_the_strict_modes_of_jax(mode):
    # In reverse mode, versions of JAX after 0.10 report a leak for any callback in the tangent solve of
    # jax.lax.custom_root. A layer has such a callback unless it ignores failures.
    newer = tuple(map(int, jax.__version__.split(".")[:2])) > (0, 10)
    with MODES[mode]():
        run_all_entries("ignore" if mode == "leaks" and newer else "raise")


@pytest.mark.slow("compiles the references in each mode")
@pytest.mark.parametrize("mode", ["debug_nans", "rank_promotion", "leaks"])
def test_the_checks_work_in_the_strict_modes_of_jax(mode):
    with MODES[mode]():
        run_checks()


@pytest.mark.slow("compiles a hypergradient in two precisions")
def test_float64_may_be_switched_on_between_calls():
    function = bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Implicit(bl.CG(4)))
    for enabled, rtol in ((False, 1e-5), (True, 1e-12)):
        with jax.enable_x64(enabled):
            out = function(THETA, np.zeros(2), None)
            assert out.gradient.dtype == (jnp.float64 if enabled else jnp.float32)
            np.testing.assert_allclose(out.gradient, GRADIENT, rtol=rtol)


# --- Linear solvers and special problems ---------------------------------------------------------------------------


def dense_solution(matvec, b):
    return jnp.linalg.solve(jax.jacobian(matvec)(b), b)


@pytest.mark.parametrize(
    "linear",
    [
        dense_solution,
        lambda matvec, b, init=None: dense_solution(matvec, b),
        lambda matvec, b, init: (dense_solution(matvec, b), None),
        lambda matvec, b, init: jax.scipy.sparse.linalg.cg(matvec, b, init),
        jax.scipy.sparse.linalg.gmres,  # returns x and 0
    ],
    ids=["x", "with a start", "x and None", "jax's cg", "jax's gmres"],
)
def test_a_linear_solver_may_return_x_alone(linear):
    out = bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Implicit(linear))(jnp.asarray(THETA), jnp.zeros(2), None)
    np.testing.assert_allclose(out.gradient, GRADIENT, rtol=1e-5)
    assert float(out.linear.relative_residual) < 1e-5 and int(out.linear.status) == bl.Status.BUDGET_USED


def test_the_report_on_a_solver_that_returns_x_alone_has_the_true_residual():
    function = bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Implicit(lambda matvec, b: 0.5 * b), "ignore")
    out = function(jnp.asarray(THETA), jnp.zeros(2), None)
    residual = SOLUTION - MATRIX @ (0.5 * SOLUTION)
    expected = np.linalg.norm(residual) / np.linalg.norm(SOLUTION)
    np.testing.assert_allclose(out.linear.relative_residual, expected, rtol=1e-10)


def test_a_number_that_a_solver_returns_with_x_is_not_believed():
    function = bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Implicit(lambda matvec, b: (-b, 0)), "ignore")
    out = function(jnp.asarray(THETA), jnp.zeros(2), None)
    assert float(out.linear.relative_residual) > 1 and int(out.linear.status) == bl.Status.MAX_STEPS


def test_an_x_that_is_a_pair_is_not_taken_for_x_and_a_number():
    x, info = run_linear(
        lambda matvec, b: (b[0] / 2, b[1] / 2), lambda v: (2 * v[0], 2 * v[1]), (jnp.ones(3), jnp.asarray(5.0))
    )
    assert float(x[1]) == 2.5 and float(info.relative_residual) == 0


@pytest.mark.slow("compiles each linear solver", fast="linear0")
@pytest.mark.parametrize("linear", [bl.GMRES(), bl.Nystrom(2), bl.CG(), bl.CG(engine="watched"), bl.NormalCG(),
                                    bl.BiCGStab(), bl.LU(), bl.Cholesky(), bl.Neumann(3)])  # fmt: skip
def test_w_may_have_no_entries(linear):
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: jnp.sum(w**2)), lambda w, theta, data: theta**2)
    for init in (jnp.zeros(0), {"a": jnp.zeros((2, 0))}):
        condition = bl.Stationary(lambda w, theta, data: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w)))
        problem = bl.Problem(condition, lambda w, theta, data: theta**2)
        out = bl.value_and_hypergradient(problem, DESCENT, bl.Implicit(linear))(3.0, init, None)
        assert float(out.gradient) == 6.0


@pytest.mark.parametrize("solver", [bl.GaussNewton(3), bl.LevenbergMarquardt(3)], ids=["GaussNewton", "LM"])
def test_least_squares_may_have_no_unknowns(solver):
    solution = bl.solve(solver, bl.LeastSquares(lambda w, theta, data: w - theta), jnp.zeros(0), 1.0, None)
    assert solution.w.shape == (0,) and bl.Status(int(solution.status)).ok


@pytest.mark.slow("compiles two solvers for each shape", fast="tree-*")
@pytest.mark.parametrize("solver", ["LevenbergMarquardt", "GaussNewton"])
@pytest.mark.parametrize("init", [1.5, np.full((2, 2), 1.5), {"a": np.full(2, 1.5)}], ids=["scalar", "matrix", "tree"])
def test_least_squares_of_jaxopt_solve_a_root_of_any_shape(solver, init):
    cube = bl.Root(lambda w, theta, data: jax.tree.map(lambda leaf: leaf**3 - theta, w))
    found = bl.solve(bl.Jaxopt(solver, maxiter=50), cube, init, 8.0, None).w
    assert jax.tree.structure(found) == jax.tree.structure(init)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_allclose(leaf, 2.0, rtol=1e-6)


@pytest.mark.parametrize("solver", ["LevenbergMarquardt", "AndersonAcceleration"])
def test_solvers_of_jaxopt_give_no_warning_in_single_precision(solver):
    condition = {"LevenbergMarquardt": bl.Root(lambda w, theta, data: w**3 - theta),
                 "AndersonAcceleration": bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta)}[solver]  # fmt: skip
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bl.solve(bl.Jaxopt(solver, maxiter=30), condition, jnp.full(2, 1.5), jnp.ones(2), None)
    np.testing.assert_allclose(found.w, 1.0 if solver == "LevenbergMarquardt" else 2.0, rtol=1e-5)


@pytest.mark.slow("compiles Broyden's method in each precision", fast="bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_tolerance_of_broyden_that_the_precision_cannot_reach_costs_no_digits(dtype):
    cube = bl.Root(lambda w, theta, data: w**3 - theta)
    init, theta = jnp.full(2, 1.5, dtype), jnp.array([1.0, 2.0], dtype)
    found = bl.solve(bl.Jaxopt("Broyden", maxiter=60, tol=1e-30), cube, init, theta, None)
    # If the solve fails, its status is MAX_STEPS, whose message advises a larger tol or float64.
    assert int(found.status) in (bl.Status.MAX_STEPS, bl.Status.CONVERGED)
    np.testing.assert_allclose(found.w.astype(float), [1.0, 2 ** (1 / 3)], rtol=2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("tol", [1e-3, 1e-30, 0.0])
def test_polyak_steps_stop_at_the_minimum(tol):
    solver = bl.Jaxopt("PolyakSGD", maxiter=60, tol=tol, fun_min=0.0)
    square = bl.Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2))
    found = bl.solve(solver, square, jnp.zeros(2), jnp.ones(2), None)
    np.testing.assert_allclose(found.w, 1.0, atol=1e-3)
    assert bl.Status(int(found.status)).ok


OF_ANY_OBJECTIVE = [bl.Implicit(bl.CG(1)), bl.Unrolled(), bl.Unrolled(last=2), bl.ForwardUnrolled(), bl.OneStep(),
                    bl.FiniteDifference(bl.CG(1)), bl.ValuePenalty(10.0), bl.EvolutionStrategies(2)]  # fmt: skip


@pytest.mark.slow("compiles each method", fast="method4")
@pytest.mark.parametrize("method", OF_ANY_OBJECTIVE)
def test_an_outer_function_may_be_a_constant(method):
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: 1.0)
    out = bl.value_and_hypergradient(problem, bl.GradientDescent(0.5, 40), method)(1.0, 0.0, None)
    assert float(out.value) == 1.0 and abs(float(out.gradient)) < 1e-9


VALUE_AND_AUX = lambda w, theta, data: (0.5 * jnp.sum((w - theta) ** 2), w)  # noqa: E731
VECTOR = lambda w, theta, data: w - theta  # noqa: E731


@pytest.mark.parametrize("objective", [VALUE_AND_AUX, VECTOR], ids=["aux", "vector"])
@pytest.mark.parametrize("name", ["Stationary", "Proximal", "Projected", "ProximalGradient"])
def test_an_objective_that_returns_no_scalar_is_refused_with_a_remedy(name, objective):
    condition = {
        "Stationary": lambda: bl.Stationary(objective),
        "Proximal": lambda: bl.Proximal(objective, 1.0),
        "Projected": lambda: bl.Projected(objective, lambda w, theta, data: w),
        "ProximalGradient": lambda: bl.ProximalGradient(objective, lambda w, theta, data, step: w),
    }[name]()
    remedy = "for (value, aux) say has_aux=True" if name == "Stationary" else "this condition takes no aux"
    message = re.escape(remedy) if objective is VALUE_AND_AUX else r"an array of shape \(2,\): return its sum"
    for call in (condition.residual, getattr(condition, "potential", condition.residual)):
        with pytest.raises(TypeError, match=message):
            call(jnp.zeros(2), jnp.ones(2), None)


@pytest.mark.slow("traces each method", fast="method3")
@pytest.mark.parametrize("method", OF_ANY_OBJECTIVE)
def test_an_outer_function_with_a_vector_or_a_string_is_refused_with_a_remedy(method):
    condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2))
    for outer, has_aux, message in (
        (lambda w, theta, data: w, False, r"an array of shape \(2,\): return its sum or mean"),
        (lambda w, theta, data: (jnp.sum(w), {"a": "text"}), True, r"got str at aux\['a'\]: .* leave it out"),
    ):
        function = bl.value_and_hypergradient(bl.Problem(condition, outer, has_aux), bl.GradientDescent(0.5, 3), method)
        with pytest.raises(TypeError, match=message):
            function(jnp.ones(2), jnp.zeros(2), None)


def test_an_outer_function_that_contradicts_has_aux_is_refused():
    condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
    for outer, has_aux, message in (
        (lambda w, theta, data: (w, w), False, "a tuple of 2: for .* say has_aux=True"),
        (lambda w, theta, data: w, True, "has_aux=True must return .*: return a pair"),
    ):
        function = bl.value_and_hypergradient(
            bl.Problem(condition, outer, has_aux), bl.GradientDescent(0.5, 1), bl.Implicit(bl.CG(1))
        )
        with pytest.raises(TypeError, match=message):
            function(1.0, 0.0, None)


def test_an_objective_may_be_a_constant():
    pull = bl.Proximal(lambda w, theta, data: 0.0, 1.0)
    problem = bl.Problem(pull, lambda w, theta, data: jnp.sum(w**2))
    out = bl.value_and_hypergradient(problem, bl.HessianFree(3), bl.Implicit(bl.CG(2)))(jnp.ones(2), jnp.zeros(2), None)
    np.testing.assert_allclose(out.gradient, [2.0, 2.0])


# --- Error messages ------------------------------------------------------------------------------------------------

WRONG_DECLARATIONS = {
    "Stationary": lambda: bl.Stationary(lambda w, theta: 0.0),
    "Proximal": lambda: bl.Proximal(lambda w, theta: 0.0, 1.0),
    "Proximal, strength": lambda: bl.Proximal(quadratic, lambda theta: 1.0),
    "Proximal, center": lambda: bl.Proximal(quadratic, 1.0, lambda theta: theta),
    "Root": lambda: bl.Root(lambda w, theta: w),
    "FixedPoint": lambda: bl.FixedPoint(lambda w, theta: w),
    "Projected": lambda: bl.Projected(quadratic, lambda w: w),
    "ProximalGradient": lambda: bl.ProximalGradient(quadratic, lambda w, theta, data: w),
    "KKT": lambda: bl.KKT(quadratic, equality=lambda w: w),
    "Problem": lambda: bl.Problem(bl.Root(quadratic), lambda w: w),
    "not callable": lambda: bl.Root(3.0),
}


@pytest.mark.parametrize("name", WRONG_DECLARATIONS)
def test_a_function_of_other_arguments_is_refused_when_it_is_declared(name):
    with pytest.raises(TypeError, match=r"calls \w+\(.*\), got (a function of|float)"):
        WRONG_DECLARATIONS[name]()


WRONG_KINDS = {
    "a class of linear solvers": (lambda: bl.Implicit(bl.CG), r"the class CG: pass an instance, CG\(…\)"),
    "a class in a layer": (lambda: bl.implicit_layer(PROBLEM.condition, DESCENT, bl.LU), "the class LU: pass an inst"),
    "a class of inner solvers": (
        lambda: bl.value_and_hypergradient(PROBLEM, bl.GradientDescent, bl.Implicit(bl.CG(2))),
        "calls solver.* got the class GradientDescent: pass an instance",
    ),
    "a class in solve": (
        lambda: bl.solve(bl.HessianFree, PROBLEM.condition, jnp.zeros(2), THETA, None),
        "got the class HessianFree: pass an instance",
    ),
    "a class of methods": (
        lambda: bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Unrolled),
        "the class Unrolled: pass an instance",
    ),
    "a class of conditions": (lambda: bl.Problem(bl.Root, squared), "got the class Root: pass one"),
    "a condition for a problem": (
        lambda: bl.value_and_hypergradient(PROBLEM.condition, DESCENT, bl.Implicit(bl.CG(2))),
        r"needs a problem, got Stationary: pass Problem\(condition, outer\)",
    ),
    "a problem for a condition": (
        lambda: bl.implicit_layer(PROBLEM, DESCENT, bl.CG(2)),
        "needs a condition, got Problem: pass its condition",
    ),
    "a linear solver for a method": (
        lambda: bl.value_and_hypergradient(PROBLEM, DESCENT, bl.CG(2)),
        r"calls method\(problem, .* got a function of \(matvec",
    ),
    "a method for a linear solver": (
        lambda: bl.implicit_layer(PROBLEM.condition, DESCENT, bl.Implicit(bl.CG(2))),
        "calls linear.* got Implicit: pass one",
    ),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_a_class_or_another_kind_of_object_is_refused_with_a_remedy(name):
    call, message = WRONG_KINDS[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_a_function_that_makes_a_transformation_is_refused_with_a_remedy():
    optax = pytest.importorskip("optax")
    with pytest.raises(TypeError, match=r"Optax needs .*, got adam: call it"):
        bl.Optax(optax.adam, 3)
    arguments = PROBLEM, jnp.asarray(THETA), jnp.zeros(2), None, DESCENT, bl.Implicit(bl.CG(2))
    with pytest.raises(TypeError, match=r"minimize needs .*, got sgd: call it"):
        bl.minimize(*arguments, optax.sgd, 1)


METHODS_OF_INIT = {
    "right": [bl.Unrolled(), bl.ForwardUnrolled()],
    "zero": [bl.Implicit(bl.CG(2)), bl.OneStep(), bl.FiniteDifference(bl.CG(2)), bl.ValuePenalty(10.0),
             bl.EvolutionStrategies(2), bl.Unrolled(last=2)],
}  # fmt: skip


@pytest.mark.slow("compiles each method", fast="zero-0")
@pytest.mark.parametrize(
    ("kind", "index"), [(kind, i) for kind, all_ in METHODS_OF_INIT.items() for i in range(len(all_))]
)
def test_a_derivative_in_init_is_right_or_zero_with_a_warning(kind, index):
    method = METHODS_OF_INIT[kind][index]
    function = bl.value_and_hypergradient(PROBLEM, bl.GradientDescent(0.1, 3), method, "ignore")

    def value(init):
        return function(jnp.asarray(THETA), init, None).value

    for transform in (lambda f: f, jax.jit):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            slope = jax.grad(transform(value))(jnp.ones(2))
        told = any("init of a hypergradient is being differentiated" in str(w.message) for w in caught)
        if kind == "zero":
            assert told and not slope.any()
        else:
            shift = 1e-6 * np.eye(2)
            expected = [(float(value(1 + d)) - float(value(1 - d))) / 2e-6 for d in shift]
            assert not told
            np.testing.assert_allclose(slope, expected, rtol=1e-6)


FUNCTION = bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Implicit(bl.CG(4)))
LAYER = bl.implicit_layer(PROBLEM.condition, DESCENT, bl.CG(4))


def minimize(theta, init, data, start=None):
    optax = pytest.importorskip("optax")
    return bl.minimize(PROBLEM, theta, init, data, DESCENT, bl.Implicit(bl.CG(4)), optax.sgd(0.1), 1, start=start)


def check(theta, init, data, start=None):
    return bl.check_hypergradient(PROBLEM, theta, init, data, DESCENT, bl.Implicit(bl.CG(4)), start=start)


def compare(theta, init, data, start=None):
    return bl.compare_methods(PROBLEM, theta, init, data, DESCENT, [bl.Implicit(bl.CG(4))], start=start)


def solve(theta, init, data, start=None):
    return bl.solve(DESCENT, PROBLEM.condition, init, theta, data, start=start)


ENTRIES = {"H": FUNCTION, "layer": LAYER, "minimize": minimize, "check": check, "compare": compare, "solve": solve}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_argument_that_is_not_an_array_is_refused_with_a_remedy(entry):
    call, theta, init = ENTRIES[entry], jnp.asarray(THETA), jnp.zeros(2)
    with pytest.raises(TypeError, match=r"needs a start: give init, .* or start="):
        call(theta, None, None)
    with pytest.raises(TypeError, match="both init and start"):
        call(theta, init, None, start=lambda theta, data: init)
    with pytest.raises(TypeError, match=r"start is a function of \(theta, data\), got .*: give a point as init"):
        call(theta, None, None, start=init)
    words = "is not an array or a number, got {}: let .* static field .*equinox.partition"
    with pytest.raises(TypeError, match=r"data\['f'\] " + words.format(r"\w+")):
        call(theta, init, {"f": jnp.sin})
    for leaf, kind in (("name", "str"), (object(), "object")):
        with pytest.raises(TypeError, match=r"theta\[1\] " + words.format(kind)):
            call([theta, leaf], init, None)
    with pytest.raises(TypeError, match=r"outer variables are real, got complex128 at theta|is complex, .*: split it"):
        call(theta.astype(complex), init, None)
    with pytest.raises(TypeError, match=r"inner variables are floating point, got int64 at init"):
        call(theta, init.astype(int), None)
    with pytest.raises(TypeError, match=r"init\[1\] " + words.format("str")):
        call(theta, [init, "name"], None)
    with pytest.raises(TypeError, match=r"init is not an array or a number|init\[0\] is not an array or a number"):
        call(theta, None, None, start=lambda theta, data: [object()])


def test_solvers_of_jaxopt_that_do_not_fit_are_refused_with_a_remedy():
    jaxopt = pytest.importorskip("jaxopt")
    with pytest.raises(TypeError, match=r'LBFGS\(…\), an instance: use Jaxopt\("LBFGS", …\)'):
        bl.Jaxopt(jaxopt.LBFGS(quadratic))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'a functools.partial of LBFGS: use Jaxopt\("LBFGS", …\)'):
        bl.Jaxopt(functools.partial(jaxopt.LBFGS, maxiter=3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="jaxopt's LBFGS gets its function from the condition: leave out fun"):
        bl.solve(bl.Jaxopt("LBFGS", fun=quadratic), PROBLEM.condition, jnp.zeros(2), jnp.asarray(THETA), None)
    for name, ours in (("solve_lu", "LU"), ("solve_cg", "CG"), ("solve_gmres", "GMRES")):
        method = bl.Implicit(getattr(jaxopt.linear_solve, name))
        with pytest.raises(ValueError, match=rf"jaxopt's {name} takes other arguments .*: use bl.{ours}\(\)"):
            bl.value_and_hypergradient(PROBLEM, DESCENT, method)(jnp.asarray(THETA), jnp.zeros(2), None)
    with pytest.raises(ValueError, match="a linear solver returns x, a pytree like b"):
        bl.value_and_hypergradient(PROBLEM, DESCENT, bl.Implicit(lambda matvec, b: b[:1]))(
            jnp.asarray(THETA), jnp.zeros(2), None
        )


@pytest.mark.parametrize("residual", [lambda w, theta, data: (w, 3.0), lambda w, theta, data: jnp.append(w, w)],
                         ids=["aux", "more equations"])  # fmt: skip
def test_a_residual_that_is_not_a_tree_like_w_is_refused_with_a_remedy(residual):
    problem = bl.Problem(bl.Root(residual), squared)
    with pytest.raises(ValueError, match=r"the residual is not a tree like w: got .* expected .* one entry for each"):
        bl.value_and_hypergradient(problem, newton, bl.Implicit(bl.LU()))(1.0, jnp.zeros(2), None)
    assert not bl.check_condition(problem, 1.0, jnp.zeros(2), None)["structure"].ok


def test_a_mapping_may_be_broadcast_to_w_but_not_w_to_the_mapping():
    smaller = bl.FixedPoint(lambda w, theta, data: jnp.mean(theta))
    np.testing.assert_allclose(smaller.residual(jnp.ones(2), jnp.asarray(THETA), None), 1 - np.mean(THETA) * np.ones(2))
    larger = bl.FixedPoint(lambda w, theta, data: theta)
    with pytest.raises(ValueError, match=r"the mapping is not a tree like w: got .*\(2,\).* expected .*\(\)"):
        larger.residual(jnp.ones(()), jnp.asarray(THETA), None)


def test_minimize_converts_numpy_data_once(monkeypatch):
    optax = pytest.importorskip("optax")
    data, converted, convert = np.ones(1000), [], jnp.asarray

    def counting(value, *arguments, **options):
        converted.append(value is data)
        return convert(value, *arguments, **options)

    monkeypatch.setattr(jnp, "asarray", counting)
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: 0.5 * jnp.mean((w - theta * data) ** 2)), squared)
    bl.minimize(problem, 1.0, 0.0, data, bl.GradientDescent(1.0, 1), bl.Implicit(bl.CG(1)), optax.sgd(0.1), 5)
    assert sum(converted) == 1
