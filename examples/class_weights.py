"""Class weights for imbalanced digits, learned through a Flax nnx network.

θ holds the logarithm of a weight for each class. The inner problem trains the network on the weighted images. The outer
value is its loss on ten images of each class. The result is the accuracy on 50 further images of each class.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import bilevel as bl

NETWORK = nnx.Sequential(nnx.Linear(64, 16, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(16, 10, rngs=nnx.Rngs(1)))
GRAPH, START = nnx.split(NETWORK)  # the structure, and the parameters as a pytree
SIZES = (80 * 0.7 ** np.arange(10)).astype(int)  # the training images of each class: 80, 56, 39, …, 3


def load():
    rng, (x, y) = np.random.default_rng(0), load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), y[order]
    before = np.array([np.sum(y[:k] == label) for k, label in enumerate(y)])  # earlier images of the same class
    parts = {"train": before < SIZES[y], "valid": before // 10 == 8, "test": (before >= 90) & (before < 140)}
    return {name: (x[part], jnp.asarray(y[part])) for name, part in parts.items()}


def losses(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(GRAPH, w)(x), y)


def fit(w, theta, data):
    weights = jax.nn.softmax(theta[data["train"][1]])  # of the images: they sum to one
    return weights @ losses(w, *data["train"]) + 5e-3 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))


def main(picture="class_weights.png"):
    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: jnp.mean(losses(w, *data["valid"])))
    data, equal, solver = load(), jnp.zeros(10), bl.HessianFree(max_steps=100, cg_steps=20, tol=1e-4)
    found = bl.minimize(problem, equal, START, data, solver, bl.Implicit(bl.CG(50, ridge=1e-3)), optax.adam(0.1), 50)
    rates, (x, y) = [], data["test"]
    for name, theta in {"equal": equal, "inverse frequency": -jnp.log(SIZES), "learned": found.theta}.items():
        w = bl.solve(solver, problem.condition, START, theta, data).w
        right = jnp.argmax(nnx.merge(GRAPH, w)(x), axis=1) == y
        rates.append([float(right[y == k].mean()) for k in range(10)])
        plt.plot(range(10), rates[-1], "o-", label=f"{name} weights")
    plt.xticks(range(10), [f"{size} images" for size in SIZES], rotation=45)
    plt.legend(title="test accuracy of each class with")
    plt.savefig(picture, dpi=120, bbox_inches="tight")
    return tuple(np.mean(rates, axis=1))


if __name__ == "__main__":
    print("accuracy: equal weights {:.1%}, inverse frequency {:.1%}, learned {:.1%}".format(*main(*sys.argv[1:])))
