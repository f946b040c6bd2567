"""A regulariser for denoising, learned as an Equinox module: a convex penalty of the responses of four filters.

The inner problem removes the noise of 24 signals with jumps and oscillations: min_w ½‖w − noisy‖² + regulariser(w). The
results are the errors on 24 other signals, next to those of two fixed filters whose weights are best on these signals.
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
    weights: jax.Array  # [filters], through softplus
    quadratic: bool = eqx.field(static=True, default=False)

    def __call__(self, w):
        u = jax.vmap(lambda taps: jnp.convolve(w, taps, mode="valid"))(self.filters)
        return jnp.sum(jax.nn.softplus(self.weights) @ (u**2 if self.quadratic else jnp.sqrt(u**2 + 1e-3)))


def draw(key):
    places, sizes, phases, noise = (jax.random.normal(key, (24, 64)) for key in jax.random.split(key, 4))
    levels = jnp.cumsum(jnp.where(places > 1.5, sizes, 0.0), axis=1)
    clean = levels + jnp.sin(jnp.linspace(0.7, 0.9, 24)[:, None] * jnp.arange(64) + 9 * phases[:, :1])
    return {"clean": clean, "noisy": clean + 0.4 * noise}


def main(picture="learned_denoiser.png"):
    data, others = draw(jax.random.key(0)), draw(jax.random.key(1))
    fit = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - data["noisy"]) ** 2) + jnp.sum(jax.vmap(theta)(w)))
    problem = bl.Problem(fit, lambda w, theta, data: jnp.sqrt(jnp.mean((w - data["clean"]) ** 2)))
    theta = Regulariser(0.3 * jax.random.normal(jax.random.key(2), (4, 7)), jnp.zeros(4))
    solver, optimizer = bl.HessianFree(max_steps=9, cg_steps=30), optax.adam(0.05)
    method = bl.Implicit(bl.Blockwise(bl.Cholesky()))  # the Hessian has a block of 64 × 64 numbers for each signal
    learned = bl.minimize(problem, theta, data["noisy"], data, solver, method, optimizer, 150).theta
    fixed = ([1.0, -2.0, 1.0], True), ([1.0, -1.0], False)  # squares of second differences, and total variation
    raw, errors = jnp.linspace(-5, 3, 33)[:, None], []  # weights from 0.007 to 3
    choices = [Regulariser(jnp.tile(jnp.array(taps), (33, 1, 1)), raw, quadratic) for taps, quadratic in fixed]
    choices.append(jax.tree.map(lambda leaf: leaf[None], learned))
    for name, thetas in zip(("quadratic", "total variation", "learned"), choices, strict=True):
        w = jax.vmap(lambda theta: bl.solve(solver, fit, others["noisy"], theta, others).w)(thetas)
        error = jax.vmap(problem.outer, (0, None, None))(w, None, others)
        errors.append(float(jnp.min(error)))
        plt.plot(w[jnp.argmin(error), 1], label=name)
    plt.plot(others["clean"][1], "k:", label="clean")
    plt.legend()
    plt.savefig(picture, dpi=120)
    return tuple(errors)


if __name__ == "__main__":
    print("error: quadratic {:.3f}, total variation {:.3f}, learned {:.3f}".format(*main(*sys.argv[1:])))
