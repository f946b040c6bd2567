"""Tests of the meta-gradient in float64 against a dense linear system and unrolled MAML, and for batches of tasks.

The dense system is that of the published architecture with two filters. As the number of inner steps grows, the
gradient of unrolled MAML converges to the implicit one. The closed form of linear regression is tested in
test_meta_gradient_closed_form.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tiny_preset import TinyMLP

import bilevel as bl
import imaml
from imaml import Learner, MetaGradient, Task, meta_gradient
from imaml.learning.networks import mlp
from imaml.parallel.devices import AXIS, SHARED, SPREAD, local_mesh, over_tasks
from imaml.settings.parts import Conv4

EPS = np.finfo(np.float64).eps
FEATURES, PENALTY = 3, 0.5


@pytest.fixture(scope="module", autouse=True)
def in_float64(quick_compilation, double_precision):
    with double_precision():
        yield


def batch_of(task):
    """Return a batch with only that task."""
    return jax.tree.map(lambda array: array[None], task)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# --- The published architecture, with two filters, against a dense linear system -----------------------------------

PRESET = replace(
    imaml.preset("glyphs-5way-1shot-gd"),
    network=Conv4(filters=2, kernel_gain=4.0),
    strength=2.0,
    linear=bl.CG(max_steps=400, tol=1e-13),
)


@pytest.fixture(scope="module")
def glyph_task(tiny_pixels):
    """Return θ, the preset's initial parameters plus noise, and a task of the preset's size."""
    random = np.random.default_rng(0)
    theta = PRESET.network.build(PRESET.episode.ways).init(jax.random.key(0))
    theta = jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape), theta)
    task = jax.jit(PRESET.episode.sample)(tiny_pixels, jax.random.key(2))
    return theta, replace(task, support_x=task.support_x.astype(float), query_x=task.query_x.astype(float))


def support_by_hand(phi, theta, task):
    logits = jax.nn.log_softmax(PRESET.learner.apply(phi, task.support_x))
    return -jnp.take_along_axis(logits, task.support_y[:, None], 1).mean()


def query_by_hand(phi, theta, task):
    outputs = PRESET.learner.apply(phi, task.query_x)
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), task.query_y[:, None], 1).mean(), outputs


@pytest.fixture(scope="module")
def dense(glyph_task):
    """Return the adjoint system (I + H/λ)g = v, the residual, the query loss and the accuracy after the inner steps.

    H is the Hessian of the support loss, λ the preset's strength, and v the gradient of the query loss. All are
    computed from ``support_by_hand`` and ``query_by_hand``.
    """
    theta, task = glyph_task
    start, unravel = ravel_pytree(theta)

    def slope(w):
        return jax.grad(lambda w: support_by_hand(unravel(w), None, task))(w)

    @jax.jit
    def gradients_at(w):
        return slope(w) + PRESET.strength * (w - start), jax.value_and_grad(
            lambda w: query_by_hand(unravel(w), None, task), has_aux=True
        )(w)

    phi = start
    for _ in range(PRESET.inner.max_steps):
        phi = phi - PRESET.inner.step_size * gradients_at(phi)[0]
    residual, ((value, outputs), v) = jax.tree.map(np.asarray, gradients_at(phi))
    column = jax.jit(lambda direction: jax.jvp(slope, (phi,), (direction,))[1])
    hessian = np.stack([column(direction) for direction in np.eye(start.size)], axis=1)
    matrix = np.eye(start.size) + hessian / PRESET.strength
    accuracy = np.mean(outputs.argmax(-1) == np.asarray(task.query_y))
    return SimpleNamespace(matrix=matrix, v=v, residual=residual, value=value, accuracy=accuracy)


@pytest.fixture(scope="module")
def exact(dense):
    return np.linalg.solve(dense.matrix, dense.v)


@pytest.fixture(scope="module")
def tolerance(dense, exact):
    """Return 1e-8 of the gradient's norm. Rounding errors are less than a tenth of that."""
    assert np.linalg.cond(dense.matrix) * len(dense.matrix) * EPS < 1e-9
    return 1e-8 * np.linalg.norm(exact)


@pytest.fixture(scope="module")
def preset_result(glyph_task):
    theta, task = glyph_task
    return jax.jit(meta_gradient(PRESET.learner))(theta, batch_of(task))


@pytest.mark.slow("computes the Hessian of a network")
def test_the_presets_gradient_solves_the_dense_system(preset_result, exact, tolerance):
    np.testing.assert_allclose(flat(preset_result.gradient), exact, rtol=0, atol=tolerance)


@pytest.mark.slow("computes the Hessian of a network")
def test_the_dense_system_detects_a_wrong_sign_and_a_change_of_strength_by_a_ten_thousandth(
    preset_result, dense, exact, tolerance
):
    identity = np.eye(len(dense.v))
    other = identity + (dense.matrix - identity) * 1.0001
    for fault in (-exact, dense.v, np.linalg.solve(other, dense.v)):
        assert np.abs(flat(preset_result.gradient) - fault).max() > 10 * tolerance


@pytest.mark.slow("compiles two meta-gradients of a network")
def test_a_presets_gradient_equals_that_of_bilevel_on_a_handwritten_problem(glyph_task):
    preset, (_, task) = replace(PRESET, network=TinyMLP()), glyph_task
    network = preset.network.build(preset.episode.ways)
    theta = network.init(jax.random.key(0))

    def loss(phi, x, y):
        return -jnp.take_along_axis(jax.nn.log_softmax(network.apply(phi, x)), y[:, None], 1).mean()

    condition = bl.Proximal(lambda w, theta, task: loss(w, task.support_x, task.support_y), preset.strength)
    problem = bl.Problem(condition, lambda w, theta, task: loss(w, task.query_x, task.query_y))
    solver = bl.GradientDescent(preset.inner.step_size, preset.inner.max_steps)
    generic = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.CG(max_steps=400, tol=1e-13)))
    expected, out = generic(theta, theta, task), jax.jit(meta_gradient(preset.learner))(theta, batch_of(task))
    np.testing.assert_allclose(out.value, expected.value, rtol=1e-10)
    atol = 1e-8 * np.linalg.norm(flat(expected.gradient))
    np.testing.assert_allclose(flat(out.gradient), flat(expected.gradient), rtol=0, atol=atol)


@pytest.mark.slow("computes the Hessian of a network")
def test_the_residuals_loss_and_accuracy_of_the_preset_equal_those_of_the_dense_computation(preset_result, dense):
    out = preset_result
    np.testing.assert_allclose(out.inner_residual, [np.linalg.norm(dense.residual)], rtol=1e-9)
    np.testing.assert_allclose((out.value, out.accuracy), (dense.value, dense.accuracy), rtol=1e-10)
    assert float(out.linear_residual[0]) <= PRESET.linear.tol
    # The inner solver, which used up its budget, has the more severe status of the two solves.
    assert int(out.tasks) == 1 and bl.Status(int(out.status[0])) is bl.Status.BUDGET_USED


# --- Softmax regression: unrolled MAML converges to the implicit gradient ------------------------------------------

CLASSIFIER = mlp((FEATURES, 3))
RATE = 0.4


def softmax_learner(steps, method):
    return Learner(CLASSIFIER.apply, bl.GradientDescent(RATE, steps), method, PENALTY)


@pytest.fixture(scope="module")
def softmax_tasks():
    """Return eight tasks with nine points in each set.

    The inputs have norm 1, so that the eigenvalues of the support loss's Hessian, bias included, lie in [0, 1].
    """
    random = np.random.default_rng(1)
    x = random.normal(size=(2, 8, 9, FEATURES))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y = np.tile(np.arange(9, dtype=np.int32) % 3, (2, 8, 1))
    return jax.tree.map(jnp.asarray, Task(x[0], y[0], x[1], y[1]))


@pytest.fixture(scope="module")
def softmax_theta():
    return jax.tree.map(lambda leaf: leaf + 0.3, CLASSIFIER.init(jax.random.key(0)))


@pytest.mark.slow("unrolls several numbers of steps")
def test_unrolled_maml_converges_geometrically_to_the_implicit_gradient(softmax_theta, softmax_tasks):
    task = batch_of(jax.tree.map(lambda array: array[0], softmax_tasks))
    budgets = (4, 16, 64, 256)

    def gradient(steps, method):
        return flat(jax.jit(meta_gradient(softmax_learner(steps, method)))(softmax_theta, task).gradient)

    exact = gradient(400, bl.Implicit(bl.LU()))
    gaps = [np.linalg.norm(gradient(steps, bl.Unrolled()) - exact) for steps in budgets]
    # A step multiplies the inner error by at most ρ = 1 − 0.4 · ½. The gradient unrolled over K steps is a sum of K
    # terms with errors of the order ρ^K.
    rho = 1 - RATE * PENALTY
    for few, many, before, after in zip(budgets, budgets[1:], gaps, gaps[1:], strict=False):
        assert after <= 2 * before * (many / few) * rho ** (many - few) + 1e3 * EPS, (few, many, gaps)
    assert gaps[0] > 1e-3 * np.linalg.norm(exact) and gaps[-1] < 1e-9


# --- A batch of tasks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch_gradient():
    return jax.jit(meta_gradient(softmax_learner(20, bl.Implicit(bl.CG(4)))))


@pytest.fixture(scope="module")
def clean(batch_gradient, softmax_theta, softmax_tasks):
    return batch_gradient(softmax_theta, softmax_tasks)


def test_the_result_for_a_batch_is_the_mean_of_its_tasks(batch_gradient, clean, softmax_theta, softmax_tasks):
    parts = [jax.tree.map(lambda array, i=i: array[i : i + 1], softmax_tasks) for i in range(8)]
    singles = [batch_gradient(softmax_theta, part) for part in parts]
    assert int(clean.tasks) == 8
    for name in ("value", "gradient", "accuracy"):
        mean = np.mean([flat(getattr(single, name)) for single in singles], axis=0)
        np.testing.assert_allclose(flat(getattr(clean, name)), mean, rtol=1e-12, atol=100 * EPS)
    for name in ("inner_residual", "linear_residual", "status"):
        own = np.concatenate([getattr(single, name) for single in singles])
        np.testing.assert_allclose(getattr(clean, name), own, rtol=1e-9, atol=100 * EPS)


@pytest.mark.parametrize("where", ["support_x", "query_x"])
def test_a_task_with_nan_is_left_out_and_changes_no_bit_of_the_others(
    where, batch_gradient, clean, softmax_theta, softmax_tasks
):
    bad = 3
    others = np.delete(np.arange(8), bad)
    broken = replace(softmax_tasks, **{where: getattr(softmax_tasks, where).at[bad].set(jnp.nan)})
    out = batch_gradient(softmax_theta, broken)
    without = batch_gradient(softmax_theta, jax.tree.map(lambda array: array[others], softmax_tasks))
    assert int(out.tasks) == 7
    assert bl.Status(int(out.status[bad])) is bl.Status.NONFINITE
    for name in ("inner_residual", "linear_residual", "status"):
        np.testing.assert_array_equal(getattr(out, name)[others], getattr(clean, name)[others])
    for name in ("value", "gradient", "accuracy"):
        np.testing.assert_array_equal(flat(getattr(out, name)), flat(getattr(without, name)))


@pytest.mark.slow("compiles meta-gradients of several batches")
def test_a_task_whose_linear_residual_is_above_1_is_left_out():
    """The zero vector has the linear residual 1. A task with a larger one counts in the mean loss, not in the gradient.

    The adjoint system of the second task is Ag = v with A = diag(2, −1) and v = (0.71, 1). ⟨v, Av⟩ is nearly 0, so one
    CG step is far too long.
    """

    def weighted_squares(outputs, weights):
        return (0.5 * weights * outputs[:, 0] ** 2).sum()

    learner = Learner(
        lambda w, x: x @ w["w"], bl.GradientDescent(1e-6, 1), bl.Implicit(bl.CG(1)), 1.0, weighted_squares
    )
    theta = {"w": jnp.array([[0.71], [1.0]])}
    curvatures = jnp.array([[1.0, 1.0], [1.0, -2.0], [1.0, 1.0]])  # H of each task; A = I + H
    axes, ones = jnp.broadcast_to(jnp.eye(2), (3, 2, 2)), jnp.ones((3, 2))
    tasks = Task(axes, curvatures, axes, ones)
    out = meta_gradient(learner)(theta, tasks)
    good = meta_gradient(learner)(theta, jax.tree.map(lambda array: array[::2], tasks))
    assert float(out.linear_residual[1]) > 100 and float(out.linear_residual[0]) < 1e-10
    # A is indefinite, but ⟨g, Ag⟩ > 0 for the g that CG returns. So only the residual shows the failure.
    assert bl.Status(int(out.status[1])) is bl.Status.MAX_STEPS
    assert int(out.tasks) == 2
    np.testing.assert_array_equal(out.gradient["w"], good.gradient["w"])
    # The second task's loss is finite, so it counts in the mean. Each loss is ½‖φ‖², and one step of size 1e-6 leaves φ
    # close to θ.
    np.testing.assert_allclose(float(out.value), 0.5 * (0.71**2 + 1), rtol=1e-5)


def test_the_gradient_is_zero_if_no_task_counts(batch_gradient, softmax_theta, softmax_tasks):
    broken = replace(softmax_tasks, query_x=jnp.full_like(softmax_tasks.query_x, jnp.nan))
    out = batch_gradient(softmax_theta, broken)
    assert int(out.tasks) == 0 and not flat(out.gradient).any()
    assert (out.status == bl.Status.NONFINITE).all()
    assert np.isnan(out.value) and np.isnan(out.accuracy)


def line(theta, x):
    """A linear model with one input and one output."""
    return x * theta["slope"] + theta["offset"]


LINE = Learner(
    line, bl.GradientDescent(0.1, 5), bl.Implicit(bl.CG(2)), 0.5, lambda outputs, y: jnp.square(outputs - y).mean()
)


def lines(count, value=2.0):
    """Return tasks of three points each, with the targets ``value``."""
    x, y = jnp.broadcast_to(jnp.arange(3.0)[:, None], (count, 3, 1)), jnp.full((count, 3, 1), value)
    return Task(x, y, x, y)


def test_outside_of_jit_a_batch_without_finite_numbers_gives_a_warning_and_the_value_nan():
    theta = {"slope": jnp.ones(()), "offset": jnp.zeros(())}
    for at_once in (1, 2):
        with pytest.warns(UserWarning, match="no task of the batch has finite numbers: the value is NaN"):
            out = meta_gradient(LINE, at_once=at_once)(theta, lines(2, jnp.nan))
        assert np.isnan(out.value) and np.isnan(out.accuracy) and not flat(out.gradient).any()


@pytest.mark.parametrize("entry", ["meta_gradient", "adapt"])
def test_a_thousand_calls_outside_of_jit_compile_once_and_keep_no_memory(entry, caplog):
    traces, theta, tasks = [], {"slope": jnp.ones(()), "offset": jnp.zeros(())}, lines(2)

    def traced_line(theta, x):
        traces.append(None)
        return line(theta, x)

    learner = replace(LINE, apply=traced_line)
    gradient, one = meta_gradient(learner), jax.tree.map(lambda array: array[0], tasks)
    call = {"meta_gradient": lambda: gradient(theta, tasks), "adapt": lambda: learner.adapt(theta, one)}[entry]
    counts = []
    for calls in (10, 10, 1000):
        with jax.log_compiles():
            for _ in range(calls):
                call()
        counts.append((len(traces), len(caplog.records), len(jax.live_arrays())))
        assert counts[-1] == counts[0]  # if every call compiled, this would fail after 20 calls already
    assert traces and caplog.records


@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
def test_zero_tasks_are_refused(wrap):
    with pytest.raises(imaml.InputError, match="the batch has 0 tasks: pass at least one"):
        wrap(meta_gradient(LINE))({"slope": jnp.ones(()), "offset": jnp.zeros(())}, lines(0))


@pytest.mark.slow("compiles a meta-gradient for each kind of number")
@pytest.mark.parametrize("slope, offset", [(2.0, 0.5), (2, 0.5), (2, np.float64(0.5)), (np.float64(2), np.array(0.5))])
def test_a_python_number_in_theta_counts_as_a_float(slope, offset):
    theta = {"slope": slope, "offset": offset}
    arrays = {"slope": jnp.array(2.0), "offset": jnp.array(0.5)}
    out, expected = (meta_gradient(LINE)(t, lines(2)) for t in (theta, arrays))
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    assert all(leaf.dtype == expected.value.dtype for leaf in jax.tree.leaves(out.gradient))
    task = jax.tree.map(lambda array: array[0], lines(1))
    jax.tree.map(np.testing.assert_array_equal, LINE.adapt(theta, task), LINE.adapt(arrays, task))


@pytest.mark.slow("compiles the meta-gradient for one and for two devices")
def test_two_devices_give_the_result_of_one(clean, softmax_theta, softmax_tasks):
    if jax.local_device_count() < 2:
        pytest.skip("needs two devices")
    gradient = meta_gradient(softmax_learner(20, bl.Implicit(bl.CG(4))), axis=AXIS)
    layout = MetaGradient(SHARED, SHARED, SHARED, SHARED, SPREAD, SPREAD, SPREAD)
    spread = jax.jit(over_tasks(gradient, local_mesh(2), layout))(softmax_theta, softmax_tasks)
    assert len(spread.status.sharding.device_set) == 2
    for name in ("value", "gradient", "accuracy", "tasks", "inner_residual", "linear_residual", "status"):
        # The two programs sum the eight tasks in different orders and round differently.
        np.testing.assert_allclose(flat(getattr(spread, name)), flat(getattr(clean, name)), rtol=1e-10, atol=100 * EPS)


@pytest.mark.slow("compiles a network in bfloat16")
def test_the_gradient_keeps_bfloat16_and_sums_are_accumulated_in_float32():
    learner = Learner(mlp((3, 2)).apply, bl.GradientDescent(0.1, 2), bl.Implicit(bl.CG(2)), strength=1.0)
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mlp((3, 2)).init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (300, 4, 3), jnp.bfloat16)
    y = jnp.tile(jnp.array([0, 1, 0, 1]), (300, 1))
    out = meta_gradient(learner)(theta, Task(x, y, x, y))
    assert {leaf.dtype for leaf in jax.tree.leaves(out.gradient)} == {jnp.dtype(jnp.bfloat16)}
    assert out.value.dtype == jnp.float32
    assert int(out.tasks) == 300  # a bfloat16 counter would stop at 256
