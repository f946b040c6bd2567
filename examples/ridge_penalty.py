"""One ridge penalty for all features, chosen by descent on the validation error.

The inner problem is a ridge regression on scikit-learn's diabetes data, with the penalty λ = exp(θ). The outer value is
the error of the regression on other patients. `bilevel` derives the hypergradient from the inner objective and the
outer function, so this file has no formula for it.
"""

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import bilevel as bl


def load():
    """Return standardised data of 60 training patients, so few that a penalty matters, and 200 validation patients."""
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x[order], y[order]))
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    return {"train": (x[:60], y[:60]), "valid": (x[60:260], y[60:260])}


def fit(w, theta, data):
    x, y = data["train"]
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)


def error(w, theta, data):
    x, y = data["valid"]
    return jnp.mean((x @ w - y) ** 2)


def main(picture="ridge_penalty.png"):
    data, init = load(), jnp.zeros(10)
    problem = bl.Problem(bl.Stationary(fit), error)
    solver, method = bl.HessianFree(max_steps=4, cg_steps=10), bl.Implicit(bl.CG(max_steps=10))
    path = []
    options = {"callback": lambda step, theta, out: path.append((float(theta), float(out.value)))}
    minimum = bl.minimize(problem, -6.0, init, data, solver, method, optax.adam(0.3), 60, **options)

    hypergradient = bl.value_and_hypergradient(problem, solver, method)
    grid = np.linspace(-7, 3, 41, dtype=np.float32)
    values = [float(hypergradient(theta, init, data).value) for theta in grid]
    plt.plot(grid, values, color="0.6", label="validation error")
    plt.plot(*zip(*path, strict=True), "o-", ms=3, label="descent along the hypergradient")
    plt.xlabel("log λ")
    plt.ylabel("mean squared error")
    plt.legend()
    plt.savefig(picture, dpi=120)
    return float(minimum.theta), path[0][1], path[-1][1], min(values)


if __name__ == "__main__":
    print("log λ = {:.2f}: error {:.4f} → {:.4f}, smallest on a grid {:.4f}".format(*main(*sys.argv[1:])))
