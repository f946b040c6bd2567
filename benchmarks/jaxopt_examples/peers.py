"""The programs of examples/from_jaxopt/ in jaxopt's API: the same data, models, numbers of steps and optimisers.

They follow jaxopt's own examples. An outer loop calls ``OptaxSolver.update`` from Python and, where jaxopt's example
does so, starts each inner solve from the previous solution. Some settings differ from jaxopt's examples, so that both
libraries take the same inner steps or stop by the same rule: step sizes are fixed, and ``tol`` is that of our example,
or 0 to spend the budget. For projections and proximal steps, jaxopt compares the residual divided by the step size with
``tol``, so ``tol`` is divided by the step size too.

Each function takes the module of our example and its data, and returns ``run(variant) -> outer values``. A variant is

- ``PROGRAM``: as in jaxopt's examples of ridge regression, the lasso and MAML, the program calls ``init_state``, which
  evaluates the outer function, and then ``update``, in which only the derivative is compiled.
- ``COMPILED``: the same, with ``update`` compiled as a whole.
- ``UPDATES``: as ``COMPILED``, and all runs share one start and the state of one call of ``init_state``.
"""

import functools
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt
    from jaxopt import implicit_diff, linear_solve

PROGRAM, COMPILED, UPDATES = "jaxopt", "jaxopt, jit(update)", "jaxopt, jit(update) alone"
"""The variants of a program in jaxopt."""
EQUILIBRIUM_STEPS = 20
"""Number of training steps of the equilibrium model. The example takes more."""


def _runner(outer, optimizer, theta, w, steps, data, warm_start=True):
    """Return ``run(variant)`` for an outer function ``outer(theta, init, data) -> (value, w)``.

    ``theta`` is the start, or a function that returns it.
    """
    solver = jaxopt.OptaxSolver(outer, optimizer, has_aux=True)
    compiled = jax.jit(solver.update)  # kept for all runs, so that only the first one compiles

    def beginning():
        first = theta() if callable(theta) else theta
        return first, solver.init_state(first, w, data(0))

    kept_beginning = functools.cache(beginning)

    def run(variant):
        update = solver.update if variant == PROGRAM else compiled
        current, state = kept_beginning() if variant == UPDATES else beginning()
        start, values = w, []
        for k in range(steps):
            current, state = update(current, state, start, data(k))
            start = state.aux if warm_start else start
            values.append(state.value)
        return jnp.stack(values)

    return run


def ridge(ours, data):
    @implicit_diff.custom_root(jax.grad(ours.fit))
    def solve(init, theta, data):
        x, _, y, _ = data
        penalty = len(y) * jnp.exp(theta)
        return linear_solve.solve_cg(lambda u: x.T @ (x @ u), x.T @ y, ridge=penalty, init=init, maxiter=20)

    def outer(theta, init, data):
        w = solve(init, theta, data)
        return ours.error(w, theta, data), w

    return _runner(outer, optax.adam(1e-2), 1.0, jnp.zeros(10), 50, lambda k: data)


def lasso(ours, data):
    def fit(w, data):
        return ours.fit(w, None, data)

    solver = jaxopt.ProximalGradient(fit, jaxopt.prox.prox_lasso, stepsize=2.0, maxiter=500, tol=1e-3 / 2.0)

    def outer(theta, init, data):
        w = solver.run(init, jnp.exp(theta), data).params
        return ours.error(w, theta, data), w

    return _runner(outer, optax.adam(1e-2), 1.0, jnp.zeros(10), 10, lambda k: data)


def svm_dual(ours, data):
    def project(beta, _):
        return jax.vmap(jaxopt.projection.projection_simplex)(beta)

    solver = jaxopt.ProjectedGradient(ours.dual, project, stepsize=0.1, maxiter=500, tol=1e-4 / 0.1)

    def outer(theta, init, data):
        beta = solver.run(init, None, theta, data).params
        return ours.error(beta, theta, data), beta

    return _runner(outer, optax.adam(0.1), 3.0, data[1], 30, lambda k: data)


def distillation(ours, data):
    theta = jnp.asarray(np.random.default_rng(0).normal(size=(10, 64)) / 64, jnp.float32)
    solver = jaxopt.GradientDescent(
        ours.fit, stepsize=0.5, maxiter=100, tol=0.0, acceleration=False,
        implicit_diff_solve=partial(linear_solve.solve_cg, maxiter=30, tol=1e-5),
    )  # fmt: skip

    def outer(theta, init, data):
        w = solver.run(init, theta, data).params
        return ours.loss(w, *data) / len(data[1]), w

    return _runner(outer, optax.adam(0.05), theta, jnp.ones((64, 10)), 50, lambda k: data, warm_start=False)


def sinusoids(ours, tasks):
    steps = len(tasks.support_x)

    def theta():
        return ours.NETWORK.init(jax.random.key(0), jnp.zeros((1, 1)))

    def fit(w, theta, data):
        x, y = data
        distance = jaxopt.tree_util.tree_l2_norm(jaxopt.tree_util.tree_sub(w, theta), squared=True)
        return jnp.mean((ours.NETWORK.apply(w, x) - y) ** 2) + 0.5 * 2.0 * distance

    solver = jaxopt.GradientDescent(
        fit, stepsize=0.01, maxiter=16, tol=0.0, acceleration=False,
        implicit_diff_solve=partial(linear_solve.solve_cg, maxiter=5, tol=0.0),
    )  # fmt: skip

    def outer(theta, _, tasks):
        run = jax.vmap(solver.run, (None, None, 0))
        w = run(jax.lax.stop_gradient(theta), theta, (tasks.support_x, tasks.support_y)).params
        outputs = jax.vmap(ours.NETWORK.apply)(w, tasks.query_x)
        return jnp.mean((outputs - tasks.query_y) ** 2), None

    def batch(k):
        return jax.tree.map(lambda leaf: leaf[k], tasks)

    return _runner(outer, optax.adam(1e-3), theta, None, steps, batch)


def equilibrium(ours, data, steps=EQUILIBRIUM_STEPS, batch=32):
    solver = jaxopt.AndersonAcceleration(
        lambda z, theta, x: ours.BLOCK.apply(theta, z, x), history_size=5, ridge=1e-4, maxiter=20, tol=1e-2,
        implicit_diff_solve=partial(linear_solve.solve_normal_cg, maxiter=20, tol=1e-2),
    )  # fmt: skip

    def predict(theta, image):
        x = ours.STEM.apply(theta["stem"], image)
        z = solver.run(jnp.zeros_like(x), theta["block"], x).params
        return ours.HEAD.apply(theta["head"], ours.nn.avg_pool(z, (4, 4), (4, 4)).ravel())

    @jax.jit  # as in jaxopt's example
    def outer(theta, _, data):
        outputs = jax.vmap(predict, (None, 0))(theta, data[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, data[1])), None

    def rows(k):
        chosen = (jnp.arange(batch) + k * batch) % len(data[1])
        return data[0][chosen], data[1][chosen]

    return _runner(outer, optax.adam(1e-3), lambda: ours.init(jax.random.key(0)), None, steps, rows)
