"""Tests of the projections without a closed form, where θ defines the set or the point that is projected.

test_conditions.py has the projections with a closed form. For sets of matrices, the reference is jaxopt's function with
its LBFGS run to a tolerance of 1e-13, which shares no code with ours. Its derivatives are central differences of the
converged value.
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


def precise_lbfgs(fun):
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
    """Return θ, the hypergradient and the value as functions of θ.

    An inner step halves the error at least, so 45 steps reach rounding.
    """
    objective, params, theta = ON_MATRICES[name]
    condition = bl.Projected(objective, bl.jaxopt_projection(projection, params), step_size=0.5)
    problem, solver, init = bl.Problem(condition, outer), bl.FixedPointIteration(45), jnp.full((3, 3), 1 / 9)
    function = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()), on_failure="ignore")
    value = jax.jit(lambda theta: outer(solver(condition, init, theta, None).w, theta, None))
    return jax.tree.map(jnp.asarray, theta), lambda theta: function(theta, init, None), value


def differences(value, theta, step=1e-5):
    """Return central differences. Their error is step²/6 times the third derivative, plus 1e-13/step of the solve."""
    flat, unravel = ravel_pytree(theta)
    moved = [[value(unravel(flat + sign * row)) for sign in (1, -1)] for row in step * np.eye(flat.size)]
    return unravel(jnp.asarray([(up - down) / (2 * step) for up, down in moved]))


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def run_to_rounding(name, **options):
    return functools.partial(getattr(library.projection, name), make_solver=precise_lbfgs, **options)


@pytest.mark.parametrize("name", ON_MATRICES)
def test_projections_onto_matrices_with_given_sums_equal_the_converged_ones_of_jaxopt(name):
    theta, hypergradient, _ = on_matrices(name, name)
    _, _, value = on_matrices(name, run_to_rounding(name, use_semi_dual=False))
    out = hypergradient(theta)
    np.testing.assert_allclose(out.inner.w.sum(), 1.0 if isinstance(theta, dict) else 3.0, rtol=1e-13)
    np.testing.assert_allclose(out.value, value(theta), rtol=1e-11)  # the error of LBFGS in the sums, magnified
    # The differences divide the error of LBFGS, 1e-13, by their step, which gives 1e-8. The tolerance is 1e-7.
    assert_close(out.gradient, differences(value, theta), rtol=1e-6, atol=1e-7)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(out.gradient)) > 1e-2


KNOWN_FAILURES = {
    "projection_transport": (AssertionError, "the semi-dual form stops the gradient of its simplex projection"),
    "projection_birkhoff": (AssertionError, "the semi-dual form stops the gradient of its simplex projection"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(raises=error, strict=True, reason=reason))
        for name, (error, reason) in KNOWN_FAILURES.items()
    ],
)
def test_jaxopts_own_functions_with_their_default_options_are_differentiated_correctly(name):
    # jaxopt_projection uses a function as it is. Only a name selects our replacement.
    theta, hypergradient, value = on_matrices(name, run_to_rounding(name))
    assert_close(hypergradient(theta).gradient, differences(value, theta), rtol=1e-6, atol=1e-7)


HALF = np.random.default_rng(0).normal(size=(4, 4))
MATRIX = HALF @ HALF.T / 4 + np.eye(4)  # eigenvalues between 1 and 6
TARGET, SLOPE = np.array([0.9, -0.3, 0.4, 1.4]), np.array([1.0, -2.0, 0.5, 3.0])


STEPS = 130  # each multiplies the error by 0.8, and 0.8¹³⁰ = 3e-13


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
    """Return the polyhedron 1ᵀw = θ₀, w₃ ≤ θ₁ (active), w₀ ≤ 5 (inactive)."""
    return jnp.ones((1, 4)), theta[:1], jnp.eye(4)[jnp.array([3, 0])], jnp.append(theta[1:], 5.0)


def solved_by_active_set(theta):
    rows = jnp.stack([jnp.ones(4), jnp.eye(4)[3]])
    system = jnp.block([[jnp.asarray(MATRIX), rows.T], [rows, jnp.zeros((2, 2))]])
    return jnp.linalg.solve(system, jnp.concatenate([MATRIX @ TARGET, theta]))[:4]


def value_by_active_set(theta):
    return slope_and_square(solved_by_active_set(theta), theta, None)


POLYHEDRON = np.array([1.0, 0.3])


def test_the_polyhedron_equals_its_active_set_solution_to_second_order():
    projection = bl.jaxopt_projection("projection_polyhedron", polyhedron)
    out = on_vectors(projection, POLYHEDRON)
    # The error after all steps, 3e-13, times κ < 6 and the slopes.
    np.testing.assert_allclose(out.inner.w, solved_by_active_set(POLYHEDRON), atol=1e-11)
    np.testing.assert_allclose(out.gradient, jax.grad(value_by_active_set)(POLYHEDRON), atol=1e-10)
    layer = bl.implicit_layer(problem_on_vectors(projection).condition, bl.FixedPointIteration(STEPS), bl.LU())
    hessian = jax.jit(jax.hessian(lambda theta: slope_and_square(layer(theta, jnp.zeros(4), None), theta, None)))
    np.testing.assert_allclose(hessian(POLYHEDRON), jax.hessian(value_by_active_set)(POLYHEDRON), atol=1e-10)


def test_a_polyhedron_may_have_linearly_dependent_rows():
    # Each row appears twice. The projection is the same, although the multipliers are not unique.
    def twice(theta, data):
        return tuple(jnp.concatenate([part, part]) for part in polyhedron(theta, data))

    out = on_vectors(bl.jaxopt_projection("projection_polyhedron", twice), POLYHEDRON)
    np.testing.assert_allclose(out.gradient, jax.grad(value_by_active_set)(POLYHEDRON), atol=1e-10)


def test_a_bound_at_a_distance_of_1e_4_is_inactive_at_the_default_and_at_a_smaller_tolerance():
    # w₀ = 0.35 is below its bound by only 1e-4. At a tolerance of 1e-1, OSQP would take the bound for active.
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
def test_an_empty_set_is_reported_as_nonfinite(name):
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
    # The tolerance is 100·eps, because the system on the face is well-conditioned.
    np.testing.assert_allclose(out, wide(TARGET, jnp.asarray(POLYHEDRON), None), atol=1.2e-5)


def reverse_mode_only(w, theta, data):
    """Project by jaxopt's own function, which has a custom_vjp. ``data`` has integers, which have no tangents."""
    rows = jnp.eye(4)[data]
    params = (jnp.ones((1, 4)), theta[:1], rows, jnp.append(theta[1:], 5.0))
    return library.projection.projection_polyhedron(w, params, check_feasible=False)


def test_a_projection_with_only_reverse_mode_is_also_differentiated_in_forward_mode():
    condition, data = problem_on_vectors(reverse_mode_only).condition, jnp.array([3, 0])
    layer = bl.implicit_layer(condition, bl.FixedPointIteration(30), bl.LU())

    def value(theta):
        return slope_and_square(layer(theta, jnp.zeros(4), data), theta, None)

    forward, backward = jax.jit(lambda theta: (jax.jacfwd(value)(theta), jax.grad(value)(theta)))(POLYHEDRON)
    np.testing.assert_allclose(forward, backward, rtol=1e-8)  # the linear systems are solved to about 1e-10
    # With its default options OSQP stops at 1e-3.
    np.testing.assert_allclose(backward, jax.grad(value_by_active_set)(POLYHEDRON), atol=1e-2)


def test_a_projection_with_only_reverse_mode_may_capture_theta():
    # The projection of ȳ onto 1ᵀy = c is ȳ + (c − 1ᵀȳ)/4. Its derivative with respect to the captured c is 1/4.
    def point(c, w):
        def captured(w, theta, data):
            return library.projection.projection_affine_set(w, (jnp.ones((1, 4)), c[None]))

        condition = bl.Projected(lambda w, theta, data: 0.5 * jnp.sum((w - TARGET) ** 2), captured)
        return condition.mapping(w, None, None)

    for derivative in (jax.jacfwd(point), jax.jacrev(point)):
        np.testing.assert_allclose(jax.jit(derivative)(jnp.array(1.2), jnp.zeros(4)), np.full(4, 0.25), rtol=1e-4)


@pytest.mark.xfail(
    raises=jax.errors.TracerBoolConversionError,
    strict=True,
    reason="jaxopt's feasibility check branches on a traced number",
)
def test_jaxopts_polyhedron_with_its_feasibility_check_can_be_traced():
    on_vectors(bl.jaxopt_projection(library.projection.projection_polyhedron, polyhedron), POLYHEDRON, steps=1)


def test_the_sparse_simplex_equals_its_solution_on_the_support():
    def at_most_two(w, value):
        return library.projection.projection_sparse_simplex(w, 2, value=value)

    out = on_vectors(bl.jaxopt_projection(at_most_two, lambda theta, data: theta), jnp.array(1.3), steps=400)
    support = np.flatnonzero(out.inner.w)
    assert support.size == 2
    # On the support F, with the sum fixed at c, dw/dc = H_FF⁻¹1 / 1ᵀH_FF⁻¹1.
    along = np.linalg.solve(MATRIX[np.ix_(support, support)], np.ones(2))
    expected = (SLOPE + 0.6 * out.inner.w)[support] @ along / along.sum()
    np.testing.assert_allclose(out.gradient, expected, rtol=1e-12)
