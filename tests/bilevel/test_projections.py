"""The projections that have no formula, with θ in the set or in what is projected.

Those with a formula stand in test_conditions.py. On matrices the reference is jaxopt's own function with its LBFGS
driven to 1e-13, which shares no code with ours, by central differences of the converged value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel._jaxopt import library

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
SIMILARITY, WEIGHTS = RNG.normal(size=(3, 3)), RNG.normal(size=(3, 3))
CURVATURE = np.linspace(1.0, 1.3, 9).reshape(3, 3)
MARGINALS = {"a": np.log([0.3, 0.2, 0.5]), "b": np.log([0.4, 0.35, 0.25])}


def nearest(w, theta, data):
    return 0.5 * jnp.sum(CURVATURE * (w - SIMILARITY) ** 2)


def nearest_scaled(w, theta, data):
    return 0.5 * jnp.sum(CURVATURE * (w - theta * SIMILARITY) ** 2)


def outer(w, theta, data):
    return jnp.sum(WEIGHTS * w + 0.3 * w**2)


def marginals(theta, data):
    return jax.nn.softmax(theta["a"]), jax.nn.softmax(theta["b"])


def to_rounding(fun):
    return library.jaxopt.LBFGS(fun, tol=1e-13, maxiter=500, linesearch="backtracking")


TRANSPORT = (nearest, marginals, MARGINALS)
BIRKHOFF = (nearest_scaled, None, np.array(1.3))
ON_MATRICES = {
    "projection_transport": TRANSPORT,
    "kl_projection_transport": TRANSPORT,
    "projection_birkhoff": BIRKHOFF,
    "kl_projection_birkhoff": BIRKHOFF,
}


def on_matrices(name, projection):
    """θ, the hypergradient and the value; the step contracts by a half, so that 45 of them reach rounding."""
    objective, params, theta = ON_MATRICES[name]
    condition = bl.Projected(objective, bl.jaxopt_projection(projection, params), step_size=0.5)
    problem, solver, init = bl.Problem(condition, outer), bl.FixedPointIteration(45), jnp.full((3, 3), 1 / 9)
    function = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()), on_failure="ignore")
    value = jax.jit(lambda theta: outer(solver(condition, init, theta, None).w, theta, None))
    return jax.tree.map(jnp.asarray, theta), lambda theta: function(theta, init, None), value


def differences(value, theta, step=1e-5):
    """Central differences: step²/6 from the third derivative, 1e-13/step from the solve."""
    flat, unravel = ravel_pytree(theta)
    moved = [[value(unravel(flat + sign * row)) for sign in (1, -1)] for row in step * np.eye(flat.size)]
    return unravel(jnp.asarray([(up - down) / (2 * step) for up, down in moved]))


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def to_the_end(name, **options):
    return functools.partial(getattr(library.projection, name), make_solver=to_rounding, **options)


@pytest.mark.parametrize("name", ON_MATRICES)
def test_projections_onto_matrices_of_given_sums(name):
    theta, hypergradient, _ = on_matrices(name, name)
    _, _, value = on_matrices(name, to_the_end(name, use_semi_dual=False))
    out = hypergradient(theta)
    np.testing.assert_allclose(out.inner.w.sum(), 1.0 if isinstance(theta, dict) else 3.0, rtol=1e-13)
    np.testing.assert_allclose(out.value, value(theta), rtol=1e-11)  # what LBFGS leaves of the sums, magnified
    # What it leaves, 1e-13, the differences divide by their step: 1e-8, ten times over.
    assert_close(out.gradient, differences(value, theta), rtol=1e-6, atol=1e-7)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(out.gradient)) > 1e-2


KNOWN_FAILURES = {
    "projection_transport": (AssertionError, "the semi-dual stops the gradient of its simplex projection: zero"),
    "projection_birkhoff": (AssertionError, "the semi-dual stops the gradient of its simplex projection: zero"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(raises=error, strict=True, reason=reason))
        for name, (error, reason) in KNOWN_FAILURES.items()
    ],
)
def test_projections_with_the_options_that_jaxopt_gives_them(name):
    # A function is taken as it is; by name ours stands in for it.
    theta, hypergradient, value = on_matrices(name, to_the_end(name))
    assert_close(hypergradient(theta).gradient, differences(value, theta), rtol=1e-6, atol=1e-7)


HALF = np.random.default_rng(0).normal(size=(4, 4))
MATRIX = HALF @ HALF.T / 4 + np.eye(4)  # eigenvalues between 1 and 6
TARGET, SLOPE = np.array([0.9, -0.3, 0.4, 1.4]), np.array([1.0, -2.0, 0.5, 3.0])


STEPS = 130  # each contracts by 0.8: 0.8¹³⁰ = 3e-13


def problem_on_vectors(projection):
    condition = bl.Projected(lambda w, theta, data: 0.5 * (w - TARGET) @ MATRIX @ (w - TARGET), projection, 0.2)
    return bl.Problem(condition, slope_and_square)


def slope_and_square(w, theta, data):
    return jnp.sum(SLOPE * w + 0.3 * w**2)


def on_vectors(projection, theta, steps=STEPS, on_failure="raise"):
    method = bl.Implicit(bl.LU())
    problem = problem_on_vectors(projection)
    function = bl.value_and_hypergradient(problem, bl.FixedPointIteration(steps), method, on_failure)
    return function(theta, jnp.zeros(4, jnp.asarray(theta).dtype), None)


def polyhedron(theta, data):
    """1ᵀw = θ₀, w₃ ≤ θ₁ (active), w₀ ≤ 5 (not)."""
    return jnp.ones((1, 4)), theta[:1], jnp.eye(4)[jnp.array([3, 0])], jnp.append(theta[1:], 5.0)


def by_its_active_set(theta):
    rows = jnp.stack([jnp.ones(4), jnp.eye(4)[3]])
    system = jnp.block([[jnp.asarray(MATRIX), rows.T], [rows, jnp.zeros((2, 2))]])
    return jnp.linalg.solve(system, jnp.concatenate([MATRIX @ TARGET, theta]))[:4]


def value_by_its_active_set(theta):
    return slope_and_square(by_its_active_set(theta), theta, None)


POLYHEDRON = np.array([1.0, 0.3])


def test_the_polyhedron_by_its_active_set_to_second_order():
    projection = bl.jaxopt_projection("projection_polyhedron", polyhedron)
    out = on_vectors(projection, POLYHEDRON)
    # What the steps leave, 3e-13, times κ < 6 and the slopes.
    np.testing.assert_allclose(out.inner.w, by_its_active_set(POLYHEDRON), atol=1e-11)
    np.testing.assert_allclose(out.gradient, jax.grad(value_by_its_active_set)(POLYHEDRON), atol=1e-10)
    layer = bl.implicit_layer(problem_on_vectors(projection).condition, bl.FixedPointIteration(STEPS), bl.LU())
    hessian = jax.jit(jax.hessian(lambda theta: slope_and_square(layer(theta, jnp.zeros(4), None), theta, None)))
    np.testing.assert_allclose(hessian(POLYHEDRON), jax.hessian(value_by_its_active_set)(POLYHEDRON), atol=1e-10)


def test_a_polyhedron_of_rows_that_depend_on_each_other():
    # Each row twice, the active inequality too: the point is the same, though its multipliers are not unique.
    def twice(theta, data):
        return tuple(jnp.concatenate([part, part]) for part in polyhedron(theta, data))

    out = on_vectors(bl.jaxopt_projection("projection_polyhedron", twice), POLYHEDRON)
    np.testing.assert_allclose(out.gradient, jax.grad(value_by_its_active_set)(POLYHEDRON), atol=1e-10)


def test_the_tolerance_is_the_callers():
    # The bound is missed by 1e-4: at a tolerance of 1e-1 OSQP takes it for active, and the face is the wrong one.
    point = jnp.array([0.2, 0.5])
    params = lambda theta, data: (jnp.ones((1, 2)), jnp.ones(1), jnp.eye(2)[:1], jnp.array([0.3501]))  # noqa: E731
    fine = bl.jaxopt_projection("projection_polyhedron", params)(point, None, None)
    np.testing.assert_allclose(fine, [0.35, 0.65], rtol=1e-14)
    finer = bl.jaxopt_projection("projection_polyhedron", params, tol=1e-12)(point, None, None)
    np.testing.assert_allclose(finer, fine, rtol=1e-14)
    with pytest.raises(ValueError, match=r"projection_simplex iterates to no tolerance, got tol=0.1"):
        bl.jaxopt_projection("projection_simplex", tol=0.1)


IMPOSSIBLE = {
    "projection_polyhedron": lambda theta, data: (jnp.ones((1, 4)), jnp.ones(1), jnp.eye(4), theta * jnp.ones(4)),
    "projection_affine_set": lambda theta, data: (jnp.ones((2, 4)), jnp.stack([theta, theta + 1])),
    "projection_box_section": lambda theta, data: (jnp.zeros(4), jnp.ones(4), jnp.ones(4), 9 - theta),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_set_without_points_is_told(name):
    out = on_vectors(bl.jaxopt_projection(name, IMPOSSIBLE[name]), -1.0, steps=2, on_failure="ignore")
    assert int(out.inner.status) == bl.Status.NONFINITE


@pytest.mark.parametrize("name", ["projection_polyhedron", "projection_affine_set"])
def test_float32_is_kept(name):
    params = {"projection_polyhedron": polyhedron, "projection_affine_set": lambda t, d: polyhedron(t, d)[:2]}[name]

    def narrow(theta, data):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params(theta, data))

    theta = jnp.asarray(POLYHEDRON, jnp.float32)
    wide, point = bl.jaxopt_projection(name, params), jnp.asarray(TARGET, jnp.float32)
    out = bl.jaxopt_projection(name, narrow)(point, theta, None)
    assert out.dtype == jnp.float32
    # 100·eps, as the system on the face is as good as orthogonal.
    np.testing.assert_allclose(out, wide(TARGET, jnp.asarray(POLYHEDRON), None), atol=1.2e-5)


def backwards_only(w, theta, data):
    """jaxopt's own function, bare: it holds a custom_vjp. ``data`` has integers, which have no tangent."""
    rows = jnp.eye(4)[data]
    params = (jnp.ones((1, 4)), theta[:1], rows, jnp.append(theta[1:], 5.0))
    return library.projection.projection_polyhedron(w, params, check_feasible=False)


def test_a_function_that_jax_differentiates_backwards_only_is_differentiated_forwards_too():
    condition, data = problem_on_vectors(backwards_only).condition, jnp.array([3, 0])
    layer = bl.implicit_layer(condition, bl.FixedPointIteration(30), bl.LU())

    def value(theta):
        return slope_and_square(layer(theta, jnp.zeros(4), data), theta, None)

    forward, backward = jax.jit(lambda theta: (jax.jacfwd(value)(theta), jax.grad(value)(theta)))(POLYHEDRON)
    np.testing.assert_allclose(forward, backward, rtol=1e-8)  # the row's systems are solved to 1e-10 or so
    # OSQP stops at 1e-3 here.
    np.testing.assert_allclose(backward, jax.grad(value_by_its_active_set)(POLYHEDRON), atol=1e-2)


def test_such_a_function_may_capture_theta():
    # The projection onto 1ᵀy = c, c caught by the closure: ȳ + (c − 1ᵀȳ)/4, whose derivative in c is 1/4.
    def point(c, w):
        def captured(w, theta, data):
            return library.projection.projection_affine_set(w, (jnp.ones((1, 4)), c[None]))

        condition = bl.Projected(lambda w, theta, data: 0.5 * jnp.sum((w - TARGET) ** 2), captured)
        return condition.mapping(w, None, None)

    for derivative in (jax.jacfwd(point), jax.jacrev(point)):
        np.testing.assert_allclose(jax.jit(derivative)(jnp.array(1.2), jnp.zeros(4)), np.full(4, 0.25), rtol=1e-4)


@pytest.mark.xfail(raises=jax.errors.TracerBoolConversionError, strict=True, reason="its check reads a traced number")
def test_the_polyhedron_with_its_check():
    on_vectors(bl.jaxopt_projection(library.projection.projection_polyhedron, polyhedron), POLYHEDRON, steps=1)


def test_the_sparse_simplex_by_its_support():
    def two_at_most(w, value):
        return library.projection.projection_sparse_simplex(w, 2, value=value)

    out = on_vectors(bl.jaxopt_projection(two_at_most, lambda theta, data: theta), jnp.array(1.3), steps=400)
    support = np.flatnonzero(out.inner.w)
    assert support.size == 2
    # On the support the sum is held: dw/dc = H_FF⁻¹1 / 1ᵀH_FF⁻¹1.
    along = np.linalg.solve(MATRIX[np.ix_(support, support)], np.ones(2))
    expected = (SLOPE + 0.6 * out.inner.w)[support] @ along / along.sum()
    np.testing.assert_allclose(out.gradient, expected, rtol=1e-12)
