"""optimistix: ``minimise`` by its gradient descent, ``ImplicitAdjoint`` with lineax's conjugate gradients.

Tolerances of zero make it spend the same steps as the others do.
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx

from benchmarks.speed.peers.linear_models import objective, validation
from benchmarks.speed.workloads import Linear


def programs(item: Linear, dtype: str):
    jax.config.update("jax_enable_x64", dtype == "float64")
    data = {name: jnp.asarray(value) for name, value in item.arrays(dtype).items()}
    theta, init = data.pop("theta"), jnp.zeros(item.features, dtype)
    solver = optx.GradientDescent(item.step_size, rtol=0.0, atol=0.0)
    # Its test is entry by entry, of the residual and of the step; an entry near zero needs an absolute tolerance, and a
    # budget that ends it would raise.
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
