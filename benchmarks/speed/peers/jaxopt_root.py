"""jaxopt: ``custom_root`` with ``solve_cg`` around gradient descent, and ``jax.value_and_grad`` of the outer value."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.peers.linear_models import objective, validation
from benchmarks.speed.workloads import Linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg


def programs(item: Linear, dtype: str):
    """Return the program ``hypergradient``."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    data = {name: jnp.asarray(value) for name, value in item.arrays(dtype).items()}
    theta, init = data.pop("theta"), jnp.zeros(item.features, dtype)
    slope = jax.grad(lambda w, theta, data: objective(item.loss, w, theta, data))

    @custom_root(slope, solve=lambda matvec, b: solve_cg(matvec, b, maxiter=item.iterations, tol=item.tol))
    def solve(w, theta, data):
        return jax.lax.fori_loop(0, item.steps, lambda _, w: w - item.step_size * slope(w, theta, data), w)

    def value(theta, data):  # Data are arguments of the compiled program, as in the other libraries' programs.
        return validation(item.loss, solve(init, theta, data), data)

    hypergradient = jax.jit(jax.value_and_grad(value))
    return {"hypergradient": lambda: {"theta": np.asarray(hypergradient(theta, data)[1])}}
