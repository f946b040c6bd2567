"""Implicit MAML: a network learns to fit a sine to ten points.

This example is the counterpart of jaxopt's notebook maml.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import bilevel as bl
import imaml


def draw(key):
    keys = jax.random.split(key, 3)
    amplitude, phase = jax.random.uniform(keys[0], (), minval=0.1, maxval=0.5), jax.random.uniform(keys[1]) * 2.6 + 0.5
    x = jax.random.uniform(keys[2], (20, 1), minval=-5, maxval=5)
    y = amplitude * jnp.sin(x - phase)
    return imaml.Task(x[:10], y[:10], x[10:], y[10:])


def load(steps=1000):
    return jax.jit(jax.vmap(jax.vmap(draw)))(jax.random.split(jax.random.key(1), (steps, 25)))


NETWORK = nn.Sequential([nn.Dense(40), nn.relu, nn.Dense(40), nn.relu, nn.Dense(1)])
SOLVER, METHOD = bl.GradientDescent(0.01, max_steps=16), bl.Implicit(bl.CG(max_steps=5))
LEARNER = imaml.Learner(NETWORK.apply, SOLVER, METHOD, 2.0, lambda out, y: jnp.mean((out - y) ** 2))
GRADIENT, OPTIMIZER = imaml.meta_gradient(LEARNER, at_once=25), optax.adam(1e-3)


def step(carry, tasks):
    theta, state = carry
    out = GRADIENT(theta, tasks)
    updates, state = OPTIMIZER.update(out.gradient, state, theta)
    return (optax.apply_updates(theta, updates), state), out.value


@jax.jit
def learn(tasks):
    theta = NETWORK.init(jax.random.key(0), jnp.zeros((1, 1)))
    (theta, _), losses = jax.lax.scan(step, (theta, OPTIMIZER.init(theta)), tasks)
    return theta, losses


if __name__ == "__main__":
    theta, losses = learn(load())
    print(f"outer loss {losses[:50].mean():.3f} → {losses[-50:].mean():.3f}")
    task, grid = draw(jax.random.key(2)), jnp.linspace(-5, 5, 200)[:, None]
    plt.scatter(task.support_x, task.support_y, label="training samples")
    plt.plot(grid, NETWORK.apply(LEARNER.adapt(theta, task).w, grid), label="prediction of the adapted network")
    plt.legend()
    plt.show()
