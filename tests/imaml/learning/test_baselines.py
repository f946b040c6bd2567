"""Tests of MAML, first-order MAML, Reptile and the reference code against NumPy, and of tasks computed together."""

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


# --- Linear regression: each algorithm in closed form --------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 4, POINTS, FEATURES)), random.normal(size=(2, 4, POINTS, 1))
    return jax.tree.map(jnp.asarray, Task(x[0], y[0], x[1], y[1]))


THETA = {"w": np.random.default_rng(1).normal(size=(FEATURES, 1))}


def linear_learner(algorithm, steps=STEPS, strength=1.0):
    inner = bl.GradientDescent(RATE, steps)
    return make_learner(algorithm, lambda p, x: x @ p["w"], squared_error, inner, bl.CG(5), strength)


def descend(x, y, steps=STEPS):
    """Return φ after ``steps`` gradient steps from THETA on the mean squared error, and its Jacobian dφ/dθ."""
    phi, jacobian = THETA["w"], np.eye(FEATURES)
    for _ in range(steps):
        phi = phi - RATE * 2 * x.T @ (x @ phi - y) / len(x)
        jacobian = jacobian - RATE * 2 * x.T @ x / len(x) @ jacobian
    return phi, jacobian


def closed_form(algorithm, task):
    """Return the query loss and the meta-gradient of one task."""
    x, y, query_x, query_y = (np.asarray(array) for array in jax.tree.leaves(task))
    if algorithm == "reptile":
        phi, _ = descend(np.concatenate([x, query_x]), np.concatenate([y, query_y]))
        return np.mean((query_x @ phi - query_y) ** 2), THETA["w"] - phi
    phi, jacobian = descend(x, y)
    error = query_x @ phi - query_y
    slope = 2 * query_x.T @ error / len(error)
    return np.mean(error**2), jacobian.T @ slope if algorithm == "maml" else slope


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_the_meta_gradient_is_its_closed_form(algorithm, tasks):
    out = jax.jit(meta_gradient(linear_learner(algorithm)))(THETA, tasks)
    exact = [closed_form(algorithm, jax.tree.map(lambda array, i=i: array[i], tasks)) for i in range(4)]
    # The tolerances allow for rounding in four steps with matrices of norm below 10 and sums of 16 terms.
    np.testing.assert_allclose(out.value, np.mean([value for value, _ in exact]), rtol=1e-11)
    np.testing.assert_allclose(out.gradient["w"], np.mean([gradient for _, gradient in exact], 0), atol=1e-11)
    assert int(out.tasks) == 4 and not np.asarray(out.linear_residual).any()


@pytest.mark.slow("compiles the meta-gradient of each algorithm")
def test_the_algorithms_have_different_meta_gradients(tasks):
    gradients = [flat(jax.jit(meta_gradient(linear_learner(name)))(THETA, tasks).gradient) for name in ALGORITHMS]
    for i, one in enumerate(gradients):
        for other in gradients[:i]:
            assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


@pytest.mark.slow("compiles each algorithm twice")
@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_the_meta_gradient_does_not_depend_on_the_strength(algorithm, tasks):
    one, other = (jax.jit(meta_gradient(linear_learner(algorithm, strength=s)))(THETA, tasks) for s in (1.0, 7.0))
    np.testing.assert_array_equal(one.gradient["w"], other.gradient["w"])


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
def test_adapting_uses_only_the_support_set(algorithm, tasks):
    task = jax.tree.map(lambda array: array[0], tasks)
    phi = linear_learner(algorithm).adapt(THETA, task).w["w"]
    np.testing.assert_allclose(phi, descend(np.asarray(task.support_x), np.asarray(task.support_y))[0], atol=1e-11)


# --- The reference code against dense NumPy ------------------------------------------------------------------------

WAYS, SHOTS = 3, 2


@pytest.fixture(scope="module")
def softmax_task():
    random = np.random.default_rng(2)
    y = np.repeat(np.arange(WAYS, dtype=np.int32), SHOTS)
    # The factor of 5 makes H/12 comparable to 2I in `reference_code`.
    x = 5 * random.normal(size=(2, WAYS * SHOTS, FEATURES))
    return jax.tree.map(jnp.asarray, Task(x[0], y, x[1], y))


def softmax_slope(parameters, x, y):
    """Return the gradient of softmax regression's mean cross-entropy, the extended inputs, and the probabilities.

    The inputs are extended by a column of ones. The gradient has the shape ``[features + 1, ways]``, and its last row
    belongs to the bias.
    """
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    logits = x @ parameters
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return x.T @ (p - np.eye(WAYS)[y]) / len(x), x, p


def reference_code(theta, task):
    """Return what the authors' code computes: φ, the meta-gradient, and the exact solution of its linear system.

    The code takes 16 gradient steps of size 0.1, one step of size 0.1 on the proximal term with λ = 2, and then five CG
    steps from zero on (2I + H/12)g = v. H is the Hessian of the support loss, and v the gradient of the query loss.
    """
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
        solution, updated = solution + length * direction, residual - length * product
        direction = updated + (updated @ updated) / (residual @ residual) * direction
        residual = updated
    return phi, solution.reshape(phi.shape), np.linalg.solve(matrix, b).reshape(phi.shape)


@pytest.mark.slow("compiles the reference code's inner loop")
def test_the_reference_learner_computes_the_meta_gradient_of_the_authors_code(softmax_task):
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
    # Five steps differ from the exact solution by more than the tolerance, so the test would detect an exact solve.
    assert np.abs(truncated - exact).max() > 1e-10


def test_the_reference_preset_has_the_learner_and_the_initialisation_of_the_authors_code():
    chosen = imaml.preset("omniglot-5way-1shot-reference-code")
    expected = reference_learner(
        chosen.learner.apply, cross_entropy, bl.GradientDescent(0.1, 16), bl.CG(5, ridge=1.0), 2.0
    )
    assert replace(chosen.learner, apply=expected.apply) == expected and expected.strength == 12.0
    head = chosen.functions.init(jax.random.key(0))["head"]
    limit = 1.73 * np.sqrt(6 / (256 + 5))
    assert 0.99 * limit < np.abs(head["kernel"]).max() <= limit
    assert 0 <= head["bias"].min() < head["bias"].max() <= 0.05


# --- Tasks computed together ---------------------------------------------------------------------------------------

FIELDS = ("value", "gradient", "tasks", "inner_residual", "linear_residual", "status")


@pytest.fixture(scope="module")
def curves():
    """Return a small network with tanh, and six tasks, one of them with NaN queries."""
    keys = jax.random.split(jax.random.key(0), 6)
    tasks = imaml.Curve(shots=4, queries=5).batch((), keys)
    tasks = replace(tasks, query_x=tasks.query_x.at[2].set(jnp.nan))
    return mlp((1, 5, 1), jnp.tanh), tasks


@pytest.mark.slow("compiles a batch of tasks for each algorithm")
@pytest.mark.parametrize("at_once, algorithm", [(2, "imaml"), (3, "maml"), (4, "imaml"), (99, "reptile")])
def test_tasks_computed_together_give_the_same_result_as_one_by_one(at_once, algorithm, curves):
    network, tasks = curves
    theta = network.init(jax.random.key(1))
    learner = make_learner(algorithm, network.apply, squared_error, bl.GradientDescent(0.01, 3), bl.CG(3), 10.0)
    one, several = (jax.jit(meta_gradient(learner, at_once=number))(theta, tasks) for number in (1, at_once))
    # The task with NaN is left out. Its NaN also reaches Reptile's inner loop, which adapts to query points too.
    assert int(one.tasks) == 5 and bl.Status(int(one.status[2])) is bl.Status.NONFINITE
    for name in FIELDS:
        np.testing.assert_allclose(flat(getattr(several, name)), flat(getattr(one, name)), rtol=1e-10, atol=1e-12)
