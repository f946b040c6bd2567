"""Projections without a closed form are differentiated in θ, on which the set or the projected point depends.

The projections with a closed form are tested in test_conditions.py. For projections onto matrices, the reference is a
central difference of jaxopt's own projection, which shares no code with ours. Its LBFGS runs to errors of 1e-13.
"""

import functools

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import pytest
from problems import MATRIX, TARGET, WEIGHTS, central_differences, distance_to_target, minimum_on_plane, weighted_outer

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
SIMILARITY, MATRIX_WEIGHTS = RNG.normal(size=(3, 3)), RNG.normal(size=(3, 3))
CURVATURE = np.linspace(1.0, 1.3, 9).reshape(3, 3)
MARGINALS = {"a": np.log([0.3, 0.2, 0.5]), "b": np.log([0.4, 0.35, 0.25])}


def nearest(w, theta, data):
    return 0.5 * jnp.sum(CURVATURE * (w - SIMILARITY) ** 2)


def nearest_scaled(w, theta, data):
    return 0.5 * jnp.sum(CURVATURE * (w - theta * SIMILARITY) ** 2)


def outer(w, theta, data):
    return jnp.sum(MATRIX_WEIGHTS * w + 0.3 * w**2)


def marginals(theta, data):
    return jax.nn.softmax(theta["a"]), jax.nn.softmax(theta["b"])


def lbfgs_to_rounding(fun):
    return jaxopt.LBFGS(fun, tol=1e-13, maxiter=500, linesearch="backtracking")


TRANSPORT = (nearest, marginals, MARGINALS)
BIRKHOFF = (nearest_scaled, None, np.array(1.3))
ON_MATRICES = {
    "projection_transport": TRANSPORT,
    "kl_projection_transport": TRANSPORT,
    "projection_birkhoff": BIRKHOFF,
    "kl_projection_birkhoff": BIRKHOFF,
}


def on_matrices(name, projection):
    """Return θ, and the hypergradient and the outer value as functions of θ. 45 steps reach rounding."""
    objective, params, theta = ON_MATRICES[name]
    condition = bl.Projected(objective, bl.jaxopt_projection(projection, params), step_size=0.5)
    problem, solver, init = bl.Problem(condition, outer), bl.FixedPointIteration(45), jnp.full((3, 3), 1 / 9)
    function = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()), on_failure="ignore")
    value = jax.jit(lambda theta: outer(solver(condition, init, theta, None).w, theta, None))
    return jax.tree.map(jnp.asarray, theta), lambda theta: function(theta, init, None), value


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def without_our_projection(name, **options):
    return functools.partial(getattr(jaxopt.projection, name), make_solver=lbfgs_to_rounding, **options)


@pytest.mark.slow("compiles a projection of ours and one of jaxopt")
@pytest.mark.parametrize("name", ON_MATRICES)
def test_projections_onto_matrices_with_given_row_and_column_sums(name):
    theta, hypergradient, _ = on_matrices(name, name)
    _, _, value = on_matrices(name, without_our_projection(name, use_semi_dual=False))
    out = hypergradient(theta)
    np.testing.assert_allclose(out.inner.w.sum(), 1.0 if isinstance(theta, dict) else 3.0, rtol=1e-13)
    np.testing.assert_allclose(out.value, value(theta), rtol=1e-11)  # LBFGS stops at errors of 1e-13 in the sums
    # Central differences divide the error of 1e-13 by their step of 1e-5. This gives 1e-8, a tenth of the bound.
    assert_close(out.gradient, central_differences(value, theta), rtol=1e-6, atol=1e-7)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(out.gradient)) > 1e-2


KNOWN_FAILURES = {
    "projection_transport": (AssertionError, "the semi-dual stops the gradient at its simplex projection"),
    "projection_birkhoff": (AssertionError, "the semi-dual stops the gradient at its simplex projection"),
}


@pytest.mark.slow("compiles a projection by transport with jaxopt's options")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(raises=error, strict=True, reason=reason))
        for name, (error, reason) in KNOWN_FAILURES.items()
    ],
)
def test_projections_of_jaxopt_with_its_default_options_are_differentiated(name):
    # `jaxopt_projection` uses a given function unchanged. For a name, it would take a projection of this library.
    theta, hypergradient, value = on_matrices(name, without_our_projection(name))
    assert_close(hypergradient(theta).gradient, central_differences(value, theta), rtol=1e-6, atol=1e-7)


STEPS = 130  # each step contracts by 0.8, and 0.8¹³⁰ = 3e-13


def problem_on_vectors(projection):
    condition = bl.Projected(lambda w, theta, data: distance_to_target(w, theta, TARGET), projection, 0.2)
    return bl.Problem(condition, weighted_outer)


def on_vectors(projection, theta, steps=STEPS, on_failure="raise"):
    method = bl.Implicit(bl.LU())
    problem = problem_on_vectors(projection)
    function = bl.value_and_hypergradient(problem, bl.FixedPointIteration(steps), method, on_failure)
    return function(theta, jnp.zeros(4, jnp.asarray(theta).dtype), None)


def polyhedron(theta, data):
    """Return the parameters of the set 1ᵀw = θ₀, w₃ ≤ θ₁ (active), w₀ ≤ 5 (inactive)."""
    return jnp.ones((1, 4)), theta[:1], jnp.eye(4)[jnp.array([3, 0])], jnp.append(theta[1:], 5.0)


def by_its_active_set(theta):
    return minimum_on_plane(MATRIX, MATRIX @ TARGET, jnp.stack([jnp.ones(4), jnp.eye(4)[3]]), theta)[0]


def value_by_its_active_set(theta):
    return weighted_outer(by_its_active_set(theta), theta, None)


POLYHEDRON = np.array([1.0, 0.3])


@pytest.mark.slow("compiles second derivatives of a quadratic program")
def test_the_polyhedron_has_the_first_and_second_derivatives_of_its_active_set():
    projection = bl.jaxopt_projection("projection_polyhedron", polyhedron)
    out = on_vectors(projection, POLYHEDRON)
    # The inner solver leaves an error of 3e-13. κ < 6 and the weights magnify this error.
    np.testing.assert_allclose(out.inner.w, by_its_active_set(POLYHEDRON), atol=1e-11)
    np.testing.assert_allclose(out.gradient, jax.grad(value_by_its_active_set)(POLYHEDRON), atol=1e-10)
    layer = bl.implicit_layer(problem_on_vectors(projection).condition, bl.FixedPointIteration(STEPS), bl.LU())
    hessian = jax.jit(jax.hessian(lambda theta: weighted_outer(layer(theta, jnp.zeros(4), None), theta, None)))
    np.testing.assert_allclose(hessian(POLYHEDRON), jax.hessian(value_by_its_active_set)(POLYHEDRON), atol=1e-10)


@pytest.mark.slow("compiles the active-set method")
def test_a_polyhedron_may_have_linearly_dependent_rows():
    # Every row comes twice, also that of the active inequality. The multipliers are then not unique, but the point is.
    def twice(theta, data):
        return tuple(jnp.concatenate([part, part]) for part in polyhedron(theta, data))

    out = on_vectors(bl.jaxopt_projection("projection_polyhedron", twice), POLYHEDRON)
    np.testing.assert_allclose(out.gradient, jax.grad(value_by_its_active_set)(POLYHEDRON), atol=1e-10)


@pytest.mark.slow("compiles a quadratic program with several tolerances")
def test_a_tolerance_below_the_distance_of_a_bound_leaves_the_bound_inactive():
    # The solution is 1e-4 away from the bound 0.3501. With a tolerance of 1e-1 the bound would count as active.
    point = jnp.array([0.2, 0.5])
    params = lambda theta, data: (jnp.ones((1, 2)), jnp.ones(1), jnp.eye(2)[:1], jnp.array([0.3501]))  # noqa: E731
    fine = bl.jaxopt_projection("projection_polyhedron", params)(point, None, None)
    np.testing.assert_allclose(fine, [0.35, 0.65], rtol=1e-14)
    finer = bl.jaxopt_projection("projection_polyhedron", params, tol=1e-12)(point, None, None)
    np.testing.assert_allclose(finer, fine, rtol=1e-14)
    with pytest.raises(ValueError, match=r"projection_simplex takes no tolerance, got tol=0.1"):
        bl.jaxopt_projection("projection_simplex", tol=0.1)


IMPOSSIBLE = {
    "projection_polyhedron": lambda theta, data: (jnp.ones((1, 4)), jnp.ones(1), jnp.eye(4), theta * jnp.ones(4)),
    "projection_affine_set": lambda theta, data: (jnp.ones((2, 4)), jnp.stack([theta, theta + 1])),
    "projection_box_section": lambda theta, data: (jnp.zeros(4), jnp.ones(4), jnp.ones(4), 9 - theta),
}


@pytest.mark.slow("compiles each projection", fast="projection_box_section")
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_empty_set_is_nonfinite(name):
    out = on_vectors(bl.jaxopt_projection(name, IMPOSSIBLE[name]), -1.0, steps=2, on_failure="ignore")
    assert int(out.inner.status) == bl.Status.NONFINITE


@pytest.mark.slow("compiles a quadratic program in float32", fast="projection_affine_set")
@pytest.mark.parametrize("name", ["projection_polyhedron", "projection_affine_set"])
def test_float32_is_kept(name):
    params = {"projection_polyhedron": polyhedron, "projection_affine_set": lambda t, d: polyhedron(t, d)[:2]}[name]

    def narrow(theta, data):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params(theta, data))

    theta = jnp.asarray(POLYHEDRON, jnp.float32)
    wide, point = bl.jaxopt_projection(name, params), jnp.asarray(TARGET, jnp.float32)
    out = bl.jaxopt_projection(name, narrow)(point, theta, None)
    assert out.dtype == jnp.float32
    # The tolerance is 100·eps, because the system of the active constraints is nearly orthogonal.
    np.testing.assert_allclose(out, wide(TARGET, jnp.asarray(POLYHEDRON), None), atol=1.2e-5)


def backwards_only(w, theta, data):
    """Project by jaxopt's own function, which has a custom_vjp. ``data`` are integers, which have no tangent."""
    rows = jnp.eye(4)[data]
    params = (jnp.ones((1, 4)), theta[:1], rows, jnp.append(theta[1:], 5.0))
    return jaxopt.projection.projection_polyhedron(w, params, check_feasible=False)


@pytest.mark.slow("compiles a projection in both modes")
def test_a_function_that_jax_differentiates_backwards_only_is_differentiated_forwards_too():
    condition, data = problem_on_vectors(backwards_only).condition, jnp.array([3, 0])
    layer = bl.implicit_layer(condition, bl.FixedPointIteration(30), bl.LU())

    def value(theta):
        return weighted_outer(layer(theta, jnp.zeros(4), data), theta, None)

    forward, backward = jax.jit(lambda theta: (jax.jacfwd(value)(theta), jax.grad(value)(theta)))(POLYHEDRON)
    np.testing.assert_allclose(forward, backward, rtol=1e-8)  # jaxopt solves each system to some 1e-10
    # The OSQP of jaxopt stops at residuals of 1e-3 here.
    np.testing.assert_allclose(backward, jax.grad(value_by_its_active_set)(POLYHEDRON), atol=1e-2)


@pytest.mark.slow("compiles a projection with a captured θ")
def test_a_function_with_a_custom_vjp_may_capture_theta():
    # The projection of a point x onto 1ᵀy = c is y = x + (c − 1ᵀx)/4, with the derivative 1/4 in the captured c.
    def point(c, w):
        def captured(w, theta, data):
            return jaxopt.projection.projection_affine_set(w, (jnp.ones((1, 4)), c[None]))

        condition = bl.Projected(lambda w, theta, data: 0.5 * jnp.sum((w - TARGET) ** 2), captured)
        return condition.mapping(w, None, None)

    for derivative in (jax.jacfwd(point), jax.jacrev(point)):
        np.testing.assert_allclose(jax.jit(derivative)(jnp.array(1.2), jnp.zeros(4)), np.full(4, 0.25), rtol=1e-4)


@pytest.mark.xfail(
    raises=jax.errors.TracerBoolConversionError, strict=True, reason="jaxopt's check branches on a tracer"
)
def test_the_polyhedron_of_jaxopt_can_be_traced_with_its_feasibility_check():
    on_vectors(bl.jaxopt_projection(jaxopt.projection.projection_polyhedron, polyhedron), POLYHEDRON, steps=1)


def test_the_sparse_simplex_has_a_closed_form_on_its_support():
    def two_at_most(w, value):
        return jaxopt.projection.projection_sparse_simplex(w, 2, value=value)

    out = on_vectors(bl.jaxopt_projection(two_at_most, lambda theta, data: theta), jnp.array(1.3), steps=400)
    support = np.flatnonzero(out.inner.w)
    assert support.size == 2
    # On the support F the entries sum to c, so dw_F/dc = H_FF⁻¹1 / 1ᵀH_FF⁻¹1 with H = MATRIX.
    along = np.linalg.solve(MATRIX[np.ix_(support, support)], np.ones(2))
    expected = (WEIGHTS + 0.6 * out.inner.w)[support] @ along / along.sum()
    np.testing.assert_allclose(out.gradient, expected, rtol=1e-12)
