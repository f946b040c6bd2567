"""The algorithms beside implicit MAML, and the reference code's operator, against NumPy; several tasks at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
import imaml
from imaml import Task, meta_gradient
from imaml.learning.algorithms import ALGORITHMS, make_learner, reference_learner
from imaml.learning.networks import mlp
from imaml.learning.problem import cross_entropy, squared_error

EPS = np.finfo(np.float64).eps
FEATURES, POINTS, RATE, STEPS = 3, 8, 0.2, 4


@pytest.fixture(scope="module", autouse=True)
def in_float64(quick_compilation, double_precision):
    with double_precision():
        yield


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# --- Linear regression: every algorithm in closed form -------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 4, POINTS, FEATURES)), random.normal(size=(2, 4, POINTS, 1))
    return jax.tree.map(jnp.asarray, Task(x[0], y[0], x[1], y[1]))


THETA = {"w": np.random.default_rng(1).normal(size=(FEATURES, 1))}


def linear(algorithm, steps=STEPS, strength=1.0):
    inner = bl.GradientDescent(RATE, steps)
    return make_learner(algorithm, lambda p, x: x @ p["w"], squared_error, inner, bl.CG(5), strength)


def descend(x, y, steps=STEPS):
    """φ after gradient descent on the mean squared error, and dφ/dθ."""
    phi, jacobian = THETA["w"], np.eye(FEATURES)
    for _ in range(steps):
        phi = phi - RATE * 2 * x.T @ (x @ phi - y) / len(x)
        jacobian = jacobian - RATE * 2 * x.T @ x / len(x) @ jacobian
    return phi, jacobian


def closed_form(algorithm, task):
    """The query loss and the gradient of one task."""
    x, y, query_x, query_y = (np.asarray(array) for array in jax.tree.leaves(task))
    if algorithm == "reptile":
        phi, _ = descend(np.concatenate([x, query_x]), np.concatenate([y, query_y]))
        return np.mean((query_x @ phi - query_y) ** 2), THETA["w"] - phi
    phi, jacobian = descend(x, y)
    error = query_x @ phi - query_y
    slope = 2 * query_x.T @ error / len(error)
    return np.mean(error**2), jacobian.T @ slope if algorithm == "maml" else slope


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_the_gradient_is_its_closed_form(algorithm, tasks):
    out = jax.jit(meta_gradient(linear(algorithm)))(THETA, tasks)
    exact = [closed_form(algorithm, jax.tree.map(lambda array, i=i: array[i], tasks)) for i in range(4)]
    # Four steps with matrices of norm below ten on sums of sixteen.
    np.testing.assert_allclose(out.value, np.mean([value for value, _ in exact]), rtol=1e-11)
    np.testing.assert_allclose(out.gradient["w"], np.mean([gradient for _, gradient in exact], 0), atol=1e-11)
    assert int(out.tasks) == 4 and not np.asarray(out.linear_residual).any()


def test_the_algorithms_differ(tasks):
    gradients = [flat(jax.jit(meta_gradient(linear(name)))(THETA, tasks).gradient) for name in ALGORITHMS]
    for i, one in enumerate(gradients):
        for other in gradients[:i]:
            assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_strength_has_no_part_in_them(algorithm, tasks):
    one, other = (jax.jit(meta_gradient(linear(algorithm, strength=s)))(THETA, tasks) for s in (1.0, 7.0))
    np.testing.assert_array_equal(one.gradient["w"], other.gradient["w"])


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_adapting_looks_at_the_support_set_alone(algorithm, tasks):
    task = jax.tree.map(lambda array: array[0], tasks)
    phi = linear(algorithm).adapt(THETA, task).w["w"]
    np.testing.assert_allclose(phi, descend(np.asarray(task.support_x), np.asarray(task.support_y))[0], atol=1e-11)


# --- The reference code: its operator, dense, in NumPy -------------------------------------------------------------

WAYS, SHOTS = 3, 2


@pytest.fixture(scope="module")
def softmax_task():
    random = np.random.default_rng(2)
    y = np.repeat(np.arange(WAYS, dtype=np.int32), SHOTS)
    x = 5 * random.normal(size=(2, WAYS * SHOTS, FEATURES))  # so that H/12 counts beside 2I
    return jax.tree.map(jnp.asarray, Task(x[0], y, x[1], y))


def softmax_slope(parameters, x, y):
    """Gradient [features + 1, ways] of softmax regression's mean cross-entropy; the last row is the bias."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    logits = x @ parameters
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return x.T @ (p - np.eye(WAYS)[y]) / len(x), x, p


def reference_code(theta, task):
    """16 plain steps at 0.1, one step back at 0.1 · λ with λ = 2, then five CG steps from zero on 2I + H/12."""
    x, y, query_x, query_y = (np.asarray(array) for array in jax.tree.leaves(task))
    phi = theta
    for _ in range(16):
        phi = phi - 0.1 * softmax_slope(phi, x, y)[0]
    phi = phi - 0.1 * 2 * (phi - theta)
    _, rows, p = softmax_slope(phi, x, y)
    blocks = [np.kron(np.outer(r, r), np.diag(q) - np.outer(q, q)) for r, q in zip(rows, p, strict=True)]
    matrix = 2 * np.eye(phi.size) + np.mean(blocks, axis=0) / 12
    b = softmax_slope(phi, query_x, query_y)[0].ravel()
    solution, residual = np.zeros_like(b), b
    direction = residual
    for _ in range(5):
        product = matrix @ direction
        length = residual @ residual / (direction @ product)
        solution, after = solution + length * direction, residual - length * product
        direction = after + (after @ after) / (residual @ residual) * direction
        residual = after
    return phi, solution.reshape(phi.shape), np.linalg.solve(matrix, b).reshape(phi.shape)


def test_the_reference_codes_gradient_is_its_operator(softmax_task):
    network = mlp((FEATURES, WAYS))
    theta = jax.tree.map(lambda leaf: leaf + 0.2, network.init(jax.random.key(0)))
    own = imaml.preset("omniglot-5way-1shot-reference-code")
    learner = reference_learner(network.apply, cross_entropy, own.inner, own.linear, own.strength)
    stacked = np.concatenate([theta["layer0"]["kernel"], theta["layer0"]["bias"][None]])
    phi, truncated, exact = reference_code(stacked, softmax_task)
    adapted = learner.adapt(theta, softmax_task).w["layer0"]
    np.testing.assert_allclose(np.concatenate([adapted["kernel"], adapted["bias"][None]]), phi, rtol=1e-11)
    batch = jax.tree.map(lambda array: array[None], softmax_task)
    gradient = jax.jit(meta_gradient(learner))(theta, batch).gradient["layer0"]
    ours = np.concatenate([gradient["kernel"], gradient["bias"][None]])
    np.testing.assert_allclose(ours, truncated, rtol=0, atol=1e-11)
    # The truncation is seen, so that the comparison is with five steps from zero and not with the solution.
    assert np.abs(truncated - exact).max() > 1e-10


def test_the_reference_preset_is_made_of_that_learner():
    chosen = imaml.preset("omniglot-5way-1shot-reference-code")
    expected = reference_learner(
        chosen.learner.apply, cross_entropy, bl.GradientDescent(0.1, 16), bl.CG(5, ridge=1.0), 2.0
    )
    assert replace(chosen.learner, apply=expected.apply) == expected and expected.strength == 12.0
    head = chosen.functions.init(jax.random.key(0))["head"]
    limit = 1.73 * np.sqrt(6 / (256 + 5))
    assert 0.99 * limit < np.abs(head["kernel"]).max() <= limit
    assert 0 <= head["bias"].min() < head["bias"].max() <= 0.05


# --- Several tasks at once -----------------------------------------------------------------------------------------

FIELDS = ("value", "gradient", "tasks", "inner_residual", "linear_residual", "status")


@pytest.fixture(scope="module")
def curves():
    """Six tasks, one of which is not finite, and θ of a small network with tanh."""
    keys = jax.random.split(jax.random.key(0), 6)
    tasks = imaml.Curve(shots=4, queries=5).batch((), keys)
    tasks = replace(tasks, query_x=tasks.query_x.at[2].set(jnp.nan))
    return mlp((1, 5, 1), jnp.tanh), tasks


@pytest.mark.parametrize("at_once, algorithm", [(2, "imaml"), (3, "maml"), (4, "imaml"), (99, "reptile")])
def test_tasks_computed_together_give_what_they_give_one_by_one(at_once, algorithm, curves):
    network, tasks = curves
    theta = network.init(jax.random.key(1))
    learner = make_learner(algorithm, network.apply, squared_error, bl.GradientDescent(0.01, 3), bl.CG(3), 10.0)
    one, several = (jax.jit(meta_gradient(learner, at_once=number))(theta, tasks) for number in (1, at_once))
    # Reptile learns from the query points too; what is not finite is left out in any case.
    assert int(one.tasks) == 5 and bl.Status(int(one.status[2])) is bl.Status.NONFINITE
    for name in FIELDS:
        np.testing.assert_allclose(flat(getattr(several, name)), flat(getattr(one, name)), rtol=1e-10, atol=1e-12)
