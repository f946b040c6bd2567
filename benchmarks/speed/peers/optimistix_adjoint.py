"""optimistix: ``minimise`` by gradient descent, ``ImplicitAdjoint`` with lineax's conjugate gradients.

With tolerances of zero, gradient descent evaluates as many gradients as the other libraries do. The first step of
optimistix evaluates the gradient at the start without an update, so optimistix takes one update fewer.
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx

from benchmarks.speed.peers.linear_models import objective, validation
from benchmarks.speed.workloads import Linear


def programs(item: Linear, dtype: str):
    """Return the program ``hypergradient``."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    data = {name: jnp.asarray(value) for name, value in item.arrays(dtype).items()}
    theta, init = data.pop("theta"), jnp.zeros(item.features, dtype)
    solver = optx.GradientDescent(item.step_size, rtol=0.0, atol=0.0)
    # lineax tests residual and step entry by entry, so entries near zero need an absolute tolerance. max_steps=None
    # allows ten iterations per unknown. A smaller budget could be spent, and lineax then raises an error.
    adjoint = optx.ImplicitAdjoint(lx.CG(rtol=item.tol, atol=item.tol, max_steps=None))
    tags = frozenset({lx.positive_semidefinite_tag})

    def fit(w, arguments):
        theta, data = arguments
        return objective(item.loss, w, theta, data)

    def outer(theta, data):
        found = optx.minimise(
            fit, solver, init, (theta, data), max_steps=item.steps, adjoint=adjoint, throw=False, tags=tags
        )
        return validation(item.loss, found.value, data)

    hypergradient = jax.jit(jax.value_and_grad(outer))
    return {"hypergradient": lambda: {"theta": np.asarray(hypergradient(theta, data)[1])}}
