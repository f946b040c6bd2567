"""Ridge regression on scikit-learn's diabetes data, with the penalty exp(θ) learned on a validation set.

This example is the counterpart of jaxopt's ridge_reg_implicit_diff.py.
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
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)


def error(w, theta, data):
    _, x, _, y = data
    return jnp.mean((x @ w - y) ** 2)


PROBLEM = bl.Problem(bl.Stationary(fit, positive_definite=True), error)
OPTIMIZER = optax.adam(1e-2)


def learn(data, steps=50):
    solver, method = bl.HessianFree(max_steps=1, cg_steps=20), bl.Implicit(bl.Cholesky())
    return bl.minimize(PROBLEM, 1.0, jnp.zeros(10), data, solver, method, OPTIMIZER, steps)


if __name__ == "__main__":
    for step, value in enumerate(learn(load()).history.value):
        print(f"[Step {step + 1}] Validation loss: {value:.3f}.")
