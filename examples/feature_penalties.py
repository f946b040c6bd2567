"""A ridge penalty for each of thirty features of a logistic regression, learned on validation data.

A grid over thirty outer variables is not feasible. The hypergradient in all thirty costs one linear solve. Half of
the features of scikit-learn's breast-cancer data are replaced by noise. The noise should get the larger penalties.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import bilevel as bl


def load():
    """Return 80 patients to fit and 300 to validate. The features with odd indices are noise."""
    rng = np.random.default_rng(0)
    x, y = load_breast_cancer(return_X_y=True)
    order = rng.permutation(len(y))
    x, y = ((x - x.mean(0)) / x.std(0))[order], 2.0 * y[order] - 1
    x[:, 1::2] = rng.normal(size=x[:, 1::2].shape)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    return {"train": (x[:80], y[:80]), "valid": (x[80:380], y[80:380])}


def loss(w, x, y):
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def fit(w, theta, data):
    return loss(w, *data["train"]) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)


def main(picture="feature_penalties.png"):
    data, theta, init = load(), jnp.full(30, -4.0), jnp.zeros(30)
    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: loss(w, *data["valid"]))
    solver, method = bl.HessianFree(max_steps=3, cg_steps=15), bl.Implicit(bl.CG(max_steps=30))
    minimum = bl.minimize(problem, theta, init, data, solver, method, optax.adam(0.15), 80)

    penalties = np.asarray(minimum.theta)
    real, noise = penalties[::2], penalties[1::2]
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.plot(minimum.history.value)
    left.set(xlabel="outer step", ylabel="validation loss")
    right.bar(np.arange(0, 30, 2), real + 4, bottom=-4, label="real features")
    right.bar(np.arange(1, 30, 2), noise + 4, bottom=-4, label="noise")
    right.set(xlabel="feature", ylabel="log penalty (initially −4)")
    right.legend()
    plt.tight_layout()
    plt.savefig(picture, dpi=120)
    return float(minimum.history.value[0]), float(minimum.history.value[-1]), float(real.mean()), float(noise.mean())


if __name__ == "__main__":
    print("loss {:.3f} → {:.3f}; mean log penalty {:.1f} of features, {:.1f} of noise".format(*main(*sys.argv[1:])))
