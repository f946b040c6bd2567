"""Tests of the comparison of inner solvers, on least squares, whose curvature NumPy computes."""

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from benchmarks import inner_solvers
from imaml.learning.algorithms import Learner
from imaml.learning.problem import squared_error
from imaml.learning.tasks import Task

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = 3, 6, 4  # tasks, examples, features


@pytest.fixture
def tasks():
    random = np.random.default_rng(0)
    x, query_x = random.normal(size=(2, *SHAPE))
    y, query_y = random.normal(size=(2, *SHAPE[:2], 1))
    return Task(*map(jnp.asarray, (x, y, query_x, query_y)))


@pytest.fixture
def learner():
    solver = bl.GradientDescent(0.1, 500)
    return Learner(lambda w, x: x @ w["w"], solver, bl.Implicit(bl.CG(4)), 0.5, squared_error)


def test_least_squares_has_the_same_curvature_everywhere(learner, tasks, x64):
    theta = {"w": jnp.zeros((SHAPE[2], 1))}
    exact = [2 / SHAPE[1] * np.linalg.norm(np.asarray(x), 2) ** 2 for x in tasks.support_x]
    at_theta, at_phi = inner_solvers.curvature(learner, theta, tasks)
    # With four features, Lanczos is exact after four steps, so the tolerance is far above the error of Lanczos.
    np.testing.assert_allclose(at_theta, exact, rtol=0.05)
    np.testing.assert_allclose(at_theta, at_phi, rtol=1e-12)


@pytest.mark.slow("compiles every inner solver of the comparison")
def test_the_nearly_exact_solver_converges_and_a_step_size_beyond_the_limit_diverges(learner, tasks, capsys):
    found = inner_solvers.study(learner, {"w": jnp.zeros((SHAPE[2], 1))}, tasks, certified=1)["solvers"]
    assert found["near exact"]["inner_residual"] < 1e-4 and found["near exact"]["cosine"] == pytest.approx(1)
    assert found["0.5 × limit, 64 steps"]["inner_residual"] < found["0.5 × limit, 16 steps"]["inner_residual"]
    assert not found["5 × limit, 32 steps"]["inner_residual"] < 1e3
    assert found["near exact"]["correction"] < 1e-4 and found["near exact"]["first_order"] == 1
    # The problem is quadratic, so the corrected gradient is exact, and so is the correction's share of it.
    rough = found["0.5 × limit, 16 steps"]
    assert rough["correction"] > 1e-3 and rough["first_order"] == 1
    assert capsys.readouterr().out.count("accuracy") == len(found)
