"""This library: programs that call ``imaml.meta_gradient`` and ``bl.value_and_hypergradient``."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from benchmarks.speed.workloads import FewShot, Linear
from imaml.learning.algorithms import Learner
from imaml.learning.meta_gradient import meta_gradient
from imaml.learning.networks import conv4
from imaml.learning.tasks import Task
from imaml.parallel.devices import AXIS, SHARED, global_mesh, over_tasks, use_all_cores


def programs(item, dtype: str):
    """Return the programs of a few-shot item (meta-gradient and its parts), or of a linear item (hypergradient)."""
    use_all_cores()
    jax.config.update("jax_enable_x64", dtype == "float64")
    return _few_shot(item, dtype) if isinstance(item, FewShot) else _linear(item, dtype)


def _few_shot(item: FewShot, dtype: str):
    arrays = item.arrays(dtype)
    y = jnp.tile(jnp.asarray(arrays["y"], jnp.int32), (item.tasks, 1))
    tasks = Task(jnp.asarray(arrays["support"]), y, jnp.asarray(arrays["query"]), y)
    theta = _nested(item.parameters(dtype))
    learner = learner_of(item)
    compiled, at_once = (jax.jit(meta_gradient(learner, at_once=number)) for number in (1, item.tasks))

    def meta(compiled):
        return _flat(jax.block_until_ready(compiled(theta, tasks)).gradient)

    programs = {"meta-gradient": lambda: meta(compiled), "all tasks at once": lambda: meta(at_once)}
    return programs | _spread(learner, theta, tasks, item.tasks) | _parts(learner, theta, tasks)


def learner_of(item: FewShot) -> Learner:
    """Return a learner with the item's network, inner solver, method and λ."""
    solver = bl.GradientDescent(item.rate, item.steps)
    return Learner(conv4(item.ways).apply, solver, bl.Implicit(bl.CG(item.products)), item.strength)


def _spread(learner, theta, tasks, count):
    """Return the program ``on all devices``, which divides the tasks among all devices, as `imaml train` does.

    The dictionary is empty if there is only one device, or if the number of devices does not divide ``count``.
    """
    if jax.device_count() == 1 or count % jax.device_count():
        return {}
    gradient = meta_gradient(learner, axis=AXIS)
    spread = jax.jit(over_tasks(lambda theta, tasks: gradient(theta, tasks).gradient, global_mesh(count), SHARED))
    return {"on all devices": lambda: _flat(jax.block_until_ready(spread(theta, tasks)))}


def _parts(learner, theta, tasks):
    """Return a program for each part of a meta-gradient, on the first task."""
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    condition = learner.problem.condition
    many = 20

    def residual(w):
        return condition.residual(w, theta, task)

    # Repeat in a compiled loop, as in the meta-gradient, so that the overhead of calls from Python is not timed.
    def repeated(function, w):
        return jax.lax.fori_loop(0, many, lambda _, w: jax.tree.map(lambda a, b: a - 1e-3 * b, w, function(w)), w)

    def products(w, count):
        product = jax.linearize(residual, w)[1]
        return jax.lax.fori_loop(0, count, lambda _, v: jax.tree.map(lambda a: 0.1 * a, product(v)), w)

    def outer(w):
        return jax.grad(lambda w: learner.problem.outer(w, theta, task)[0])(w)

    gradients = jax.jit(lambda w: repeated(residual, w))
    outers = jax.jit(lambda w: repeated(outer, w))
    one, more = (jax.jit(lambda w, n=n: products(w, n)) for n in (1, 1 + many))
    run = {"20 gradients": gradients, "20 outer gradients": outers, "linearise, 1": one, "linearise, 21": more}
    return {name: lambda f=f: (jax.block_until_ready(f(theta)), None)[1] for name, f in run.items()}


def memory(item: FewShot) -> int:
    """Return the bytes of temporary memory that XLA reports for the compiled meta-gradient, without running it."""
    shapes = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in item.parameters("float32").items()
    }
    x = jax.ShapeDtypeStruct((item.tasks, item.images, 28, 28, 1), jnp.float32)
    y = jax.ShapeDtypeStruct((item.tasks, item.images), jnp.int32)
    compiled = jax.jit(meta_gradient(learner_of(item))).lower(_nested(shapes), Task(x, y, x, y)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def _nested(parameters):
    found: dict = {}
    for name, value in parameters.items():
        group, leaf = name.split(".")
        found.setdefault(group, {})[leaf] = jnp.asarray(value) if isinstance(value, np.ndarray) else value
    return found


def _flat(parameters):
    return {
        f"{group}.{leaf}": np.asarray(value) for group, leaves in parameters.items() for leaf, value in leaves.items()
    }


def _linear(item: Linear, dtype: str):
    from benchmarks.speed.peers.linear_models import objective, validation

    data = {name: jnp.asarray(value) for name, value in item.arrays(dtype).items()}
    theta, init = data.pop("theta"), jnp.zeros(item.features, dtype)
    fit = bl.Stationary(lambda w, theta, data: objective(item.loss, w, theta, data), positive_definite=True)
    problem = bl.Problem(fit, lambda w, theta, data: validation(item.loss, w, data))
    solver = bl.GradientDescent(item.step_size, item.steps)
    hypergradient = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.CG(item.iterations, item.tol)))
    return {"hypergradient": lambda: {"theta": np.asarray(hypergradient(theta, init, data).gradient)}}
