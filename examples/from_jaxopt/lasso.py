"""The lasso on scikit-learn's diabetes data, with the penalty exp(θ) learned on a validation set.

This example is the counterpart of jaxopt's lasso_implicit_diff.py.
"""

import jax.numpy as jnp
import optax
from sklearn import datasets, model_selection, preprocessing

import bilevel as bl


def load():
    x, y = datasets.load_diabetes(return_X_y=True)
    return [jnp.asarray(a, jnp.float32) for a in model_selection.train_test_split(
        preprocessing.normalize(x), y, test_size=0.33, random_state=0)]  # fmt: skip


def fit(w, theta, data):
    x, _, y, _ = data
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def error(w, theta, data):
    _, x, _, y = data
    return jnp.mean((x @ w - y) ** 2)


PROX = bl.jaxopt_prox("prox_lasso", params=lambda theta, data: jnp.exp(theta))
PROBLEM = bl.Problem(bl.ProximalGradient(fit, PROX, step_size=2.0), error)
OPTIMIZER = optax.adam(1e-2)


def learn(data, steps=10):
    solver, method = bl.FISTA(max_steps=500, tol=1e-3), bl.Implicit(bl.LU())
    return bl.minimize(PROBLEM, 1.0, jnp.zeros(10), data, solver, method, OPTIMIZER, steps)


if __name__ == "__main__":
    for step, value in enumerate(learn(load()).history.value):
        print(f"[Step {step + 1}] Validation loss: {value:.3f}.")
