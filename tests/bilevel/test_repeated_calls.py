"""Each entry point, called again and again with the same functions and shapes, compiles once and keeps no memory."""

import gc

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel as bl
from bilevel.testing import assert_hypergradient


@pytest.fixture
def compiled():
    """Return a list that gets an entry for each program that XLA compiles."""
    found: list[str] = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def resident_kilobytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4


def entries():
    """Return a list that grows with each trace, and a dict from the name of each entry point to a function of θ."""
    traces = []

    def objective(w, theta, data):
        traces.append(None)
        return 0.5 * jnp.sum((w - theta * data) ** 2)

    def outer(w, theta, data):
        traces.append(None)
        return jnp.sum(w**2)

    def residual(w, theta, data):
        traces.append(None)
        return w**3 - theta * data

    def on_samples(w, theta, samples):
        traces.append(None)
        return 0.5 * jnp.mean((w - theta * samples) ** 2)

    condition, init, data = bl.Stationary(objective), jnp.zeros(3), jnp.ones(3)
    problem, of_samples = bl.Problem(condition, outer), bl.Problem(bl.Stationary(on_samples), on_samples)
    solver, exact, lbfgs = bl.GradientDescent(0.5, 3), bl.GradientDescent(1.0, 1), bl.Jaxopt("LBFGS", maxiter=3)
    linear = bl.CG(2)
    method, optimizer, samples = bl.Implicit(linear), optax.sgd(0.1), jnp.linspace(0.5, 1.5, 8)
    methods = [method, bl.Implicit(bl.LU()), bl.Unrolled()]
    soba = bl.stochastic.SOBA(0.1, 0.1, 0.1, inner_batch=2, outer_batch=2)
    function = bl.value_and_hypergradient(problem, solver, method)
    many = jax.jit(jax.vmap(function, (None, None, 0)))
    layer = bl.implicit_layer(condition, solver, linear)

    @bl.custom_root(residual)
    def root(init, theta, data):
        return jnp.cbrt(theta * data)

    @bl.custom_fixed_point(lambda w, theta, data: 0.5 * w + residual(0.0, -theta, data))
    def fixed_point(init, theta, data):
        return 2 * theta * data

    def square(theta, w):
        return theta**2

    def strong_convexity(theta, data):
        return jnp.ones(())

    def wrong(*arguments):
        out = method(*arguments)
        return bl.Hypergradient(out.value, -out.gradient, out.aux, out.inner, out.linear)

    return traces, {
        "hypergradient": lambda theta: function(theta, init, data),
        "hypergradient with a start": lambda theta: function(theta, data=data, start=lambda theta, data: theta * data),
        "value": jax.grad(lambda theta: function(theta, init, data).value),
        "check_status": lambda theta: bl.check_status(many(theta, init, jnp.ones((4, 3)))),
        "solve": lambda theta: bl.solve(solver, condition, init, theta, data),
        "solve by jaxopt": lambda theta: bl.solve(lbfgs, condition, init, theta, data),
        "layer": lambda theta: layer(theta, init, data),
        "layer, differentiated": jax.grad(lambda theta: jnp.sum(layer(theta, init, data))),
        "custom_root": lambda theta: root(init, theta, data),
        "custom_root, differentiated": jax.grad(lambda theta: jnp.sum(root(init, theta + 1, data))),
        "custom_fixed_point": lambda theta: fixed_point(init, theta, data),
        "custom_fixed_point, differentiated": jax.grad(lambda theta: jnp.sum(fixed_point(init, theta, data))),
        "minimize": lambda theta: bl.minimize(problem, theta, init, data, exact, method, optimizer, 3),
        "minimize without warm starts": lambda theta: bl.minimize(
            problem, theta, None, data, exact, method, optimizer, 3, warm_start=False,
            start=lambda theta, data: theta * data),
        "stochastic.minimize": lambda theta: bl.stochastic.minimize(
            of_samples, theta, 0.0, samples, samples, soba, 4, evaluate=square, evaluate_every=2),
        "choose_linear": lambda theta: bl.choose_linear(condition, init, theta, data, damped=True),
        "certify": lambda theta: bl.certify(problem, theta, function(theta, init, data), data, strong_convexity),
        "check_condition": lambda theta: bl.check_condition(problem, theta, theta * data, data),
        "check_hypergradient": lambda theta: bl.check_hypergradient(problem, theta, init, data, exact, method),
        "check_hypergradient of a wrong gradient": lambda theta: bl.check_hypergradient(
            problem, theta + 1, init, data, solver, wrong),
        "compare_methods": lambda theta: bl.compare_methods(problem, theta, init, data, exact, methods, runs=1),
        "assert_hypergradient": lambda theta: assert_hypergradient(problem, theta, init, data, exact, method),
    }  # fmt: skip


@pytest.mark.slow("calls each entry point a thousand times", fast="custom_root")
@pytest.mark.parametrize("entry", entries()[1])
def test_a_thousand_calls_compile_once_and_keep_no_memory(entry, compiled):
    traces, calls = entries()
    call = calls[entry]

    def run(count):
        for number in range(count):
            call(jnp.asarray(float(number % 10)))
        gc.collect()
        return len(traces), len(compiled), len(jax.live_arrays())

    once, memory = run(10), resident_kilobytes()
    assert once[0] > 0 and once[1] > 0
    assert run(1000) == once
    assert resident_kilobytes() - memory < 4096  # one compiled program for each call would take far more
