"""A deep equilibrium model: its hidden state is the fixed point of a layer, h = tanh(s·Wh + 6·Ux + b).

The factor s makes the layer a contraction. Anderson acceleration finds the fixed point, and the implicit function
theorem differentiates it with the memory of one layer. The model separates the points of two intertwined spirals.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel as bl

WIDTH, POINTS = 24, 120


def load():
    """Return two spirals of 60 points each, one rotated by 180° from the other, and labels of ±1."""
    radius = np.linspace(0.2, 1.0, POINTS // 2)
    arm = np.stack([radius * np.cos(7 * radius), radius * np.sin(7 * radius)], axis=1)
    labels = np.repeat([1.0, -1.0], POINTS // 2)
    return jnp.asarray(np.concatenate([arm, -arm]), jnp.float32), jnp.asarray(labels, jnp.float32)


def mapping(h, theta, x):
    scale = 0.9 / jnp.maximum(jnp.linalg.norm(theta["W"]), 0.9)  # a contraction for every W, with one fixed point
    return jnp.tanh(scale * h @ theta["W"] + 6 * x @ theta["U"] + theta["b"])


def main(picture="equilibrium_model.png"):
    x, labels = load()
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    theta = {"W": draw(WIDTH, WIDTH) / 8, "U": draw(2, WIDTH), "b": draw(WIDTH), "out": draw(WIDTH) / 5}
    problem = bl.Problem(
        bl.FixedPoint(mapping), lambda h, theta, x: jnp.mean(jax.nn.softplus(-labels * (h @ theta["out"])))
    )
    solver, method = bl.Anderson(12), bl.Implicit(bl.GMRES(max_steps=10))
    minimum = bl.minimize(problem, theta, jnp.zeros((POINTS, WIDTH)), x, solver, method, optax.adam(0.02), 250)

    axis = np.linspace(-1.2, 1.2, 80, dtype=np.float32)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    score = bl.FixedPointIteration(60)(problem.condition, jnp.zeros((len(grid), WIDTH)), minimum.theta, grid).w
    plt.contourf(axis, axis, np.asarray(score @ minimum.theta["out"]).reshape(80, 80), 20, cmap="RdBu")
    plt.colorbar(label="score; its sign is the predicted spiral")
    plt.scatter(*np.asarray(x).T, c=np.asarray(labels), cmap="RdBu", edgecolors="k", s=25)
    plt.title(f"loss {float(minimum.history.value[0]):.2f} → {float(minimum.history.value[-1]):.3f}")
    plt.gca().set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal")
    plt.savefig(picture, dpi=120)
    accuracy = float(jnp.mean(labels * (minimum.w @ minimum.theta["out"]) > 0))
    return float(minimum.history.value[0]), float(minimum.history.value[-1]), accuracy


if __name__ == "__main__":
    print("loss {:.3f} → {:.3f}; accuracy {:.3f}".format(*main(*sys.argv[1:])))
