"""The decorators custom_root and custom_fixed_point, on user-defined solver functions with any arguments.

The expected numbers come from closed forms, from differences in float64, and from jaxopt's custom_root.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import bilevel as bl

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")

MATRIX = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.5, 0.0, 1.5]])
WEIGHTS = np.array([1.0, -1.0, 2.0])
THETA, SCALE, SHIFT = np.array([1.0, -0.5, 2.0]), 1.3, 0.4
POINT = np.array([*THETA, SCALE, SHIFT])


def system(w, theta, scale, *, shift=0.0):
    """Return the residual of scale·Aw + w³ = θ + shift, with a Jacobian that is not symmetric."""
    return scale * (MATRIX @ w) + w**3 - theta - shift


@jax.jit
def newton(init, theta, scale, *, shift=0.0):
    def step(_, w):
        jacobian = scale * MATRIX + jnp.diag(3 * w**2)
        return w - jnp.linalg.solve(jacobian, system(w, theta, scale, shift=shift))

    return jax.lax.fori_loop(0, 20, step, jnp.zeros(3) if init is None else init)


def newton_at(x):
    return np.asarray(newton(None, x[:3], x[3], shift=x[4]))


def exact_jacobian(x):
    """Return −(∂F/∂w)⁻¹ ∂F/∂x of the system at its solution."""
    w = newton_at(x)
    inverse = np.linalg.inv(x[3] * MATRIX + np.diag(3 * w**2))
    return inverse @ np.column_stack([np.eye(3), -MATRIX @ w, np.ones(3)])


def central_differences(function, x, step=1e-5):
    """Return the Jacobian of a function of a vector, with an error of the order of step² + eps/step."""
    rows = np.eye(x.size) * step
    return np.stack([(function(x + row) - function(x - row)) / (2 * step) for row in rows], -1)


root = bl.custom_root(system)(newton)


def root_at(x):
    return root(None, x[:3], x[3], shift=x[4])


def loss_at(x):
    return jnp.sin(root_at(x)) @ WEIGHTS


def exact_hessian(x):
    """Return the Hessian of loss_at, by differences of its exact gradient."""
    return central_differences(lambda x: exact_jacobian(x).T @ (np.cos(newton_at(x)) * WEIGHTS), x)


def test_the_closed_form_agrees_with_differences():
    np.testing.assert_allclose(exact_jacobian(POINT), central_differences(newton_at, POINT), atol=1e-8)


@pytest.mark.slow("compiles the Jacobian in four ways", fast=("forwards-eager", "backwards-jit"))
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forwards", "backwards"])
def test_the_jacobian_in_arguments_by_position_and_by_name(mode, transform):
    np.testing.assert_allclose(transform(mode(root_at))(POINT), exact_jacobian(POINT), rtol=1e-12)


def test_the_hessian():
    np.testing.assert_allclose(jax.jit(jax.hessian(loss_at))(POINT), exact_hessian(POINT), atol=1e-8)


def test_reverse_over_reverse():
    np.testing.assert_allclose(jax.jit(jax.jacrev(jax.jacrev(loss_at)))(POINT), exact_hessian(POINT), atol=1e-8)


def test_vmap_over_some_of_the_arguments():
    def loss(theta, scale):
        return root(None, theta, scale, shift=SHIFT) @ WEIGHTS

    actual = jax.vmap(jax.grad(loss), in_axes=(0, None))(np.stack([THETA, 2 * THETA]), SCALE)
    points = POINT, np.array([*(2 * THETA), SCALE, SHIFT])
    np.testing.assert_allclose(actual, [(WEIGHTS @ exact_jacobian(point))[:3] for point in points], rtol=1e-10)


@pytest.mark.slow("compiles jaxopt's decorator next to ours")
def test_derivatives_equal_those_of_jaxopts_decorator():
    jaxopt = pytest.importorskip("jaxopt")

    def positional(w, theta, scale, shift):
        return system(w, theta, scale, shift=shift)

    def solver(init, theta, scale, shift=SHIFT):
        return newton(init, theta, scale, shift=shift)

    theirs = jaxopt.implicit_diff.custom_root(positional, solve=jaxopt.linear_solve.solve_lu)(solver)
    ours = bl.custom_root(positional)(solver)

    def loss(root, theta, scale):
        return root(jnp.zeros(3), theta, scale) @ WEIGHTS

    actual, expected = (jax.grad(loss, (1, 2))(root, jnp.asarray(THETA), SCALE) for root in (ours, theirs))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), actual, expected)


def half_tanh(w, theta, gain):
    return jax.tree.map(lambda leaf, t: gain["slope"] * jnp.tanh(leaf) + t, w, theta)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forwards", "backwards"])
def test_a_fixed_point_of_a_tree(mode):
    @bl.custom_fixed_point(half_tanh, tol=1e-10)
    def solver(init, theta, gain):
        return jax.lax.fori_loop(0, 60, lambda _, w: half_tanh(w, theta, gain), init)

    def solution(slope):
        w = solver({"a": 0.0, "b": jnp.zeros(2)}, {"a": 0.3, "b": jnp.array([0.1, 0.2])}, {"slope": slope})
        return jnp.concatenate([w["a"][None], w["b"]])

    w = solution(0.5)
    np.testing.assert_allclose(jax.jit(mode(solution))(0.5), jnp.tanh(w) / (1 - 0.5 / jnp.cosh(w) ** 2), rtol=1e-8)


def test_constants_reach_the_residual_and_the_solver_unchanged():
    def residual(w, theta, power, function, name, flag, nothing=None):
        assert (name, flag, nothing) == ("cube", True, None) and type(power) is int
        return function(w) ** power - theta["theta"]

    @bl.custom_root(residual)
    def solver(init, theta, power, function, name, flag, nothing=None):
        assert init is None and type(flag) is bool
        return theta["theta"] ** (1 / power)

    theta = {"theta": jnp.array(8.0), "count": np.arange(3), "note": "kept"}
    gradient = jax.grad(lambda t: solver(None, theta | {"theta": t}, 3, jnp.abs, "cube", flag=True))(theta["theta"])
    np.testing.assert_allclose(gradient, 1 / 12, rtol=1e-12)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_random_key_and_integer_arrays_are_arguments(transform):
    @bl.custom_root(lambda w, theta, key, counts: w - theta * jax.random.normal(key) * counts.astype(float))
    def solver(init, theta, key, counts):
        return theta * jax.random.normal(key) * counts.astype(float)

    key, counts = jax.random.key(3), np.array([1, 2])
    gradient = transform(jax.grad(lambda theta, key: solver(None, theta, key, counts).sum()))(2.0, key)
    np.testing.assert_allclose(gradient, 3 * jax.random.normal(key), rtol=1e-12)


def test_constants_that_are_equal_but_differ_in_type_are_not_mixed_up():
    @bl.custom_root(lambda w, theta, kind: w - theta * {int: 2.0, bool: 3.0}[type(kind)])
    def solver(init, theta, kind):
        return theta * {int: 2.0, bool: 3.0}[type(kind)]

    assert [float(jax.grad(solver, 1)(None, 1.0, kind)) for kind in (1, True, 1)] == [2.0, 3.0, 2.0]


def test_a_constant_without_a_hash():
    @bl.custom_root(lambda w, theta, names: w - len(names) * theta)
    def solver(init, theta, names):
        return len(names) * theta

    assert float(jax.grad(solver, 1)(None, 1.0, np.array(["a", "b"], object))) == 2.0


def test_a_layer_is_compiled_once_for_the_same_constants():
    traces = []

    def residual(w, theta, power):
        traces.append(power)
        return w**power - theta

    solver = bl.custom_root(residual)(lambda init, theta, power: theta ** (1 / power))
    solver(None, 8.0, 3)
    before = len(traces)
    for theta in (8.0, 27.0):
        solver(None, theta, 3)
    assert before and len(traces) == before


class Step(NamedTuple):
    params: jax.Array
    state: dict


def test_an_aux_has_no_derivative_and_keeps_its_types():
    @bl.custom_root(lambda w, theta: w - theta**2, has_aux=True)
    def solver(init, theta):
        return Step(theta**2, {"trace": [theta, 7, "seven"]})

    step = solver(None, 3.0)
    assert isinstance(step, Step) and step.state == {"trace": [3.0, 7, "seven"]}
    assert jax.grad(lambda theta: solver(None, theta).params)(3.0) == 6.0
    assert jax.grad(lambda theta: solver(None, theta).state["trace"][0])(3.0) == 0.0
    plain = bl.custom_root(lambda w, theta: w - theta**2, has_aux=True)(lambda init, theta: (theta**2, theta))
    assert jax.jit(plain)(None, 3.0) == (9.0, 3.0)

    def aux_of_a_closure(theta):
        return bl.custom_root(lambda w: w - theta, has_aux=True)(lambda init: (theta, theta))(None)[1]

    assert jax.grad(aux_of_a_closure)(3.0) == 0.0


@pytest.mark.slow("compiles jaxopt's LBFGS")
def test_a_method_of_jaxopt_as_solver():
    jaxopt = pytest.importorskip("jaxopt")

    def ridge(w, theta):
        return 0.5 * jnp.sum((MATRIX @ w - WEIGHTS) ** 2) + 0.5 * theta * jnp.sum(w**2)

    solver = jaxopt.LBFGS(ridge, maxiter=100, tol=1e-12, implicit_diff=False, unroll=False)
    decorated = bl.custom_root(jax.grad(ridge), has_aux=True, linear=bl.CG(20, tol=1e-12), symmetric=True)(solver.run)
    gradient = jax.grad(lambda theta: decorated(jnp.zeros(3), theta=theta).params @ WEIGHTS)(0.7)
    inverse = np.linalg.inv(MATRIX.T @ MATRIX + 0.7 * np.eye(3))
    np.testing.assert_allclose(gradient, -WEIGHTS @ inverse @ inverse @ MATRIX.T @ WEIGHTS, rtol=1e-8)


def test_a_linear_solver_that_is_a_function():
    def solve(matvec, b):
        return jnp.linalg.solve(jax.jacobian(matvec)(b), b)

    by_function = bl.custom_root(system, linear=solve)(newton)
    actual = jax.jacrev(lambda theta: by_function(None, theta, SCALE, shift=SHIFT))(THETA)
    np.testing.assert_allclose(actual, exact_jacobian(POINT)[:, :3], rtol=1e-10)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forwards", "backwards"])
def test_theta_in_a_closure_of_the_residual_and_of_the_solver(mode, transform):
    def solution(theta):
        @bl.custom_root(lambda w: w**3 - theta)
        def solver(init):
            def step(w):
                return w - (w**3 - theta) / (3 * w**2)

            return jax.lax.while_loop(lambda w: jnp.abs(w**3 - theta) > 1e-12, step, init)

        return solver(1.5)

    np.testing.assert_allclose(transform(mode(solution))(8.0), 1 / 12, rtol=1e-12)


@bl.custom_root(system, callback=True)
def by_scipy(init, theta, scale, *, shift=0.0):
    assert all(isinstance(argument, np.ndarray) for argument in (init, theta))
    return scipy.optimize.root(lambda w: scale * (MATRIX @ w) + w**3 - theta - shift, init, tol=1e-12).x


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forwards", "backwards"])
def test_a_solver_of_scipy(mode, transform):
    actual = transform(mode(lambda x: by_scipy(jnp.zeros(3), x[:3], x[3], shift=x[4])))(POINT)
    np.testing.assert_allclose(actual, exact_jacobian(POINT), rtol=1e-9)


@pytest.mark.slow("compiles second derivatives of a solver of SciPy")
def test_a_solver_of_scipy_under_vmap_and_differentiated_twice():
    def loss(x):
        return jnp.sin(by_scipy(jnp.zeros(3), x[:3], x[3], shift=x[4])) @ WEIGHTS

    points = np.stack([POINT, POINT + 0.1])
    expected = [exact_hessian(point) for point in points]
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.hessian(loss)))(points), expected, atol=1e-8)


def test_a_callback_needs_the_shapes_of_w_under_a_trace_only():
    solver = bl.custom_root(lambda w, theta: w - theta, callback=True)(lambda init, theta: theta)
    assert jax.grad(solver, 1)(None, 3.0) == 1.0
    with pytest.raises(TypeError, match="give init as a pytree of arrays like w, got NoneType"):
        jax.jit(solver)(None, 3.0)


def test_a_callback_returns_the_dtype_of_init():
    solver = bl.custom_root(lambda w, theta: w - theta, callback=True)(lambda init, theta: np.float64(theta))
    assert jax.jit(solver)(jnp.float32(0.0), 3.0).dtype == jnp.float32


def test_a_failed_solve_is_an_error_where_tol_says_so():
    def hasty(init, theta):
        return init + 0.1

    residual = lambda w, theta: w - theta  # noqa: E731
    assert float(bl.custom_root(residual)(hasty)(0.0, 1.0)) == 0.1
    with pytest.raises(bl.HypergradientError, match=r"inner solve of a layer, MAX_STEPS, ‖F‖ = 0.9"):
        bl.custom_root(residual, tol=1e-3)(hasty)(0.0, 1.0)
    with pytest.warns(RuntimeWarning, match="MAX_STEPS"):
        bl.custom_fixed_point(lambda w, theta: theta, tol=1e-3, on_failure="warn")(hasty)(0.0, 1.0)
    with pytest.raises(bl.HypergradientError, match="NONFINITE"):
        bl.custom_root(residual)(lambda init, theta: theta * jnp.nan)(None, 1.0)


def test_a_failed_linear_solve_of_the_derivative_is_an_error():
    singular = bl.custom_root(lambda w, theta: 0 * w + theta - theta)(lambda init, theta: theta)
    with pytest.raises(bl.HypergradientError, match="linear solve in the derivative of a layer, SINGULAR"):
        jax.grad(singular, 1)(None, jnp.ones(()))


def test_the_derivative_in_init_is_zero_with_a_warning():
    with pytest.warns(UserWarning, match=r"custom_fixed_point are \(init, theta, \.\.\.\)"):
        assert jax.grad(lambda init: root(init, THETA, SCALE, shift=SHIFT)[0])(jnp.zeros(3))[0] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.grad(lambda theta: root(jnp.zeros(3), theta, SCALE, shift=SHIFT)[0])(THETA)


def test_init_by_name_and_defaults_of_the_solver():
    @bl.custom_root(lambda w, theta, factor: w - factor * theta)
    def solver(init, theta, factor=2.0):
        return factor * theta + 0 * init

    assert jax.grad(lambda theta: solver(theta=theta, init=0.0))(1.0) == 2.0


@pytest.mark.parametrize("decorator", [bl.custom_root, bl.custom_fixed_point])
def test_wrong_uses_are_refused(decorator):
    with pytest.raises(TypeError, match=r"needs a function of \(w, \*args, \*\*kwargs\), got ndarray"):
        decorator(np.zeros(3))
    alone = decorator(lambda w, theta: w - theta, has_aux=True)(lambda init, theta: jnp.array([theta, theta]))
    with pytest.raises(TypeError, match=r"needs a solver function that returns a pair \(w, aux\), got Array"):
        alone(None, 1.0)
    with pytest.raises(ValueError, match="cannot know the shapes of aux"):
        decorator(system, has_aux=True, callback=True)
    with pytest.raises(ValueError, match="CG needs a symmetric operator"):
        decorator(system, linear=bl.CG(3))
    with pytest.raises(ValueError, match='on_failure must be "raise"'):
        decorator(system, on_failure="shout")
    with pytest.raises(TypeError, match=r"1 by position and \['extra'\] by name .*same arguments"):
        decorator(lambda w, theta: w)(lambda init, theta, **more: theta)(None, 1.0, extra=2.0)
    with pytest.raises(TypeError, match="takes init as its first positional argument"):
        decorator(lambda w, theta: w)(lambda *, theta: theta)(theta=1.0)


def test_the_linear_solvers_of_jaxopt_are_refused_by_name():
    jaxopt = pytest.importorskip("jaxopt")
    solver = bl.custom_root(lambda w, theta: w - theta, linear=jaxopt.linear_solve.solve_cg)(lambda init, theta: theta)
    with pytest.raises(ValueError, match=r"jaxopt's solve_cg .* use bl\.CG\(\)"):
        jax.grad(solver, 1)(None, 1.0)


def test_the_layer_returns_its_solution_without_a_derivative():
    condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2)
    layer = bl.implicit_layer(condition, bl.GradientDescent(0.5, max_steps=3), bl.LU(), with_solution=True)
    w, solution = layer(2.0, 0.0, None)
    assert float(w) == float(solution.w) == 3.5 and float(solution.residual_norm) == 0.5 and int(solution.steps) == 3
    (dw, dsolution) = jax.jvp(lambda theta: layer(theta, 0.0, None), (2.0,), (1.0,))[1]
    assert float(dw) == 4.0 and float(dsolution.w) == float(dsolution.residual_norm) == 0.0
    statuses = jax.vmap(lambda theta: layer(theta, 0.0, None)[1].status)(jnp.array([2.0, jnp.nan]))
    assert statuses.tolist() == [bl.Status.BUDGET_USED, bl.Status.NONFINITE]


def pair(function):
    return lambda w, theta, data: (function(w, theta, data), {"norm": jnp.sum(w**2), "data": data})


@pytest.mark.parametrize(
    ("declare", "function", "exact"),
    [
        (bl.Stationary, lambda w, theta, data: jnp.sum((w - theta**2) ** 2), lambda theta: 2 * theta),
        (bl.LeastSquares, lambda w, theta, data: (w - theta**2, 3 * (w - theta**2)), lambda theta: 2 * theta),
        (bl.Root, lambda w, theta, data: w - theta**2, lambda theta: 2 * theta),
        (bl.FixedPoint, lambda w, theta, data: 0.5 * w + theta**2, lambda theta: 4 * theta),
    ],
)
def test_a_condition_leaves_an_aux_out_of_derivatives(declare, function, exact):
    condition = declare(pair(function), has_aux=True)
    layer = bl.implicit_layer(condition, lambda c, init, theta, data: exact(theta) * theta / 2, bl.LU())
    assert float(jax.grad(layer)(3.0, 0.0, None)) == pytest.approx(float(exact(3.0)), rel=1e-12)
    aux = condition.aux(jnp.full(2, 2.0), 0.0, 7)
    assert float(aux["norm"]) == 8.0 and aux["data"] == 7
    assert replace(condition, positive_definite=True).aux(jnp.ones(2), 0.0, 7)["data"] == 7
    assert declare(function).aux(jnp.ones(2), 0.0, 7) is None
    with pytest.raises(ValueError, match=r"has_aux=True must return a pair \(value, aux\)"):
        declare(lambda w, theta, data: w, has_aux=True).residual(jnp.ones(2), 0.0, 7)
