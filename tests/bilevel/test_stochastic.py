"""The stochastic algorithms: one contract for all, closed forms, samplers, divergence, and several devices."""

import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import optimised
from jax.sharding import NamedSharding, PartitionSpec

import bilevel as bl
from bilevel.stochastic import F2SA, MASOBA, SABA, SOBA, SRBA, AmIGO, Power
from bilevel.stochastic.loop import advance
from bilevel.stochastic.samples import Samples, draw, permuted

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests'}",
    "PATH": "",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}
"""The environment of a process that imports this file."""
ALGORITHMS = {
    "SOBA": SOBA(0.1, 0.1, 0.05, inner_batch=6, outer_batch=8),
    "MASOBA": MASOBA(0.1, 0.1, 0.05, inner_batch=6, outer_batch=8),
    "SABA": SABA(0.1, 0.1, 0.05, inner_batch=6, outer_batch=8),
    "SRBA": SRBA(0.1, 0.1, 0.05, inner_batch=6, outer_batch=8),
    "AmIGO": AmIGO(0.1, 0.1, 0.05, inner_steps=2, linear_steps=3, inner_batch=6, outer_batch=8),
    "F2SA": F2SA(0.1, 0.05, penalty=50.0, inner_batch=6, outer_batch=8),
}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))


# --- A strongly convex quadratic whose samples have their own Hessians and cross matrices -------------------------


def inner_objective(w, theta, batch):
    hessians, crosses, shifts = batch
    linear = jnp.einsum("nij,j->ni", crosses, theta) + shifts
    return jnp.mean(0.5 * jnp.einsum("nij,i,j->n", hessians, w, w) - linear @ w)


def outer_objective(w, theta, batch):
    targets, centers = batch
    return 0.5 * jnp.mean(jnp.sum((w - targets) ** 2, -1) + jnp.sum((theta - centers) ** 2, -1))


QUADRATIC = bl.Problem(bl.Stationary(inner_objective), outer_objective)


@dataclass(frozen=True)
class Data:
    """Samples of the quadratic, and its solution in closed form."""

    inner: tuple
    outer: tuple

    @property
    def solution(self):
        hessian, cross, shift = (part.mean(0) for part in self.inner)
        target, center = (part.mean(0) for part in self.outer)
        slope, offset = np.linalg.solve(hessian, cross), np.linalg.solve(hessian, shift)
        theta = np.linalg.solve(slope.T @ slope + np.eye(len(slope.T)), slope.T @ (target - offset) + center)
        w = slope @ theta + offset
        return theta, w, np.linalg.solve(hessian.T, w - target)


def quadratic(inner=48, outer=40, dims=4, outer_dims=3, symmetric=True):
    random = np.random.default_rng(0)
    factors = random.normal(size=(inner, dims, dims)) / 2
    hessians = factors @ factors.transpose(0, 2, 1) + 0.5 * np.eye(dims)
    if not symmetric:
        skew = random.normal(size=(inner, dims, dims))
        hessians = hessians + skew - skew.transpose(0, 2, 1)
    crosses, shifts = random.normal(size=(inner, dims, outer_dims)), random.normal(size=(inner, dims))
    targets, centers = random.normal(size=(outer, dims)), random.normal(size=(outer, outer_dims))
    return Data((hessians, crosses, shifts), (targets, centers))


DATA = quadratic()
START = np.zeros(3), np.zeros(4)


def run(algorithm, steps=20, data=DATA, problem=QUADRATIC, start=START, **options):
    return bl.stochastic.minimize(problem, *start, data.inner, data.outer, algorithm, steps, **options)


def over_two_devices(data):
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    return Data(*jax.device_put((data.inner, data.outer), NamedSharding(mesh, PartitionSpec("devices"))))


def assert_equal_to_the_bit(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- The contract of every algorithm -------------------------------------------------------------------------------


@pytest.mark.slow("compiles each algorithm", fast=("SOBA", "SABA"))
@each_algorithm
def test_ten_steps_and_ten_more_equal_twenty_to_the_bit(algorithm):
    whole = run(algorithm, 20)
    half = run(algorithm, 10)
    saved = jax.tree.map(np.asarray, half.state)  # every leaf is an array
    resumed = run(algorithm, 10, evaluate_every=7, state=saved, start=(np.ones(3), np.ones(4)))
    assert_equal_to_the_bit(whole.state, resumed.state)
    # The state that was passed in is not donated.
    assert_equal_to_the_bit(resumed.state, run(algorithm, 10, state=half.state).state)
    assert int(whole.state.step) == 20


@pytest.mark.slow("compiles each algorithm", fast="SOBA")
@each_algorithm
def test_a_further_call_with_other_rates_and_budgets_traces_nothing(algorithm):
    traces = []

    def counted(w, theta, batch):
        traces.append(1)
        return inner_objective(w, theta, batch)

    problem = bl.Problem(bl.Stationary(counted), outer_objective)
    first = run(algorithm, 25, problem=problem, evaluate_every=10)
    count = len(traces)
    assert count > 0
    run(replace(algorithm, inner_rate=0.07), 13, problem=problem, evaluate_every=10, key=jax.random.key(3))
    run(algorithm, 4, problem=problem, evaluate_every=10, state=first.state)
    assert len(traces) == count


@pytest.mark.slow("compiles each algorithm in each precision", fast="float32-SOBA")
@each_algorithm
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_dtypes_are_kept_and_integer_leaves_of_theta_are_constants(algorithm, dtype):
    def inner(w, theta, batch):
        return inner_objective(w["w"], theta["theta"] * theta["two"].astype(dtype), batch[:3])

    def outer(w, theta, batch):
        return outer_objective(w["w"], theta["theta"], batch)

    problem = bl.Problem(bl.Stationary(inner), outer)
    data = Data(*jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (DATA.inner, DATA.outer)))
    labels = jnp.arange(48)  # an integer leaf of the samples
    start = {"theta": jnp.ones(3, dtype), "two": jnp.int32(2)}, {"w": jnp.ones(4, dtype)}
    found = run(algorithm, 5, replace(data, inner=(*data.inner, labels)), problem, start)
    assert found.theta["two"] == 2 and found.theta["two"].dtype == jnp.int32
    for part in (found.theta["theta"], found.w["w"], found.adjoint["w"]):
        assert part.dtype == dtype
    assert np.isfinite(found.theta["theta"]).all() and not np.allclose(found.theta["theta"], 1.0)


@each_algorithm
@pytest.mark.slow("takes 20,000 steps")
def test_theta_tends_to_the_closed_form(algorithm):
    theta, w, adjoint = DATA.solution
    if not isinstance(algorithm, SABA | SRBA):
        algorithm = replace(algorithm, inner_rate=Power(0.2, 0.5), outer_rate=Power(0.1, 0.5))
    found = run(algorithm, 20_000, evaluate=lambda theta, w: theta)
    exact = isinstance(algorithm, SABA | SRBA)
    tail = found.history.evaluations[-10:].mean(0)
    # The mean of ten evaluations has noise of about 0.01. The steps of SABA and SRBA lose their noise as they converge,
    # so only rounding is left.
    np.testing.assert_allclose(tail, theta, atol=1e-12 if exact else 0.03)
    if exact:
        np.testing.assert_allclose(found.w, w, atol=1e-12)
        np.testing.assert_allclose(found.adjoint, adjoint, atol=1e-12)


@pytest.mark.slow("compiles each algorithm", fast=("SOBA", "SABA"))
@each_algorithm
def test_batches_of_all_samples_find_the_closed_form(algorithm):
    theta, w, adjoint = DATA.solution
    found = run(replace(algorithm, inner_batch=48, outer_batch=40), 1500)
    # The penalty of F2SA is 50, so its error is about a fiftieth.
    tolerance = 0.02 if isinstance(algorithm, F2SA) else 1e-4
    np.testing.assert_allclose(found.theta, theta, atol=tolerance)
    np.testing.assert_allclose(found.w, w, atol=tolerance)
    np.testing.assert_allclose(found.adjoint, adjoint, atol=3 * tolerance)


@each_algorithm
@pytest.mark.slow("compiles each algorithm for one and for two devices")
def test_two_devices_agree_with_one_device_that_draws_two_shares(algorithm):
    sharded = over_two_devices(DATA)
    one, two = run(algorithm, 30, shares=2), run(algorithm, 30, sharded)
    for a, b in zip(jax.tree.leaves(one.state), jax.tree.leaves(two.state), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-12, atol=1e-13)
    assert not np.allclose(one.theta, run(algorithm, 30).theta, rtol=1e-3)  # with one share the batches are different
    resumed = run(algorithm, 10, sharded, state=jax.tree.map(np.asarray, run(algorithm, 20, sharded).state))
    assert_equal_to_the_bit(two.state, resumed.state)


@pytest.mark.slow("compiles each algorithm twice", fast="SRBA-*")
@pytest.mark.parametrize(
    ("inner_batch", "outer_batch", "sampling"),
    [(1, 3, "without_replacement"), (24, 20, "with_replacement")],
    ids=["many batches", "one batch"],
)
@each_algorithm
def test_devices_with_many_batches_or_one_and_an_integer_leaf_of_theta(algorithm, inner_batch, outer_batch, sampling):
    def with_scale(function):
        return lambda w, theta, batch: function(w, theta["count"].astype(float) * theta["x"], batch)

    problem = bl.Problem(bl.Stationary(with_scale(inner_objective)), with_scale(outer_objective))
    start = {"x": np.zeros(3), "count": np.int32(2)}, np.zeros(4)
    algorithm = replace(algorithm, inner_batch=inner_batch, outer_batch=outer_batch, sampling=sampling)
    one = run(algorithm, 30, problem=problem, start=start, shares=2, on_failure="ignore")
    two = run(algorithm, 30, over_two_devices(DATA), problem=problem, start=start, on_failure="ignore")
    assert one.theta["count"] == two.theta["count"] == 2
    np.testing.assert_allclose(two.theta["x"], one.theta["x"], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(two.w, one.w, rtol=1e-11, atol=1e-13)


PROCESS = """
import pickle, sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import test_stochastic as t
mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = t.NamedSharding(mesh, t.PartitionSpec("devices"))
def spread(array):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
data = t.Data(*jax.tree.map(spread, (t.DATA.inner, t.DATA.outer)))
first = t.run(t.ALGORITHMS["SABA"], 20, data)
found = t.run(t.ALGORITHMS["SABA"], 10, data, state=first.state, measure=True)
arrays = [found.theta.addressable_data(0), found.w.addressable_data(0), found.history.gradient_norm]
pickle.dump([t.np.asarray(array) for array in arrays], open(sys.argv[3], "wb"))
"""


@pytest.mark.slow("starts two processes, which compile an algorithm")
def test_two_processes_agree_with_one_process_that_draws_two_shares(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path / "0", tmp_path / "1"]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, address, str(k), str(file)], env=ENVIRONMENT)
        for k, file in enumerate(files)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    first, second = (pickle.loads(file.read_bytes()) for file in files)
    assert_equal_to_the_bit(first, second)
    one = run(ALGORITHMS["SABA"], 10, shares=2, state=run(ALGORITHMS["SABA"], 20, shares=2).state, measure=True)
    for ours, theirs in zip((one.theta, one.w, one.history.gradient_norm), first, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


RESUME = """
import pickle, sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)
import test_stochastic as t
states = pickle.load(open(sys.argv[1], "rb"))
found = {name: t.run(t.ALGORITHMS[name], 10, state=state).state for name, state in states.items()}
pickle.dump(jax.tree.map(t.np.asarray, found), open(sys.argv[1], "wb"))
"""


@pytest.mark.slow("starts another process, which compiles every algorithm")
def test_another_process_resumes_to_the_bit(tmp_path):
    file = tmp_path / "states"
    saved = {name: jax.tree.map(np.asarray, run(algorithm, 10).state) for name, algorithm in ALGORITHMS.items()}
    file.write_bytes(pickle.dumps(saved))
    subprocess.run(
        [sys.executable, "-c", RESUME, str(file)],
        env=ENVIRONMENT,
        check=True,
        timeout=300,
    )
    for name, state in pickle.loads(file.read_bytes()).items():
        assert_equal_to_the_bit(jax.tree.map(np.asarray, run(ALGORITHMS[name], 20).state), state)


# --- Closed forms --------------------------------------------------------------------------------------------------


def test_a_step_on_all_samples_equals_its_closed_form():
    data = quadratic(symmetric=False)
    root = bl.Root(lambda w, theta, batch: jnp.mean(batch[0] @ w - batch[1] @ theta - batch[2], axis=0))
    random = np.random.default_rng(1)
    theta, w, adjoint = random.normal(size=3), random.normal(size=4), random.normal(size=4)
    algorithm = SOBA(0.1, 0.2, 0.3, inner_batch=48, outer_batch=40)
    first = run(algorithm, 0, data, bl.Problem(root, outer_objective), (theta, w)).state
    found = run(algorithm, 1, data, bl.Problem(root, outer_objective), state=replace(first, adjoint=adjoint))
    matrix, cross, shift = (part.mean(0) for part in data.inner)
    target, center = (part.mean(0) for part in data.outer)
    np.testing.assert_allclose(found.w, w - 0.1 * (matrix @ w - cross @ theta - shift), atol=1e-13)
    np.testing.assert_allclose(found.adjoint, adjoint - 0.2 * (matrix.T @ adjoint - (w - target)), atol=1e-13)
    # The derivative of the residual in θ is −cross, so the direction of θ is theta − center + crossᵀ·adjoint.
    np.testing.assert_allclose(found.theta, theta - 0.3 * (theta - center + cross.T @ adjoint), atol=1e-13)


def test_the_adjoint_and_the_gradient_norm_equal_those_of_value_and_hypergradient():
    found = run(replace(ALGORITHMS["SABA"], outer_rate=0.0), 4000, measure=True)
    inner = bl.Stationary(lambda w, theta, data: inner_objective(w, theta, data[0]))
    exact = bl.value_and_hypergradient(
        bl.Problem(inner, lambda w, theta, data: outer_objective(w, theta, data[1])),
        bl.GradientDescent(0.2, max_steps=2000),
        bl.Implicit(bl.LU()),
    )
    out = exact(START[0], START[1], (DATA.inner, DATA.outer))
    np.testing.assert_allclose(found.adjoint, out.linear.solution, atol=1e-10)
    np.testing.assert_allclose(found.history.gradient_norm[-1], np.linalg.norm(out.gradient), rtol=1e-10)


BIASED = bl.Problem(
    bl.Stationary(lambda w, theta, a: jnp.mean(a * (0.5 * w**2 - theta * w))),
    lambda w, theta, a: 0.5 * (w - 1) ** 2 + 0.5 * theta**2,
)
NOISE = np.tile([0.0, 2.0], 1024)


@pytest.mark.slow("takes 60,000 steps", fast="SOBA-0.5")
@pytest.mark.parametrize("rate", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("kind", [SOBA, MASOBA, SABA], ids=lambda kind: kind.__name__)
def test_noise_that_hessian_and_cross_derivative_share_does_not_bias_theta(kind, rate):
    # A loop that updates w, then v at the new w, then θ with the new v, is biased: at the rate ρ, its θ tends to
    # (1 − ρ)/(2 − ρ).
    algorithm = kind(rate, rate, 0.01, inner_batch=1, outer_batch=1)
    minimize = partial(bl.stochastic.minimize, BIASED, 0.5, 0.5, NOISE, NOISE, algorithm)
    first = minimize(10_000, evaluate=theta_itself, evaluate_every=50)
    found = minimize(50_000, evaluate=theta_itself, evaluate_every=50, state=first.state)
    assert abs(found.history.evaluations.mean() - 0.5) < 0.005


def theta_itself(theta, w):
    return theta


def test_f2sa_follows_two_variables_with_one_inner_step():
    diagonal = jnp.array([1.0, 4.0])
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, batch: jnp.mean(batch) * (0.5 * w @ (diagonal * w) - w @ theta)),
        lambda w, theta, batch: 0.5 * jnp.sum((w - jnp.array([1.0, -2.0])) ** 2) + 0.5 * jnp.sum(theta**2),
    )
    # θ minimises ½(θ/d − c)² + ½θ² in each variable.
    exact = np.array([1.0, -2.0]) / diagonal / (1 / diagonal**2 + 1)
    errors = []
    for penalty in (10.0, 100.0, 1000.0):
        algorithm = F2SA(0.2, 0.1, penalty)
        ones = np.ones(64)
        theta = bl.stochastic.minimize(problem, np.zeros(2), np.zeros(2), ones, ones, algorithm, 3000).theta
        errors.append(np.linalg.norm(theta - exact) / np.linalg.norm(exact))
    assert errors[1] < 0.01 and errors[0] > 5 * errors[1] > 25 * errors[2]


# --- Samplers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow("draws many orders", fast=("5", "17"))
@pytest.mark.parametrize("count", [1, 2, 5, 17, 100])
def test_a_random_order_has_every_batch_once_and_in_each_place_equally_often(count):
    keys = jax.random.split(jax.random.key(0), 2000)
    orders = jax.vmap(lambda key: jax.vmap(lambda place: permuted(key, place, count))(jnp.arange(count)))(keys)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(count), (2000, 1)))
    frequencies = np.stack([np.bincount(place, minlength=count) for place in np.asarray(orders).T])
    chi_squared = np.sum((frequencies - 2000 / count) ** 2) / (2000 / count)
    freedom = (count - 1) ** 2
    assert chi_squared <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement"])
def test_every_batch_is_drawn_equally_often(sampling):
    samples = Samples(jnp.zeros(23), 23, 5)
    numbers = jax.jit(lambda key: draw(samples, sampling, key, jnp.arange(100_000, dtype=jnp.uint32)))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(np.bincount(numbers) / 100_000, 1 / 5, atol=0.006)


@pytest.mark.parametrize("size", [20, 18])
def test_draws_without_replacement_visit_every_batch_once_in_an_epoch(size):
    samples = Samples(jnp.zeros(size), size, 5)
    numbers = draw(samples, "without_replacement", jax.random.key(0), jnp.arange(40, dtype=jnp.uint32))
    np.testing.assert_array_equal(np.sort(numbers.reshape(10, 4), axis=1), np.tile(np.arange(4), (10, 1)))


@pytest.mark.parametrize(("size", "width"), [(5, 1), (23, 1), (16_384 + 17, 1), (300, 2000)])
def test_the_mean_over_all_samples_and_the_mean_over_the_batches_are_exact(size, width):
    # On a CPU, a pass takes slices of at most 16,384 samples and of at most 2 MiB: 131 samples of 2,000 float64.
    data = jnp.asarray(np.random.default_rng(0).normal(size=(size, width)))
    samples = Samples(data, size, min(5, size))
    np.testing.assert_allclose(samples.mean(jnp.mean), data.mean(), atol=1e-14)

    terms = jax.lax.map(partial(samples.on_batch, jnp.mean), jnp.arange(samples.batches, dtype=jnp.int32))
    np.testing.assert_allclose(jnp.mean(terms), data.mean(), atol=1e-14)


@pytest.mark.slow("takes thousands of steps", fast="SABA-with_replacement")
@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement"])
@pytest.mark.parametrize("kind", [SABA, SRBA], ids=["SABA", "SRBA"])
def test_a_last_batch_of_another_size_does_not_move_the_solution(kind, sampling):
    algorithm = kind(0.1, 0.1, 0.05, inner_batch=7, outer_batch=9, sampling=sampling)
    np.testing.assert_allclose(run(algorithm, 6000).theta, DATA.solution[0], atol=1e-8)


@pytest.mark.slow("compiles each algorithm twice", fast="*SABA*")
@pytest.mark.parametrize(("shares", "inner_batch", "outer_batch"), [(1, 7, 13), (2, 3, 10)])
@each_algorithm
def test_steps_without_a_branch_for_the_smaller_batch_equal_steps_with_it(algorithm, shares, inner_batch, outer_batch):
    class WithBranch(type(algorithm)):
        """A subclass does not inherit the declaration ``evaluates_only_draws``."""

    settings = {item.name: getattr(algorithm, item.name) for item in fields(algorithm)}
    settings |= {"inner_batch": inner_batch, "outer_batch": outer_batch}
    data = Data(*jax.tree.map(lambda leaf: leaf[:38], (DATA.inner, DATA.outer)))
    assert 38 // shares % inner_batch and 38 // shares % outer_batch
    found, expected = (run(kind(**settings), 50, data, shares=shares) for kind in (type(algorithm), WithBranch))
    np.testing.assert_allclose(found.theta, expected.theta, rtol=1e-12)
    np.testing.assert_allclose(found.w, expected.w, rtol=1e-12)


def test_an_algorithm_may_evaluate_batches_that_are_not_drawn():
    class AllBatches(SOBA):
        def step(self, oracle, state, draws):
            numbers = jnp.arange(oracle.inner_samples.batches)
            inner = jax.lax.map(lambda k: oracle.inner(k, state.w, state.adjoint, state.theta), numbers)
            outer = oracle.outer(draws.outer[0], state.w, state.theta)
            moves = bl.stochastic.directions(jax.tree.map(lambda leaf: leaf.mean(0), inner), outer)
            theta, optimizer = oracle.move_theta(self.outer_rate, state, moves.theta)
            return replace(bl.stochastic.soba.move_inner(self, state, moves), theta=theta, optimizer=optimizer)

    class SaysSo(AllBatches):
        @property
        def evaluates_only_draws(self):
            return False

    rates = 0.1, 0.1, 0.05
    expected = run(SOBA(*rates, inner_batch=48, outer_batch=40), 30).theta
    for kind in (AllBatches, SaysSo):
        found = run(kind(*rates, inner_batch=7, outer_batch=40), 30)
        np.testing.assert_allclose(found.theta, expected, rtol=1e-12)


# --- Tables --------------------------------------------------------------------------------------------------------


def test_tables_above_the_memory_limit_are_refused_with_their_size_in_bytes():
    # 8 + 4 inner rows of (4 + 4 + 3) and 5 + 4 outer rows of (4 + 3) numbers of 8 bytes.
    needed = 12 * 8 * 11 + 9 * 8 * 7
    found = run(SABA(0.1, 0.1, 0.05, inner_batch=6, outer_batch=8, memory_limit=needed), 1)
    places = sum(table.place.nbytes for table in found.state.tables)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(found.state.tables)) == needed + places
    with pytest.raises(ValueError, match=rf"need {needed:,} bytes.*limit is {needed - 1:,}: use larger batches"):
        run(SABA(0.1, 0.1, 0.05, inner_batch=6, outer_batch=8, memory_limit=needed - 1), 1)


def test_the_tables_of_all_shares_have_to_fit():
    needed = 2 * (8 * 8 * 11 + 8 * 8 * 7)  # each share has 24 inner and 20 outer samples
    algorithm = SABA(0.1, 0.1, 0.05, inner_batch=6, outer_batch=6, memory_limit=needed)
    run(algorithm, 1, shares=2)
    with pytest.raises(ValueError, match=rf"need {needed:,} bytes"):
        run(replace(algorithm, memory_limit=needed - 1), 1, shares=2)


def test_a_table_is_updated_in_place(monkeypatch):
    calls = []

    def spy(*arguments, **options):
        calls.append(advance.lower(*arguments, **options).compile())
        return advance(*arguments, **options)

    monkeypatch.setattr("bilevel.stochastic.driver.advance", spy)
    data = quadratic(inner=5000, outer=5000)
    with optimised():  # XLA updates the table in place only with the optimisations that quick_compilation disables
        found = run(SABA(0.1, 0.1, 0.05, inner_batch=1, outer_batch=1), 1, data, evaluate_every=10)
    tables = sum(leaf.nbytes for leaf in jax.tree.leaves(found.state.tables))
    memory = calls[0].memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * tables
    assert memory.temp_size_in_bytes < 0.05 * tables


@pytest.mark.parametrize("shares", [1, 2])
def test_the_mean_of_a_table_has_no_growing_rounding_error(shares):
    data = Data(*jax.tree.map(lambda leaf: leaf.astype(np.float32), (DATA.inner, DATA.outer)))
    start = np.zeros(3, np.float32), np.zeros(4, np.float32)
    with optimised():  # an optimising compiler must not remove the compensation
        found = run(ALGORITHMS["SABA"], 40_000, data, start=start, shares=shares, evaluate_every=40_000)
    for table in found.state.tables:
        for rows, mean in zip(*map(jax.tree.leaves, (table.rows, table.mean)), strict=True):
            np.testing.assert_allclose(mean, np.mean(rows, 1, dtype=np.float64), rtol=2e-7, atol=2e-8)


# --- Divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.slow("compiles each algorithm", fast="SOBA")
@each_algorithm
def test_a_divergence_is_reported_and_the_last_finite_state_is_kept(algorithm):
    with pytest.raises(bl.HypergradientError, match=r"stochastic loop, .*inner_rate=3\.0") as caught:
        run(replace(algorithm, inner_rate=3.0), 5000, evaluate_every=20)
    found = caught.value.result
    assert not bl.Status(int(found.status)).ok
    assert np.isfinite(found.theta).all() and np.isfinite(found.w).all()
    assert int(found.state.step) < int(found.history.step[-1]) <= 400
    # The last finite state can be used again, with another rate.
    again = run(algorithm, 2000, state=found.state)
    assert bl.Status(int(again.status)).ok and np.linalg.norm(again.theta - DATA.solution[0]) < 0.5


def test_srba_begins_with_a_pass_over_all_samples_after_a_divergence():
    algorithm = SRBA(0.1, 0.1, 0.05, period=20, inner_batch=6, outer_batch=8)
    kept = run(replace(algorithm, inner_rate=3.0), 5000, evaluate_every=7, on_failure="ignore").state
    assert int(kept.step) % 20 != 0
    hessian, cross, shift = (part.mean(0) for part in DATA.inner)
    after = run(algorithm, 1, state=kept)
    np.testing.assert_allclose(after.w, kept.w - 0.1 * (hessian @ kept.w - cross @ kept.theta - shift), rtol=1e-9)


def test_on_failure_warns_or_ignores():
    algorithm = replace(ALGORITHMS["SOBA"], inner_rate=3.0)
    with pytest.warns(RuntimeWarning, match="stochastic loop"):
        warned = run(algorithm, 1000, evaluate_every=50, on_failure="warn")
    ignored = run(algorithm, 1000, evaluate_every=50, on_failure="ignore")
    assert_equal_to_the_bit(warned.state, ignored.state)
    assert not bl.Status(int(ignored.status)).ok


def test_saba_diverges_late_where_soba_is_stable_and_reports_it():
    algorithm = SABA(1.0, 1.0, 0.01, inner_batch=1, outer_batch=1)
    minimize = partial(bl.stochastic.minimize, BIASED, 0.5, 0.5, NOISE, NOISE)
    with pytest.raises(bl.HypergradientError, match="BREAKDOWN"):
        minimize(algorithm, 20_000)
    assert bl.Status(int(minimize(SOBA(0.9, 0.9, 0.01, inner_batch=1, outer_batch=1), 20_000).status)).ok


def test_a_nan_is_reported_at_the_next_evaluation():
    poisoned = replace(DATA, inner=(*DATA.inner[:2], np.where(np.arange(192).reshape(48, 4) == 190, np.nan, 0.0)))
    with pytest.raises(bl.HypergradientError, match="NONFINITE") as caught:
        run(replace(ALGORITHMS["SOBA"], sampling="without_replacement"), 50, poisoned, evaluate_every=8)
    assert caught.value.result.history.step[-1] == 8  # eight batches are an epoch


def test_measured_norms_are_those_over_all_samples():
    found = run(ALGORITHMS["SOBA"], 7, measure=True, evaluate_every=4)
    hessian, cross, shift = (part.mean(0) for part in DATA.inner)
    target, center = (part.mean(0) for part in DATA.outer)
    history = found.history
    np.testing.assert_array_equal(history.step, [4, 7])
    w, v, theta = found.w, found.adjoint, found.theta
    norm = np.linalg.norm
    np.testing.assert_allclose(history.residual_norm[-1], norm(hessian @ w - cross @ theta - shift), rtol=1e-12)
    np.testing.assert_allclose(history.adjoint_norm[-1], norm(hessian @ v - (w - target)), rtol=1e-12)
    np.testing.assert_allclose(history.gradient_norm[-1], norm(theta - center + cross.T @ v), rtol=1e-12)


# --- Options -------------------------------------------------------------------------------------------------------


def test_evaluations_are_stacked():
    found = run(ALGORITHMS["SOBA"], 25, evaluate=lambda theta, w: {"sum": jnp.sum(theta)}, evaluate_every=10)
    np.testing.assert_array_equal(found.history.step, [10, 20, 25])
    assert found.history.evaluations["sum"].shape == (3,)
    np.testing.assert_allclose(found.history.evaluations["sum"][-1], np.sum(found.theta))
    empty = run(ALGORITHMS["SOBA"], 0, evaluate=lambda theta, w: {"sum": jnp.sum(theta)})
    assert empty.history.evaluations["sum"].shape == (0,)


def test_theta_stays_in_its_set():
    found = run(replace(ALGORITHMS["SABA"], outer_rate=0.05), 4000, project=lambda theta: jnp.maximum(theta, 0.1))
    assert found.theta.min() == 0.1 and DATA.solution[0].min() < 0.1


@pytest.mark.parametrize(
    ("name", "transformation"), [("SABA", optax.adam(0.02)), ("MASOBA", optax.sgd(0.02, momentum=0.5))]
)
def test_an_optax_transformation_moves_theta(name, transformation):
    algorithm = replace(ALGORITHMS[name], outer_rate=transformation, inner_batch=48, outer_batch=40)
    whole = run(algorithm, 3000)
    np.testing.assert_allclose(whole.theta, DATA.solution[0], atol=1e-3)
    resumed = run(algorithm, 1000, state=jax.tree.map(np.asarray, run(algorithm, 2000).state))
    assert_equal_to_the_bit(whole.state, resumed.state)


def test_sgd_of_optax_equals_a_rate():
    first = run(replace(ALGORITHMS["SOBA"], outer_rate=optax.sgd(0.05)), 50)
    np.testing.assert_allclose(first.theta, run(ALGORITHMS["SOBA"], 50).theta, rtol=1e-12)


def test_a_rate_may_be_a_function_of_the_step():
    falling = replace(ALGORITHMS["SOBA"], inner_rate=Power(0.2, 0.5), outer_rate=lambda step: 0.1 / (step + 1) ** 0.5)
    other = replace(ALGORITHMS["SOBA"], inner_rate=lambda step: 0.2 / (step + 1) ** 0.5, outer_rate=Power(0.1, 0.5))
    np.testing.assert_allclose(run(falling, 30).theta, run(other, 30).theta, rtol=1e-12)


@pytest.mark.slow("compiles the estimates for each algorithm")
@pytest.mark.parametrize("kind", [SOBA, SABA, SRBA, AmIGO, F2SA], ids=lambda kind: kind.__name__)
def test_rates_that_are_left_out_are_chosen_and_reported(kind):
    found = run(kind(inner_batch=48, outer_batch=40), 2000)
    np.testing.assert_allclose(found.theta, DATA.solution[0], atol=0.02)
    chosen = found.algorithm.inner_rate
    first = chosen if isinstance(chosen, float) else chosen.rate
    largest = np.linalg.eigvalsh(DATA.inner[0].mean(0))[-1]
    np.testing.assert_allclose(first, 1 / ((3 if kind in (SABA, SRBA) else 2) * largest), rtol=1e-6)
    given = run(replace(kind(), inner_rate=0.01), 1).algorithm
    assert given.inner_rate == 0.01 and getattr(given, "linear_rate", 0.01) == 0.01 and given.outer_rate is not None


@pytest.mark.parametrize("kind", ["SOBA", "SRBA"])
def test_the_gradient_as_a_root_gives_the_steps_of_the_objective(kind):
    # An objective has forward over reverse mode, and a root a vector-Jacobian product.
    as_root = bl.Problem(bl.Root(jax.grad(inner_objective)), outer_objective)
    first, second = (run(ALGORITHMS[kind], problem=problem) for problem in (QUADRATIC, as_root))
    for a, b in zip((first.theta, first.w, first.adjoint), (second.theta, second.w, second.adjoint), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_an_objective_without_forward_mode_takes_the_same_steps():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (square(x), x), lambda x, slope: (2 * x * slope,))

    def run_on(function):
        problem = bl.Problem(
            bl.Stationary(lambda w, theta, x: 0.5 * jnp.mean(function(w - theta * x))),
            lambda w, theta, y: 0.5 * jnp.mean((w - y) ** 2),
        )
        ones = np.ones(12)
        return bl.stochastic.minimize(problem, 0.5, 0.2, ones, 3 * ones, SOBA(0.1, 0.1, 0.1, 4, 4), 20).theta

    np.testing.assert_allclose(run_on(square), run_on(lambda x: x**2), rtol=1e-13)


def test_a_batch_a_little_smaller_than_all_samples_allows_usual_rates():
    x = np.random.default_rng(0).normal(size=(65, 3))
    rate = 1.2 / (np.linalg.eigvalsh(x.T @ x / 65)[-1] + 0.1)
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, x: 0.5 * jnp.mean((x @ w - 1) ** 2) + 0.05 * theta**2 * w @ w),
        lambda w, theta, x: 0.5 * jnp.mean((x @ w - 1) ** 2),
    )
    found = bl.stochastic.minimize(problem, 1.0, np.zeros(3), x, x, SOBA(rate, rate, 0.01), 500)
    assert found.status == bl.Status.BUDGET_USED


def test_an_algorithm_of_ones_own():
    @dataclass(frozen=True)
    class Plain:
        rate: float
        inner_batch: int = 48
        outer_batch: int = 40
        sampling: str = "with_replacement"
        draws = (1, 1)

        def init(self, oracle, state):
            return state

        def step(self, oracle, state, draws):
            inner = oracle.inner(draws.inner[0], state.w, state.adjoint, state.theta)
            outer = oracle.outer(draws.outer[0], state.w, state.theta)
            moves = bl.stochastic.directions(inner, outer)
            w, adjoint = bl.stochastic.descend((state.w, state.adjoint), self.rate, (moves.w, moves.adjoint))
            theta, optimizer = oracle.move_theta(self.rate, state, moves.theta)
            return replace(state, w=w, adjoint=adjoint, theta=theta, optimizer=optimizer)

    soba = SOBA(0.05, 0.05, 0.05, inner_batch=48, outer_batch=40)
    np.testing.assert_allclose(run(Plain(0.05), 40).theta, run(soba, 40).theta, rtol=1e-13)


def test_classes_with_equal_fields_do_not_share_a_program():
    def algorithm(shift):
        @jax.tree_util.register_dataclass
        @dataclass(frozen=True)
        class Shift:
            rate: float
            inner_batch: int = field(default=48, metadata={"static": True})
            outer_batch: int = field(default=40, metadata={"static": True})
            sampling: str = field(default="with_replacement", metadata={"static": True})
            draws = (1, 1)

            def init(self, oracle, state):
                return state

            def step(self, oracle, state, draws):
                return replace(state, theta=state.theta + shift)

        return Shift(0.1)

    # JAX compares the tree structures of the two classes as equal, because their fields are equal.
    assert [float(run(algorithm(shift), 1).theta[0]) for shift in (1.0, 2.0)] == [1.0, 2.0]


# --- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps ≥ 0"),
        ({"evaluate_every": 0}, "evaluate_every ≥ 1"),
        ({"on_failure": "stop"}, "on_failure must be"),
        ({"shares": 5}, "48 inner samples cannot be divided into shares=5"),
        ({"data": Data((np.zeros(3), np.zeros(4)), DATA.outer)}, "one common leading axis"),
        ({"data": Data((np.zeros(0),), DATA.outer)}, "one common leading axis"),
        ({"algorithm": SOBA(-0.1, 0.1, 0.1)}, "inner_rate must be a finite number"),
        ({"algorithm": SOBA(0.1, 0.1, 0.1, inner_batch=0)}, "inner_batch must be at least 1"),
        ({"algorithm": SOBA(0.1, 0.1, 0.1, sampling="random")}, "sampling must be"),
        ({"algorithm": F2SA(0.1, 0.1, penalty=0.0)}, "penalty must be a finite number above 0, or a function"),
        ({"algorithm": F2SA(0.1, 0.1, penalty=np.inf)}, "penalty must be a finite number above 0, or a function"),
        (
            {"algorithm": MASOBA(0.1, 0.1, 0.1, averaging=2.0)},
            "averaging must be a finite number above 0 and at most 1",
        ),
    ],
)
def test_arguments_that_are_refused(change, message):
    options = {"algorithm": ALGORITHMS["SOBA"], "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: F2SA(inner_steps=0), "F2SA needs inner_steps of at least 1, got 0"),
        (lambda: AmIGO(linear_steps=-1), "AmIGO needs linear_steps of at least 1, got -1"),
        (lambda: SRBA(period=0), "SRBA needs period of at least 1, got 0"),
    ],
)
def test_numbers_of_steps_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arguments_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"minimize needs an algorithm, got SOBA: pass an instance, such as SOBA\(\)"):
        run(SOBA)
    with pytest.raises(TypeError, match="minimize needs an algorithm, got str"):
        run("SOBA")
    with pytest.raises(TypeError, match=r"minimize needs a problem, got function: pass Problem\(condition, outer\)"):
        run(ALGORITHMS["SOBA"], problem=outer_objective)


def test_conditions_that_are_refused():
    root = bl.Problem(bl.Root(lambda w, theta, batch: w), outer_objective)
    with pytest.raises(
        ValueError, match="F2SA needs a condition that is the gradient of an objective, and Root is not"
    ):
        run(ALGORITHMS["F2SA"], problem=root)
    projected = bl.Problem(bl.Projected(inner_objective, lambda w, theta, data: jnp.maximum(w, 0.0)), outer_objective)
    with pytest.raises(ValueError, match="Projected is not a mean over samples"):
        run(ALGORITHMS["SOBA"], problem=projected)
    whole = replace(ALGORITHMS["SOBA"], inner_batch=48)
    with pytest.raises(ValueError, match="use one share on one device"):
        run(whole, problem=projected, shares=2)
    with pytest.raises(ValueError, match="only outer_rate may be one"):
        run(replace(whole, inner_rate=optax.sgd(0.1)))
    found = run(whole, 500, problem=projected)
    assert found.w.min() > -0.01  # the steps along −(w − P(…)) lead w into the set


def test_a_state_of_another_algorithm_is_refused():
    state = run(ALGORITHMS["SABA"], 1).state
    with pytest.raises(ValueError, match="the state does not belong"):
        run(ALGORITHMS["SOBA"], 1, state=state)
