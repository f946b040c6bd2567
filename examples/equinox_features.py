"""An Equinox network that learns features through a ridge regression on these features.

The network maps x to twelve features. The inner problem fits their coefficients w to 60 points by ridge regression. The
outer variables are the parameters of the network. The outer value is the error of the prediction on 60 other points.
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
    """Return noisy values of a function with a jump: 60 points to fit the coefficients, 60 to validate them."""
    x = jax.random.uniform(jax.random.key(0), (120, 1), minval=-1.0)
    y = truth(x[:, 0]) + 0.1 * jax.random.normal(jax.random.key(1), (120,))
    return {"fit": (x[:60], y[:60]), "validate": (x[60:], y[60:])}


def main(picture="equinox_features.png"):
    data = load()
    network = eqx.nn.MLP(1, 12, 32, depth=2, activation=jnp.tanh, key=jax.random.key(2))
    theta, rest = eqx.partition(network, eqx.is_array)  # the parameters, and all leaves that are not arrays

    def predict(w, theta, x):
        return jax.vmap(eqx.combine(theta, rest))(x) @ w

    def error(w, theta, x, y):
        return jnp.mean((predict(w, theta, x) - y) ** 2)

    def fit(w, theta, data):
        return error(w, theta, *data["fit"]) + 1e-3 * jnp.sum(w**2)

    problem = bl.Problem(bl.Stationary(fit), lambda w, theta, data: error(w, theta, *data["validate"]))
    solver, method, optimizer = bl.HessianFree(max_steps=1, cg_steps=24), bl.Implicit(bl.Cholesky()), optax.adam(5e-3)
    minimum = bl.minimize(problem, theta, jnp.zeros(12), data, solver, method, optimizer, 800)

    grid = jnp.linspace(-1, 1, 400)[:, None]
    before = bl.solve(solver, problem.condition, jnp.zeros(12), theta, data).w
    plt.plot(grid, truth(grid[:, 0]), color="0.6", label="truth")
    plt.plot(*data["fit"], ".", label="points for the fit of the coefficients")
    plt.plot(grid, predict(before, theta, grid), ":", label="random features")
    plt.plot(grid, predict(minimum.w, minimum.theta, grid), label="learned features")
    plt.legend()
    plt.savefig(picture, dpi=120)
    return float(minimum.history.value[0]), float(minimum.history.value[-1])


if __name__ == "__main__":
    print("loss on the validation points {:.3f} → {:.3f}".format(*main(*sys.argv[1:])))
