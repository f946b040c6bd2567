"""A damped linear solver at an inner solution that is not a minimum, on a tanh network."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

THETA = -6.0


def network(w, x):
    return jnp.tanh(x @ w["a"] + w["b"]) @ w["c"]


def fit(w, theta, data):
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
    return jnp.mean((network(w, data[0]) - data[1]) ** 2) + jnp.exp(theta) * penalty


def outer(w, theta, data):
    return jnp.mean((network(w, data[2]) - data[3]) ** 2)


PROBLEM = bl.Problem(bl.Stationary(fit), outer)
SOLVER = bl.HessianFree(max_steps=10, cg_steps=10)


def start(width):
    """Return an initial w and data."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(60, 1))
    y = np.sin(4 * x[:, 0]) + 0.1 * rng.normal(size=60)
    w = {"a": 2 * rng.normal(size=(1, width)), "b": rng.normal(size=width), "c": rng.normal(size=width) / width**0.5}
    return jax.tree.map(jnp.asarray, (w, (x[:40], y[:40], x[40:], y[40:])))


@pytest.mark.slow("solves for a network of 600 unknowns and takes its Hessian")
@pytest.mark.parametrize("width", [8, 200], ids=str)  # 24 unknowns: a factorisation; 600 unknowns: Lanczos and CG
def test_the_damped_choice_works_where_the_first_choice_fails(width, double_precision):
    with double_precision():
        w, data = start(width)
        inner = bl.solve(SOLVER, PROBLEM.condition, w, THETA, data).w
        flat, unravel = ravel_pytree(inner)
        hessian = np.asarray(jax.hessian(lambda flat: fit(unravel(flat), THETA, data))(flat))
        eigenvalues = np.linalg.eigvalsh(hessian)
        assert eigenvalues[0] < 0

        def call(linear):
            return bl.value_and_hypergradient(PROBLEM, lambda *_: inner, bl.Implicit(linear))(THETA, w, data)

        with pytest.raises(bl.HypergradientError, match="NEGATIVE_CURVATURE"):
            call(bl.Cholesky() if width == 8 else bl.CG(100, tol=1e-6, engine="watched"))
        solver, reason = bl.choose_linear(PROBLEM.condition, inner, THETA, data, damped=True)
        assert f"{solver.ridge:.3g}·(w − w̄)" in reason
        assert eigenvalues[0] + solver.ridge >= 0.9e-2 * eigenvalues[-1]
        out = call(solver)

        cross = np.asarray(ravel_pytree(jax.jacfwd(jax.grad(fit), argnums=1)(inner, THETA, data))[0])
        slope = np.asarray(ravel_pytree(jax.grad(outer)(inner, THETA, data))[0])
        adjoint = np.linalg.solve(hessian + solver.ridge * np.eye(len(flat)), slope)
        np.testing.assert_allclose(out.gradient, -cross @ adjoint, rtol=1e-4)


@pytest.mark.slow("certifies a network")
def test_the_damped_gradient_is_certified_as_that_of_the_damped_problem(double_precision):
    with double_precision():
        w, data = start(8)
        center = bl.solve(SOLVER, PROBLEM.condition, w, THETA, data).w
        ridge = bl.choose_linear(PROBLEM.condition, center, THETA, data, damped=True).solver.ridge
        damped = bl.Problem(bl.Proximal(fit, ridge, center=lambda theta, data: center), outer)
        solver = bl.HessianFree(100, cg_steps=50, tol=1e-11)
        out = bl.value_and_hypergradient(damped, solver, bl.Implicit(bl.Cholesky()))(THETA, center, data)
        certificate = bl.certify(damped, THETA, out, data)
        assert certificate.ok and float(certificate.estimate) < 1e-6 * abs(float(out.gradient))

        def value(theta):
            return float(outer(bl.solve(solver, damped.condition, center, theta, data).w, theta, data))

        difference = (value(THETA + 1e-4) - value(THETA - 1e-4)) / 2e-4
        np.testing.assert_allclose(out.gradient, difference, rtol=1e-5)

        # With the ridge in the linear solver alone, w stays at the center, where the damped problem is not solved. The
        # certificate says so.
        linear = bl.Implicit(bl.Cholesky(ridge))
        quick = bl.value_and_hypergradient(PROBLEM, lambda *_: center, linear)(THETA, center, data)
        assert not bl.certify(damped, THETA, quick, data).ok


def test_a_positive_definite_condition_needs_no_ridge():
    convex = bl.Stationary(lambda w, theta, data: 0.5 * w @ w + w @ theta)
    solver, reason = bl.choose_linear(convex, jnp.ones(3), jnp.ones(3), damped=True)
    assert solver == bl.Cholesky() and "needs no ridge" in reason


def test_the_ridge_of_a_proximal_condition_belongs_to_the_scaled_matrix():
    condition = bl.Proximal(lambda w, theta, data: 0.5 * w @ (jnp.array([4.0, -6.0]) * w), 2.0)
    # I + H/2 has the eigenvalues 3 and −2.
    solver, _ = bl.choose_linear(condition, jnp.zeros(2), jnp.zeros(2), damped=True)
    np.testing.assert_allclose(solver.ridge, 2 + 0.03, rtol=1e-5)


def test_what_cannot_be_damped_is_refused():
    condition = bl.Stationary(fit)
    with pytest.raises(ValueError, match="its inner solution w, got Stationary and no w"):
        bl.choose_linear(condition, damped=True)
    with pytest.raises(ValueError, match="needs a symmetric condition"):
        bl.choose_linear(bl.Root(lambda w, theta, data: w), jnp.ones(2), damped=True)
    with pytest.raises(ValueError, match="no finite eigenvalues"):
        bl.choose_linear(bl.Stationary(lambda w, theta, data: w @ w / theta), jnp.ones(2), 0.0, damped=True)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda w: bl.choose_linear(bl.Stationary(fit), w, damped=True))(jnp.ones(2))


def pitchfork(w, theta, data):
    """Return an objective whose Hessian at w₁ = 0 is diag(1, 1 − θ). The solver stays at w₁ = 0, also for θ > 1."""
    return 0.5 * w[0] ** 2 - theta * w[0] + 0.5 * (1 - theta) * w[1] ** 2 + 0.25 * w[1] ** 4


@pytest.mark.slow("compiles a loop for each ridge")
def test_a_loop_chooses_again_where_the_least_eigenvalue_falls_below_zero():
    """The loop of docs/choosing.md, on a problem whose Hessian has a negative eigenvalue in later steps."""
    problem = bl.Problem(bl.Stationary(pitchfork), lambda w, theta, data: 0.5 * (w[0] - 2) ** 2)
    solver, optimizer, start = bl.GradientDescent(0.5, 60), optax.sgd(0.2), jnp.zeros(2)

    def loop(linear, steps, state=None):
        method = bl.Implicit(linear)
        return bl.minimize(problem, 0.0, start, None, solver, method, optimizer, steps, state=state)

    with pytest.raises(bl.HypergradientError, match="NEGATIVE_CURVATURE"):
        loop(bl.Cholesky(), 30)

    ridges, steps, every, state, theta, w = [], 30, 10, None, 0.0, start
    while (done := 0 if state is None else int(state.step)) < steps:
        w = bl.solve(solver, problem.condition, w, theta, None).w
        linear, _ = bl.choose_linear(problem.condition, w, theta, None, damped=True)
        linear = replace(linear, ridge=2 * linear.ridge)
        ridges.append(linear.ridge)
        try:
            state = loop(linear, min(every, steps - done), state).state
        except bl.HypergradientError as error:
            assert error.state.step > done  # each new ridge is large enough for at least one step
            state = error.state
        theta, w = state.theta, state.w
    # The least eigenvalue falls from 1 to −1. The loop takes twice the chosen ridge, so few choices are enough.
    assert ridges[0] == 0 < ridges[-1] and len(ridges) <= 9
    # dw₀/dθ is 1/(1 + ridge) in place of 1: the steps become shorter, and lead to the same minimum.
    np.testing.assert_allclose(theta, 2.0, atol=0.1)
