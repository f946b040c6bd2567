"""A regulariser for denoising, learned as an Equinox module.

The regulariser is a field of experts: it sums a convex penalty of the responses of six filters. The inner problem
removes the noise of signals, min_w ½‖w − noisy‖² + regulariser(w). The outer variables are the filters and their
weights, and the outer value is the error on 24 signals. The results are errors on 24 other signals, beside penalties of
differences, each with the weight that is best for these other signals.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import bilevel as bl


class Regulariser(eqx.Module):
    filters: jax.Array  # [filters, taps]
    weights: jax.Array  # [filters], positive by softplus
    quadratic: bool = eqx.field(static=True, default=False)

    def __call__(self, w):
        responses = jax.vmap(lambda taps: jnp.convolve(w, taps, mode="valid"))(self.filters)
        return jnp.sum(
            jax.nn.softplus(self.weights) @ (responses**2 if self.quadratic else jnp.sqrt(responses**2 + 1e-3))
        )


def draw(key):
    """Return 24 piecewise linear signals, with and without noise."""
    places, slopes, noise = jax.random.split(key, 3)
    bends = jax.random.bernoulli(places, 0.08, (24, 64)) * jax.random.normal(slopes, (24, 64))
    clean = jax.nn.standardize(jnp.cumsum(jnp.cumsum(bends, axis=1), axis=1))
    return {"clean": clean, "noisy": clean + 0.3 * jax.random.normal(noise, (24, 64))}


CONDITION = bl.Stationary(
    lambda w, theta, data: 0.5 * jnp.sum((w - data["noisy"]) ** 2) + jnp.sum(jax.vmap(theta)(w)), positive_definite=True
)


def error(w, theta, data):
    return jnp.mean((w - data["clean"]) ** 2)


def denoise(theta, data):
    return bl.solve(bl.HessianFree(30, cg_steps=30), CONDITION, data["noisy"], theta, data).w


def main(picture="learned_denoiser.png"):
    data, others = draw(jax.random.key(0)), draw(jax.random.key(1))
    theta = Regulariser(0.3 * jax.random.normal(jax.random.key(2), (6, 5)), jnp.zeros(6))
    # The signals are independent of each other: the Hessian has a block of 64 × 64 numbers for each signal.
    method, optimizer = bl.Implicit(bl.Blockwise(bl.Cholesky())), optax.adam(0.03)
    problem, solver = bl.Problem(CONDITION, error), bl.HessianFree(5, cg_steps=30)
    learned = bl.minimize(problem, theta, data["noisy"], data, solver, method, optimizer, 200).theta
