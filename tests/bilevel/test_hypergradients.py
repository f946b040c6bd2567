"""Hypergradients agree with closed forms under JAX's transformations, and failures and misuse are reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import CASES, EIGENVALUES, affine_root, descent_problem, imaml, newton, quadratic, ridge

import bilevel as bl


def two_devices():
    """Return a mesh of two devices along the axis "task", and the partition specs for split and replicated arrays."""
    mesh = jax.make_mesh((2,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
    return mesh, jax.sharding.PartitionSpec("task"), jax.sharding.PartitionSpec()


def gradient_of(case, linear=None, on_failure="raise"):
    linear = linear or (bl.CG(20) if case.condition.symmetric else bl.LU())
    return bl.value_and_hypergradient(case.problem, newton, bl.Implicit(linear), on_failure)


def assert_trees_close(actual, expected, rtol):
    """Assert that two trees differ by at most rtol times the largest entry, which sets the size of rounding errors."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


@pytest.mark.slow("compiles each problem", fast="imaml")
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_agree_with_the_closed_form(name):
    case = CASES[name]()
    out = gradient_of(case)(case.theta, case.init, case.data)
    assert_trees_close(out.value, case.value(case.theta), case.tolerance)
    assert_trees_close(out.gradient, case.gradient, case.tolerance)
    assert_trees_close(out.inner.w, case.exact(case.theta, case.data), case.tolerance)
    assert float(out.linear.relative_residual) < case.tolerance


@pytest.mark.slow("compiles a Jacobian through both solves")
def test_the_layer_has_the_jacobian_of_ridge_regression():
    case = ridge()
    layer = bl.implicit_layer(case.condition, newton, bl.LU())
    w, (x, _) = case.exact(case.theta, case.data), case.data
    expected = -jnp.linalg.solve(x.T @ x / 12 + case.theta * jnp.eye(3), w)
    np.testing.assert_allclose(jax.jacfwd(layer)(case.theta, case.init, case.data), expected, rtol=1e-10)
    np.testing.assert_allclose(jax.jacrev(layer)(case.theta, case.init, case.data), expected, rtol=1e-10)


def test_the_gradient_is_the_formula_of_implicit_maml():
    case = imaml(strength=2.0)
    out = gradient_of(case)(case.theta, case.init, case.data)
    g = jax.grad(case.outer)(case.exact(case.theta, case.data), case.theta, case.data)
    hessian = jax.hessian(lambda v: case.condition.objective({"a": v[:2], "b": v[2]}, None, case.data))(jnp.zeros(3))
    expected = jnp.linalg.solve(jnp.eye(3) + hessian / 2.0, jnp.append(g["a"], g["b"]))
    assert_trees_close(out.gradient, {"a": expected[:2], "b": expected[2]}, case.tolerance)


@pytest.mark.slow("compiles second derivatives, forwards and backwards")
@pytest.mark.parametrize("name", ["affine root", "imaml"])
@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev])
def test_the_gradient_is_differentiable(name, transform):
    case = CASES[name]()
    hypergradient = gradient_of(case)
    expected = jax.hessian(case.value)(case.theta)

    def gradient(theta):
        return hypergradient(theta, case.init, case.data).gradient

    # Two solves in sequence multiply the error by the condition number twice.
    assert_trees_close(jax.jit(transform(gradient))(case.theta), expected, case.tolerance * case.kappa)


@pytest.mark.slow("differentiates a layer in each mode, and twice")
@pytest.mark.parametrize("name", ["affine root", "imaml"])
def test_the_layer_composes_with_transformations(name):
    case = CASES[name]()
    layer = bl.implicit_layer(case.condition, newton, bl.CG(20) if case.condition.symmetric else bl.LU())

    def value(theta, data):
        return case.outer(layer(theta, case.init, data), theta, data)

    assert_trees_close(jax.grad(value)(case.theta, case.data), case.gradient, case.tolerance)
    expected = jax.hessian(case.value)(case.theta)
    assert_trees_close(jax.hessian(value)(case.theta, case.data), expected, case.tolerance * case.kappa)
    tangent = jax.tree.map(jnp.ones_like, case.theta)
    expected = jax.jvp(case.value, (case.theta,), (tangent,))[1]
    actual = jax.jvp(lambda t: value(t, case.data), (case.theta,), (tangent,))[1]
    assert_trees_close(actual, expected, case.tolerance)
    expected = jax.grad(case.value, argnums=1)(case.theta, case.data)
    assert_trees_close(jax.grad(value, argnums=1)(case.theta, case.data), expected, case.tolerance)
    with pytest.warns(UserWarning, match="derivative in init is zero"):
        init = jax.grad(lambda init: jnp.sum(jax.tree.leaves(layer(case.theta, init, case.data))[0]))(case.init)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(init))


@pytest.mark.slow("compiles each transformation of a hypergradient")
@pytest.mark.parametrize("name", ["affine root", "imaml"])
def test_jit_and_vmap_give_the_same_numbers(name):
    case = CASES[name]()
    hypergradient = gradient_of(case)
    thetas = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1]), case.theta)
    batched = jax.jit(jax.vmap(lambda theta: hypergradient(theta, case.init, case.data)))(thetas)
    assert batched.status.shape == (2,)
    for i in range(2):
        single = hypergradient(jax.tree.map(lambda leaf, i=i: leaf[i], thetas), case.init, case.data)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched.gradient), single.gradient, case.tolerance)


@pytest.mark.slow("compiles for two devices with each linear solver", fast="unrolled")
@pytest.mark.parametrize(
    ("solver", "method"),
    [
        (bl.GradientDescent(0.3, 20), bl.Unrolled()),
        (bl.GradientDescent(0.3, 200, tol=1e-9), bl.Implicit(bl.CG(3, tol=1e-9))),
        (bl.HessianFree(6), bl.Implicit(bl.LU())),
    ],
    ids=["unrolled", "cg", "lu"],
)
def test_under_shard_map_each_task_has_its_own_gradient(solver, method):
    # JAX sums the derivative in a replicated variable over the devices. Here the start, and then also θ, is replicated.
    def objective(w, theta, data):
        return 0.5 * jnp.sum((w - theta) ** 2) + 0.05 * data * jnp.sum(w**4)

    problem = bl.Problem(bl.Stationary(objective), lambda w, theta, data: jnp.sum(w**2))
    function = bl.value_and_hypergradient(problem, solver, method)
    mesh, each, every = two_devices()
    thetas, strengths, start = jnp.array([[1.0, 2.0], [2.0, 3.0]]), jnp.array([1.0, 2.0]), jnp.zeros(2)

    def own(thetas, strengths):
        return function(thetas[0], start, strengths[0]).gradient[None]

    def shared(theta, strengths):
        return function(theta, start, strengths[0]).gradient[None]

    out = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(each, each), out_specs=each))(thetas, strengths)
    expected = [function(theta, start, strength).gradient for theta, strength in zip(thetas, strengths, strict=True)]
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    out = jax.jit(jax.shard_map(shared, mesh=mesh, in_specs=(every, each), out_specs=each))(thetas[0], strengths)
    expected = [function(thetas[0], start, strength).gradient for strength in strengths]
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_the_layer_under_shard_map_sums_the_derivative_of_a_shared_theta():
    condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta * data) ** 2))
    layer = bl.implicit_layer(condition, bl.GradientDescent(1.0, 1), bl.CG(2))
    mesh, each, every = two_devices()

    def total(theta, data):  # Σ_tasks ‖θ·data‖²
        losses = jax.shard_map(
            lambda theta, data: jnp.sum(layer(theta, jnp.zeros(2), data[0]) ** 2)[None],
            mesh=mesh,
            in_specs=(every, each),
            out_specs=each,
        )
        return jnp.sum(losses(theta, data))

    slope = jax.jit(jax.grad(total))(jnp.array([1.0, -2.0]), jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(slope, 2 * np.array([1.0, -2.0]) * (1 + 9), rtol=1e-13)


def test_one_trace_per_shape():
    traces = []

    def objective(w, theta, data):
        traces.append(None)
        return 0.5 * jnp.sum((w - theta * data) ** 2)

    problem = bl.Problem(bl.Stationary(objective), lambda w, theta, data: jnp.sum(w**2))
    hypergradient = bl.value_and_hypergradient(problem, bl.GradientDescent(0.5, 3), bl.Implicit(bl.CG(2)))
    hypergradient(1.0, jnp.zeros(3), jnp.ones(3))
    first = len(traces)
    for k in range(100):
        hypergradient(1.0 + k, jnp.ones(3) * k, jnp.ones(3) + k)
    assert len(traces) == first
    hypergradient(1.0, jnp.zeros(4), jnp.ones(4))
    assert len(traces) == 2 * first


@pytest.mark.slow("compiles once for each scale", fast="1e-20")
@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1e5, 1e20])
def test_the_gradient_scales_with_the_outer_function(scale):
    case = affine_root()
    scaled = bl.Problem(case.condition, lambda w, theta, data: scale * case.outer(w, theta, data))
    out = bl.value_and_hypergradient(scaled, newton, bl.Implicit(bl.LU()))(case.theta, case.init, case.data)
    assert_trees_close(jax.tree.map(lambda g: g / scale, out.gradient), case.gradient, case.tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtypes_are_kept(dtype):
    condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta * data) ** 2))
    problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w**2))
    hypergradient = bl.value_and_hypergradient(problem, bl.GradientDescent(1.0, 2), bl.Implicit(bl.CG(2)))
    out = hypergradient(jnp.asarray(2.0, dtype), jnp.zeros(2, dtype), jnp.ones(2, dtype))
    assert {leaf.dtype for leaf in (out.value, out.gradient, out.inner.w, out.linear.solution)} == {jnp.dtype(dtype)}
    assert float(out.gradient) == pytest.approx(8.0, rel=10 * float(jnp.finfo(dtype).eps))


@pytest.mark.slow("compiles a hypergradient with captured arrays")
def test_theta_captured_by_a_closure_is_differentiated():
    def value(theta, transform):
        condition = bl.Stationary(lambda w, unused, data: 0.5 * (w - theta**3) ** 2)
        layer = bl.implicit_layer(condition, bl.GradientDescent(1.0, 2), bl.CG(2))
        return transform(lambda: layer(0.0, jnp.zeros(()), None) ** 2)()

    for transform in (lambda f: f, jax.jit):
        np.testing.assert_allclose(jax.grad(value)(jnp.array(1.5), transform), 6 * 1.5**5, rtol=1e-14)
        scanned = jax.lax.scan(lambda c, t: (c, jax.grad(value)(t, transform)), None, jnp.array([1.0, 1.5]))[1]  # noqa: B023
        np.testing.assert_allclose(scanned, 6 * np.array([1.0, 1.5]) ** 5, rtol=1e-14)
    mapped = jax.vmap(lambda t: jax.grad(value)(t, jax.jit))(jnp.array([1.0, 1.5]))
    np.testing.assert_allclose(mapped, 6 * np.array([1.0, 1.5]) ** 5, rtol=1e-14)


def test_aux_is_returned():
    problem = bl.Problem(
        ridge().condition, lambda w, theta, data: (jnp.sum(w), {"w": w, "label": jnp.int32(3)}), has_aux=True
    )
    case = ridge()
    for method in (bl.Implicit(bl.CG(5)), bl.Unrolled()):
        out = bl.value_and_hypergradient(problem, bl.GradientDescent(0.1, 5), method)(case.theta, case.init, case.data)
        np.testing.assert_array_equal(out.aux["w"], out.inner.w)
        assert int(out.aux["label"]) == 3


@pytest.mark.slow("compiles a solve with and without a start")
def test_linear_init_is_the_start_of_the_adjoint_solve():
    case = ridge()
    problem, arguments = case.problem, (case.theta, case.init, case.data)
    exact = bl.value_and_hypergradient(problem, newton, bl.Implicit(bl.LU()))(*arguments).linear.solution
    short = bl.value_and_hypergradient(problem, newton, bl.Implicit(bl.CG(1, tol=1e-10)), on_failure="ignore")
    assert int(short(*arguments).linear.status) == bl.Status.MAX_STEPS
    assert int(short(*arguments, linear_init=exact).linear.status) == bl.Status.CONVERGED


@pytest.mark.slow("compiles a failing gradient for each policy")
def test_on_failure_raises_warns_or_ignores():
    case = ridge()
    arguments = (case.theta, case.init, case.data)
    solver, method = bl.GradientDescent(0.1, 2, tol=1e-12), bl.Implicit(bl.CG(5))
    with pytest.raises(
        bl.HypergradientError, match=r"inner solve, MAX_STEPS: the true residual does not meet tol, or .*: allow more"
    ) as caught:
        bl.value_and_hypergradient(case.problem, solver, method)(*arguments)
    assert int(caught.value.result.status) == bl.Status.MAX_STEPS
    with pytest.warns(RuntimeWarning, match="inner solve, MAX_STEPS"):
        bl.value_and_hypergradient(case.problem, solver, method, on_failure="warn")(*arguments)
    ignored = bl.value_and_hypergradient(case.problem, solver, method, on_failure="ignore")
    assert int(ignored(*arguments).status) == bl.Status.MAX_STEPS
    traced = jax.jit(bl.value_and_hypergradient(case.problem, solver, method))
    assert int(traced(*arguments).status) == bl.Status.MAX_STEPS
    with pytest.raises(ValueError, match=r"got 'explode'"):
        bl.value_and_hypergradient(case.problem, solver, method, on_failure="explode")  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["data", "outer"])
def test_nan_is_reported_by_the_stage_that_made_it(stage):
    case = quadratic()
    bad = bl.Problem(case.condition, lambda w, theta, data: jnp.nan * jnp.sum(w)) if stage == "outer" else case.problem
    hypergradient = bl.value_and_hypergradient(bad, newton, bl.Implicit(bl.LU()), on_failure="ignore")
    out = hypergradient(case.theta, case.init, case.data * (jnp.nan if stage == "data" else 1.0))
    assert int(out.status) == bl.Status.NONFINITE
    assert int(out.inner.status) == (bl.Status.NONFINITE if stage == "data" else bl.Status.BUDGET_USED)


@pytest.mark.slow("compiles a hypergradient of an indefinite problem")
def test_an_indefinite_inner_problem_is_negative_curvature():
    saddle = bl.Stationary(lambda w, theta, data: 0.5 * w[0] ** 2 - 2 * w[1] ** 2 + theta * jnp.sum(w))
    problem = bl.Problem(saddle, lambda w, theta, data: w[0] + 3 * w[1])
    with pytest.raises(bl.HypergradientError, match=r"linear solve, NEGATIVE_CURVATURE.*increase the regularisation"):
        bl.value_and_hypergradient(problem, newton, bl.Implicit(bl.CG(4)))(1.0, jnp.zeros(2), None)


def test_cg_on_a_condition_that_is_not_symmetric_is_refused_with_alternatives():
    case = affine_root()
    with pytest.raises(ValueError, match=r"CG needs a symmetric operator, and Root is not declared symmetric: .*LU"):
        gradient_of(case, bl.CG(5))(case.theta, case.init, case.data)
    with pytest.raises(ValueError, match=r"use .*LU"):
        bl.implicit_layer(case.condition, newton, bl.CG(5))


def test_a_theta_that_enters_only_by_the_start_has_a_zero_hypergradient():
    condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - 2.0) ** 2)
    problem = bl.Problem(condition, lambda w, theta, data: w)
    hypergradient = bl.value_and_hypergradient(problem, bl.GradientDescent(0.5, 3), bl.Implicit(bl.CG(1)))
    assert float(hypergradient(1.0, lambda theta, data: theta, None).gradient) == 0.0


RATE, STEPS = 0.1, 6


@pytest.mark.parametrize("last", [None, 1, 2, STEPS])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_truncated_unrolling_agrees_with_its_closed_form(last, checkpoint):
    theta, contraction = jnp.array([0.5, -2.0]), 1 - RATE * EIGENVALUES
    method = bl.Unrolled(last=last, checkpoint=checkpoint)
    hypergradient = bl.value_and_hypergradient(descent_problem(), bl.GradientDescent(RATE, STEPS), method)
    out = hypergradient(theta, jnp.zeros(2), None)
    w = (1 - contraction**STEPS) / EIGENVALUES * theta
    jacobian = (1 - contraction ** (last or STEPS)) / EIGENVALUES
    np.testing.assert_allclose(out.inner.w, w, rtol=1e-13)
    np.testing.assert_allclose(out.gradient, jacobian * w, rtol=1e-13)
    assert out.linear is None and int(out.inner.status) == bl.Status.BUDGET_USED


def test_unrolled_differentiates_a_start_that_depends_on_theta():
    theta, contraction = jnp.array([0.5, -2.0]), 1 - RATE * EIGENVALUES
    hypergradient = bl.value_and_hypergradient(descent_problem(), bl.GradientDescent(RATE, STEPS), bl.Unrolled())
    out = hypergradient(theta, bl.identity_center, None)
    jacobian = (1 - contraction**STEPS) / EIGENVALUES + contraction**STEPS
    np.testing.assert_allclose(out.gradient, jacobian**2 * theta, rtol=1e-13)


@pytest.mark.parametrize("last", [0, STEPS + 1])
def test_unrolled_refuses_to_differentiate_zero_steps_or_more_than_the_solver_takes(last):
    with pytest.raises(ValueError, match=rf"last={last}.* between 1 and the solver's {STEPS}"):
        bl.value_and_hypergradient(descent_problem(), bl.GradientDescent(RATE, STEPS), bl.Unrolled(last=last))(
            jnp.ones(2), jnp.zeros(2), None
        )


@pytest.mark.parametrize("solver", [newton, bl.GradientDescent(RATE, STEPS, tol=1e-3)], ids=["function", "tol"])
def test_unrolled_refuses_a_loop_of_unknown_length(solver):
    with pytest.raises(ValueError, match=r"use .* with tol=None, or Implicit"):
        bl.value_and_hypergradient(descent_problem(), solver, bl.Unrolled())(jnp.ones(2), jnp.zeros(2), None)


@pytest.mark.slow("compiles second derivatives")
@pytest.mark.parametrize("second", [lambda f: jax.grad(jax.grad(f)), lambda f: jax.jacfwd(jax.grad(f))])
def test_the_second_derivative_of_one_leaf_of_w_among_several_has_a_closed_form(second):
    matrix = jnp.array([[3.0, 1.0], [-1.0, 2.0]])

    def residual(w, theta, data):
        rest = matrix @ jnp.stack(w) - jnp.stack([theta**2, theta])
        return rest[0], rest[1]

    def exact(condition, init, theta, data):
        w = jnp.linalg.solve(matrix, jnp.stack([theta**2, theta]))
        return w[0], w[1]

    layer = bl.implicit_layer(bl.Root(residual), exact, bl.LU())
    # w₀ = (2θ² − θ)/7, and (w₀²)″ = (48θ² − 24θ + 2)/49.
    actual = second(lambda theta: layer(theta, (0.0, 0.0), None)[0] ** 2)(1.3)
    assert float(actual) == pytest.approx((48 * 1.3**2 - 24 * 1.3 + 2) / 49, rel=1e-12)
