"""Implicit MAML in your own training loop: a Flax network learns to fit a sine to five points.

Each task is a sine with another amplitude and phase. `imaml.Learner` takes any function `apply(parameters, x)`. In this
example, it is the method `apply` of a Flax module. The picture shows the network before and after its adaptation to a
new sine.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import bilevel as bl
import imaml


def draw(key):
    """Return a task: five support points and twenty query points of one sine."""
    shape, place = jax.random.split(key)
    amplitude, phase = jax.random.uniform(shape, (2,), minval=jnp.array([0.5, 0.0]), maxval=jnp.array([3.0, jnp.pi]))
    x = jax.random.uniform(place, (25, 1), minval=-1.0)
    y = amplitude * jnp.sin(5 * x + phase)
    return imaml.Task(x[:5], y[:5], x[5:], y[5:])


def main(picture="flax_sinusoids.png", steps=800):
    network = nn.Sequential([nn.Dense(40), nn.tanh, nn.Dense(40), nn.tanh, nn.Dense(1)])
    solver, method = bl.GradientDescent(0.02, max_steps=16), bl.Implicit(bl.CG(max_steps=6))
    learner = imaml.Learner(network.apply, solver, method, 0.5, lambda out, y: jnp.mean((out - y) ** 2))
    gradient, optimizer = imaml.meta_gradient(learner), optax.adam(3e-3)

    @jax.jit
    def step(carry, key):
        theta, state = carry
        out = gradient(theta, jax.vmap(draw)(jax.random.split(key, 8)))
        updates, state = optimizer.update(out.gradient, state, theta)
        return (optax.apply_updates(theta, updates), state), out.value

    theta, keys = network.init(jax.random.key(0), jnp.zeros((1, 1))), jax.random.split(jax.random.key(1), steps)
    (theta, _), losses = jax.lax.scan(step, (theta, optimizer.init(theta)), keys)

    task, grid = draw(jax.random.key(2)), jnp.linspace(-1, 1, 200)[:, None]
    plt.plot(grid, network.apply(theta, grid), "--", label="before adaptation")
    plt.plot(grid, network.apply(learner.adapt(theta, task).w, grid), label="after 16 steps on five points")
    plt.plot(task.support_x, task.support_y, "o", label="the five points")
    plt.ylim(-2, 3.5)  # room for the legend
    plt.legend()
    plt.savefig(picture, dpi=120)
    return float(losses[:50].mean()), float(losses[-50:].mean())


if __name__ == "__main__":
    print("query loss {:.2f} → {:.2f}".format(*main(*sys.argv[1:])))
