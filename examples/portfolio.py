"""A portfolio on the simplex, and the risk aversion with the smallest loss on later returns.

The inner problem minimises risk minus expected return over non-negative weights with sum one. θ holds the log of the
risk aversion, and tilts of the mean returns. The outer value is the loss on later returns plus a penalty on the tilts.
"""

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel as bl

ASSETS = 8


def load():
    """Return mean and covariance of the returns of eight synthetic assets over 60 days, and 400 later returns."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(ASSETS, 3)) * 0.5
    mean = np.linspace(0.0, 0.14, ASSETS)
    returns = mean + rng.normal(size=(460, 3)) @ factors.T + 0.6 * rng.normal(size=(460, ASSETS))
    past, later = jnp.asarray(returns[:60], jnp.float32), jnp.asarray(returns[60:], jnp.float32)
    return {"mean": past.mean(0), "risk": jnp.cov(past.T), "later": later}


def choose(w, theta, data):
    return 0.5 * jnp.exp(theta["aversion"]) * w @ data["risk"] @ w - w @ (data["mean"] + theta["tilt"])


def loss(w, theta, data):
    """Return the negative certainty equivalent of later returns plus a penalty on tilts."""
    returns = data["later"] @ w
    return 0.5 * jnp.var(returns) - jnp.mean(returns) + 2.5 * jnp.sum(theta["tilt"] ** 2)


def main(picture="portfolio.png"):
    data, theta = load(), {"aversion": jnp.float32(-2.0), "tilt": jnp.zeros(ASSETS)}
    problem = bl.Problem(bl.Projected(choose, bl.jaxopt_projection("projection_simplex"), step_size=0.2), loss)
    solver, method = bl.FixedPointIteration(200), bl.Implicit(bl.LU())
    weights, init = [], jnp.full(ASSETS, 1 / ASSETS)
    record = lambda step, theta, out: weights.append(np.asarray(out.inner.w))  # noqa: E731
    minimum = bl.minimize(problem, theta, init, data, solver, method, optax.adam(0.02), 100, callback=record)

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = [f"asset {k}" if weights[-1][k] > 0 else None for k in range(ASSETS)]
    left.stackplot(range(len(weights)), np.transpose(weights), labels=names)
    left.legend(loc="upper right", ncols=2)
    left.set(xlabel="outer step", ylabel="weight of each asset", ylim=(0, 1))
    right.plot(minimum.history.value)
    right.set(xlabel="outer step", ylabel="loss on later returns")
    plt.savefig(picture, dpi=120)
    return float(minimum.history.value[0]), float(minimum.history.value[-1]), float(weights[-1].sum())


if __name__ == "__main__":
    print("loss {:.3f} → {:.3f}; the weights sum to {:.4f}".format(*main(*sys.argv[1:])))
