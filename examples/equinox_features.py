"""An Equinox network whose last layer is always solved: features learned through a ridge regression.

The inner problem fits the last layer to a batch by least squares; the outer variables are the network before it. It
learns features in which other points are predicted well, by the implicit derivative of the regression.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import bilevel as bl


def truth(x):
    return jnp.sin(9 * x**2) + (x > 0.5)


def load():
    """Noisy values of a function with a jump: 60 points to fit the last layer to, 60 to judge it by."""
    x = jax.random.uniform(jax.random.key(0), (120, 1), minval=-1.0)
    y = truth(x[:, 0]) + 0.1 * jax.random.normal(jax.random.key(1), (120,))
    return {"fit": (x[:60], y[:60]), "judge": (x[60:], y[60:])}


def main(picture="equinox_features.png"):
    data = load()
    network = eqx.nn.MLP(1, 12, 32, depth=2, activation=jnp.tanh, key=jax.random.key(2))
    theta, rest = eqx.partition(network, eqx.is_array)  # what is learned, and what is no array

    def predict(w, theta, x):
        return jax.vmap(eqx.combine(theta, rest))(x) @ w

    def error(w, theta, x, y):
        return jnp.mean((predict(w, theta, x) - y) ** 2)

    def fit(w, theta, data):
        return error(w, theta, *data["fit"]) + 1e-3 * jnp.sum(w**2)

    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: error(w, theta, *data["judge"]))
    solver, method, optimizer = bl.HessianFree(max_steps=1, cg_steps=24), bl.Implicit(bl.Cholesky()), optax.adam(5e-3)
    found = bl.minimize(problem, theta, jnp.zeros(12), data, solver, method, optimizer, 800)

    grid = jnp.linspace(-1, 1, 400)[:, None]
    before = bl.solve(solver, problem.condition, jnp.zeros(12), theta, data).w
    plt.plot(grid, truth(grid[:, 0]), color="0.6", label="truth")
    plt.plot(*data["fit"], ".", label="points that the last layer is fitted to")
    plt.plot(grid, predict(before, theta, grid), ":", label="random features")
    plt.plot(grid, predict(found.w, found.theta, grid), label="learned features")
    plt.legend()
    plt.savefig(picture, dpi=120)
    return float(found.history.value[0]), float(found.history.value[-1])


if __name__ == "__main__":
    print("loss on the other points {:.3f} → {:.3f}".format(*main(*sys.argv[1:])))
