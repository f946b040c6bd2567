"""Hyper-cleaning on samples: a weight for each of 20,000 training images, half of whose labels are redrawn at random.

The inner problem trains a linear classifier on the weighted images. The outer value is the classifier's loss on 5,000
other images. SABA moves the classifier, the adjoint and the 20,000 outer variables at once, by steps on batches of 64
images. Each inner sample contains its index, with which the objective finds the weights of a batch in θ.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel as bl


def draw(images, labels, copies, key):
    """Return digits at 28×28 pixels, rotated by up to 10° and shifted by up to 2 pixels, and their labels."""
    angles, *shifts = jax.random.uniform(key, (3, copies * len(images)), minval=-1)

    def move(image, angle, down, right):
        (y, x), sine, cosine = jnp.mgrid[:28, :28] - 13.5, jnp.sin(0.175 * angle), jnp.cos(0.175 * angle)
        source = [cosine * y - sine * x + 2 * down, sine * y + cosine * x + 2 * right]
        return jax.scipy.ndimage.map_coordinates(image, [3.5 + 8 / 28 * axis for axis in source], order=1).ravel()

    return jax.jit(jax.vmap(move))(jnp.tile(images, (copies, 1, 1)), angles, *shifts), jnp.tile(labels, copies)


def losses(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y)


def fit(w, theta, batch):
    weights = jax.nn.sigmoid(theta[batch["number"]])
    return jnp.mean(weights * losses(w, batch["x"], batch["y"])) + 2e-4 * jnp.sum(w**2)


def main(picture="stochastic_hyper_cleaning.png", copies=20, steps=6_000):
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8) / 16, jnp.float32)
    keys, order = jax.random.split(jax.random.key(0), 8), np.random.default_rng(0).permutation(len(labels))
    train, valid, (x, y) = (  # each digit is in one of the three sets only, with all of its copies
        bl.stochastic.shuffle(draw(images[part], jnp.asarray(labels[part]), copies, draw_key), key)
        for part, draw_key, key in zip(np.split(order, [1000, 1250]), keys[:3], keys[3:6], strict=True)
    )
    numbers = jnp.arange(1000 * copies)
    redrawn = jax.random.bernoulli(keys[6], 0.5, numbers.shape)
    given = jnp.where(redrawn, jax.random.randint(keys[7], numbers.shape, 0, 10), train[1])
    wrong, inner = np.asarray(given != train[1]), {"x": train[0], "y": given, "number": numbers}
    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, batch: jnp.mean(losses(w, *batch)))
    score = lambda theta, w: jnp.mean(jnp.argmax(x @ w, axis=1) == y)  # noqa: E731

    def run(theta, outer_rate):
        saba, w = bl.stochastic.SABA(outer_rate=outer_rate), jnp.zeros((784, 10))
        return bl.stochastic.minimize(problem, theta, w, inner, valid, saba, steps, evaluate=score, evaluate_every=250)

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    right_only = jnp.where(wrong, -30.0, 30.0)  # sigmoid(∓30) gives the weights 0 and 1
    starts = {"all labels": (jnp.zeros(len(wrong)), 0.0), "learned weights": (jnp.zeros(len(wrong)), None)}
    found = {name: run(*start) for name, start in {**starts, "right labels": (right_only, 0.0)}.items()}
    for name, minimum in found.items():
        right.plot(minimum.history.step, minimum.history.evaluations, label=name)
    right.set(xlabel="step", ylabel="test accuracy")
    right.legend()
    weights = np.asarray(jax.nn.sigmoid(found["learned weights"].theta))
    left.hist([weights[~wrong], weights[wrong]], np.linspace(0, 1, 26), label=["right label", "wrong label"])
    left.set(xlabel="learned weight of a training image", ylabel="images")
    left.legend()
    plt.savefig(picture, dpi=120)
    scores = [float(minimum.history.evaluations[-1]) for minimum in found.values()]
    return *scores, float(np.mean((weights < 0.5) == wrong))


if __name__ == "__main__":
    print(
        "test accuracy: all labels {:.3f}, learned weights {:.3f}, right labels {:.3f}; "
        "weights on the right side of 0.5: {:.1%}".format(*main(*sys.argv[1:]))
    )
