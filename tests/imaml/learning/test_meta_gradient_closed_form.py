"""Tests of the meta-gradient of linear regression against its closed form, in float64.

Further tests plant faults in the library and check that the comparison detects them.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.methods import implicit
from imaml import Learner, Task, meta_gradient
from imaml.learning import algorithms
from imaml.learning.problem import task_problem

EPS = np.finfo(np.float64).eps
FEATURES, POINTS, PENALTY = 3, 8, 0.5


@pytest.fixture(scope="module", autouse=True)
def in_float64(quick_compilation, double_precision):
    with double_precision():
        yield


def squared_loss(outputs, targets):
    return 0.5 * ((outputs - targets) ** 2).mean()


def linear_regression():
    """Return a learner, θ and two tasks whose designs have orthogonal columns, so that gradient descent is fast."""
    random = np.random.default_rng(0)
    x = np.stack([np.linalg.qr(random.normal(size=(POINTS, FEATURES)))[0] for _ in range(4)]) * POINTS**0.5
    x = x * np.array([0.7, 1.0, 1.3])  # curvatures 0.49, 1, 1.69
    y = random.normal(size=(4, POINTS, 1))
    tasks = jax.tree.map(jnp.asarray, Task(x[:2], y[:2], x[2:], y[2:]))
    # With λ the curvatures are 0.99, 1.5 and 2.19. A step multiplies the error by at most |1 − 0.7 · 2.19| = 0.53, and
    # 0.53⁶⁰ = 4e-17.
    solver = bl.GradientDescent(step_size=0.7, max_steps=60)
    learner = Learner(lambda w, x: x @ w["w"], solver, bl.Implicit(bl.LU()), PENALTY, squared_loss)
    return learner, {"w": jnp.asarray(random.normal(size=(FEATURES, 1)))}, tasks


def regression_closed_form(theta, tasks, index):
    """Return φ* = (XᵀX/n + λI)⁻¹(Xᵀy/n + λθ), its query loss, and the meta-gradient λ(XᵀX/n + λI)⁻¹ ∇query.

    X and y are the n support points of task ``index``, λ is PENALTY, and ∇query the query loss's gradient at φ*.
    """
    x, y, query_x, query_y = (np.asarray(array[index]) for array in jax.tree.leaves(tasks))
    matrix = x.T @ x / POINTS + PENALTY * np.eye(FEATURES)
    phi = np.linalg.solve(matrix, x.T @ y / POINTS + PENALTY * np.asarray(theta["w"]))
    error = query_x @ phi - query_y
    return phi, 0.5 * np.mean(error**2), PENALTY * np.linalg.solve(matrix, query_x.T @ error / POINTS)


def check_closed_form():
    learner, theta, tasks = linear_regression()
    out = jax.jit(meta_gradient(learner))(theta, tasks)
    exact = [regression_closed_form(theta, tasks, index) for index in range(2)]
    # Rounding errors are far below the tolerances: sums have 8 terms, and the condition number is 2.2.
    np.testing.assert_allclose(out.value, np.mean([value for _, value, _ in exact]), rtol=1e-10)
    np.testing.assert_allclose(out.gradient["w"], np.mean([gradient for *_, gradient in exact], axis=0), atol=1e-10)
    return out


def test_the_meta_gradient_is_its_closed_form():
    out = check_closed_form()
    assert int(out.tasks) == 2
    assert (out.inner_residual < 100 * EPS).all() and (out.linear_residual < 100 * EPS).all()
    assert jnp.isnan(out.accuracy)  # real targets have no accuracy


def test_adapting_finds_the_closed_form():
    learner, theta, tasks = linear_regression()
    phi = learner.adapt(theta, jax.tree.map(lambda array: array[1], tasks)).w["w"]
    np.testing.assert_allclose(phi, regression_closed_form(theta, tasks, 1)[0], atol=1e-10)


def test_an_exact_adjoint_solve_does_not_depend_on_the_scaling_of_the_system(monkeypatch):
    monkeypatch.setattr(bl.Proximal, "scaling", lambda self, theta, data: jnp.asarray(3.0))
    check_closed_form()


# --- Planted faults ------------------------------------------------------------------------------------------------


def adjoint_changed_by(change):
    """Return a fault that replaces the adjoint solution v of right-hand side b by ``change(v, b)``."""

    def plant(monkeypatch):
        original = implicit.solve_scaled

        def faulty(linear, matvec, b, *rest):
            v, info = original(linear, matvec, b, *rest)
            return jax.tree.map(change, v, b), info

        monkeypatch.setattr(implicit, "solve_scaled", faulty)

    return plant


def system_without_strength(monkeypatch):
    original = implicit.adjoint_matvec

    def faulty(*inputs):
        residual, matvec = original(*inputs)
        return residual, lambda u: jax.tree.map(lambda product, entry: product - PENALTY * entry, matvec(u), u)

    monkeypatch.setattr(implicit, "adjoint_matvec", faulty)


def strength_halved(monkeypatch):
    monkeypatch.setattr(bl.Proximal, "_strength", lambda self, theta, data: 0.5 * self.strength)


def pulled_away_from_theta(monkeypatch):
    def residual(self, w, theta, data):
        slope = jax.grad(self.objective)(w, theta, data)
        return jax.tree.map(lambda s, x, c: s + self.strength * (x + c), slope, w, theta)

    monkeypatch.setattr(bl.Proximal, "residual", residual)


def sets_swapped(monkeypatch):
    def swapped(*parts):
        problem = task_problem(*parts)

        def swap(task):
            return Task(task.query_x, task.query_y, task.support_x, task.support_y)

        condition = replace(problem.condition, objective=lambda w, t, d: problem.condition.objective(w, t, swap(d)))
        return bl.Problem(condition, lambda w, t, d: problem.outer(w, t, swap(d)), has_aux=True)

    monkeypatch.setattr(algorithms, "task_problem", swapped)


FAULTS = {
    "wrong sign of the adjoint": adjoint_changed_by(lambda v, b: -v),
    "scaling not undone": adjoint_changed_by(lambda v, b: v * PENALTY**0.5),
    "system not solved (first-order MAML)": adjoint_changed_by(lambda v, b: b / PENALTY),
    "λ missing from the system": system_without_strength,
    "½λ instead of λ": strength_halved,
    "pulled towards −θ": pulled_away_from_theta,
    "support and query swapped": sets_swapped,
}


@pytest.mark.slow("compiles a meta-gradient for each planted fault", fast="wrong sign of the adjoint")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_detects_a_planted_fault(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_closed_form()
