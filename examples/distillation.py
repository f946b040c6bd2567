"""Dataset distillation: ten learned images from which a linear classifier learns all digits.

The inner problem trains a linear classifier on ten synthetic images, one for each class. θ holds the 640 pixels of
these images. The outer value is the loss of the classifier on real digits.
"""

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel as bl


def load():
    """Return 1,000 digits for the outer loss and 797 for the test, each with labels; pixels are in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def loss(w, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ w, y))


def fit(w, theta, data):
    return loss(w, theta, jnp.arange(10)) + 5e-3 * jnp.sum(w**2)


def main(picture="distillation.png"):
    data, (x, y) = load()
    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: loss(w, *data))
    solver, method = bl.GradientDescent(0.5, max_steps=40, momentum=0.8), bl.Implicit(bl.CG(max_steps=15))
    theta = jnp.asarray(np.random.default_rng(1).uniform(0, 0.5, (10, 64)), jnp.float32)
    minimum = bl.minimize(problem, theta, jnp.zeros((64, 10)), data, solver, method, optax.adam(0.05), 150)

    _, axes = plt.subplots(2, 5, figsize=(7, 3))
    for digit, (axis, image) in enumerate(zip(axes.flat, minimum.theta, strict=True)):
        axis.imshow(np.asarray(image).reshape(8, 8), cmap="gray")
        axis.set_title(str(digit))
        axis.axis("off")
    plt.tight_layout()
    plt.savefig(picture, dpi=120)
    accuracy = float(jnp.mean(jnp.argmax(x @ minimum.w, axis=1) == y))
    return float(minimum.history.value[0]), float(minimum.history.value[-1]), accuracy


if __name__ == "__main__":
    print("loss {:.3f} → {:.3f}; test accuracy after training on ten images: {:.3f}".format(*main(*sys.argv[1:])))
