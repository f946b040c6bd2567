"""Hyper-cleaning: a weight for each training digit, learned so that digits with wrong labels lose their influence.

About half of the labels of 300 digits are wrong. The inner problem trains a classifier on the weighted digits. The
outer value is the classifier's loss on a validation set without wrong labels. θ holds the logits of the weights.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel as bl


def load():
    """Return training and validation digits, 300 each, 600 test digits, and a mask of the wrong training labels."""
    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    wrong = rng.random(300) < 0.5
    labels = jnp.where(wrong, (y[:300] + rng.integers(1, 10, 300)) % 10, y[:300])
    return {"train": (x[:300], labels), "valid": (x[300:600], y[300:600])}, (x[600:1200], y[600:1200]), wrong


def losses(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y)


def fit(w, theta, data):
    return jnp.mean(jax.nn.sigmoid(theta) * losses(w, *data["train"])) + 1e-3 * jnp.sum(w**2)


def main(picture="hyper_cleaning.png"):
    data, (x, y), wrong = load()
    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: jnp.mean(losses(w, *data["valid"])))
    solver, method = bl.GradientDescent(1.0, max_steps=30, momentum=0.8), bl.Implicit(bl.CG(max_steps=10))
    theta, init = jnp.zeros(300), jnp.zeros((64, 10))
    minimum = bl.minimize(problem, theta, init, data, solver, method, optax.adam(0.3), 60)
    train = lambda theta: bl.GradientDescent(1.0, 300, momentum=0.8)(problem.condition, init, theta, data).w  # noqa: E731
    choices = theta, minimum.theta, jnp.where(wrong, -30.0, 30.0)  # sigmoid(∓30) gives the weights 0 and 1
    scores = [float(jnp.mean(jnp.argmax(x @ train(choice), axis=1) == y)) for choice in choices]
    weights, bins = np.asarray(jax.nn.sigmoid(minimum.theta)), np.linspace(0, 1, 26)
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.hist([weights[~wrong], weights[wrong]], bins, label=["right label", "wrong label"])
    left.set(xlabel="learned weight of a training digit", ylabel="digits")
    left.legend()
    right.bar_label(right.bar(["all labels", "learned weights", "right labels"], scores), fmt="%.3f")
    right.set(xlabel="trained on", ylabel="test accuracy", ylim=(0.5, 1.0))
    plt.savefig(picture, dpi=120)
    return *scores, float(np.mean((weights < 0.5) == wrong))


if __name__ == "__main__":
    print("test accuracy: all labels {:.3f}, learned weights {:.3f}, right labels {:.3f}".format(*main(*sys.argv[1:])))
