"""A multiclass linear SVM, solved in the dual, with the penalty exp(θ) learned on a validation set.

Each row of the dual variables lies on a simplex. This example is the counterpart of jaxopt's multiclass_linear_svm.py,
which solves the dual for one fixed penalty.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn import datasets, preprocessing

import bilevel as bl


def load():
    x, y = datasets.make_classification(
        n_samples=80, n_features=5, n_informative=3, n_classes=3, random_state=0)  # fmt: skip
    x, y = preprocessing.normalize(x).astype("float32"), jax.nn.one_hot(y, 3)
    return x[:20], y[:20], x[20:], y[20:]


def weights(beta, theta, data):
    return data[0].T @ (data[1] - beta) / jnp.exp(theta)


def dual(beta, theta, data):
    return 0.5 * jnp.exp(theta) * jnp.sum(weights(beta, theta, data) ** 2) - jnp.vdot(beta, 1 - data[1])


def error(beta, theta, data):
    return jnp.mean(optax.softmax_cross_entropy(data[2] @ weights(beta, theta, data), data[3]))


SIMPLEX = bl.jaxopt_projection("projection_simplex")
PROBLEM = bl.Problem(bl.Projected(dual, jax.vmap(SIMPLEX, (0, None, None)), step_size=0.1), error)
OPTIMIZER = optax.adam(0.1)


def learn(data, steps=30):
    solver, method = bl.FISTA(max_steps=500, tol=1e-4), bl.Implicit(bl.LU())
    return bl.minimize(PROBLEM, 3.0, data[1], data, solver, method, OPTIMIZER, steps)


if __name__ == "__main__":
    for step, value in enumerate(learn(load()).history.value):
        print(f"[Step {step + 1}] Validation loss: {value:.3f}.")
