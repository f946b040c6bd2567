"""Dataset distillation: ten learned images, one for each digit, from which a linear classifier learns all digits.

This example is the counterpart of jaxopt's notebook dataset_distillation, on the digits of scikit-learn.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets

import bilevel as bl


def load():
    x, y = datasets.load_digits(return_X_y=True)
    return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


def loss(w, x, y):
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(x @ w, y))


def fit(w, theta, data):
    return loss(w, theta, jnp.arange(10)) + 0.05 * jnp.sum(w**2)


PROBLEM = bl.Problem(bl.Stationary(fit, positive_definite=True), lambda w, theta, data: loss(w, *data) / len(data[1]))
OPTIMIZER = optax.adam(0.05)


def learn(data, steps=50):
    theta = jnp.asarray(np.random.default_rng(0).normal(size=(10, 64)) / 64, jnp.float32)
    solver, method = bl.GradientDescent(0.5, max_steps=100), bl.Implicit(bl.CG(max_steps=30, tol=1e-5))
    return bl.minimize(PROBLEM, theta, jnp.ones((64, 10)), data, solver, method, OPTIMIZER, steps, warm_start=False)


if __name__ == "__main__":
    found = learn(load())
    print(f"loss {found.history.value[0]:.3f} → {found.history.value[-1]:.3f}")
    for axis, image in zip(plt.subplots(2, 5)[1].flat, found.theta, strict=True):
        axis.imshow(image.reshape(8, 8), cmap="gray_r")
    plt.show()
