"""The jitted functions of a problem on flat float64 vectors, with the point (w, θ) at which they are checked."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree
from bilevel.verify.flat import Flat, flatten
from bilevel.verify.precision import as_double


@dataclass(frozen=True)
class LocalProblem:
    """The residual, the outer function and their derivatives on flat vectors, with the point to check.

    Attributes:
        flat_w, flat_theta: the point, with the names of its entries.
        residual: (w, θ) → F.
        outer: (w, θ) → the outer value.
        jvp: (w, θ, u, t) → Au + Bt.
        vjp: (w, θ, u) → (Aᵀu, Bᵀu).
        outer_gradient: (w, θ) → (∂outer/∂w, ∂outer/∂θ).
    """

    flat_w: Flat
    flat_theta: Flat
    residual: Callable
    outer: Callable
    jvp: Callable
    vjp: Callable
    outer_gradient: Callable

    @staticmethod
    def at(problem: Problem, theta: PyTree, w: PyTree, data: PyTree) -> "LocalProblem":
        """Prepare the jitted functions of ``problem``. Call them, and ``at``, within ``double_precision()``."""
        theta, w, data = (as_double(part) for part in (theta, w, data))
        flat_w, flat_theta = flatten(w, "w"), flatten(theta, "theta")

        def residual(w, theta):
            return flatten(problem.condition.residual(flat_w.rebuild(w), flat_theta.rebuild(theta), data)).vector

        def outer(w, theta):
            value = problem.outer(flat_w.rebuild(w), flat_theta.rebuild(theta), data)
            return value[0] if problem.has_aux else value  # type: ignore[index]

        return LocalProblem(
            flat_w,
            flat_theta,
            jax.jit(residual),
            jax.jit(outer),
            jax.jit(lambda w, theta, u, t: jax.jvp(residual, (w, theta), (u, t))[1]),
            jax.jit(lambda w, theta, u: jax.vjp(residual, w, theta)[1](u)),
            jax.jit(jax.grad(outer, (0, 1))),
        )

    @property
    def w(self) -> jax.Array:
        return self.flat_w.vector

    @property
    def theta(self) -> jax.Array:
        return self.flat_theta.vector

    def product(self, u: jax.Array) -> jax.Array:
        """Return Au at the point."""
        return self.jvp(self.w, self.theta, u, jnp.zeros_like(self.theta))


def random_like(vector: jax.Array, seed: int) -> jax.Array:
    """Return a standard normal vector of the shape of ``vector``."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=vector.shape))
