"""The compiled functions of a problem on flat float64 vectors, with the point (w, θ) at which they are checked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree
from bilevel.verify.flat import Flat, flatten
from bilevel.verify.precision import as_double
from bilevel.verify.programs import kept


@dataclass(frozen=True)
class LocalProblem:
    """The residual, the outer function and their derivatives on flat vectors, with the point to check.

    Attributes:
        flat_w, flat_theta: the point, with the names of its entries.
        residual: (w, θ) → F.
        outer: (w, θ) → the outer value.
        jacobian: (w, θ) → A.
        jvp: (w, θ, u, t) → Au + Bt.
        vjp: (w, θ, u) → (Aᵀu, Bᵀu).
        outer_gradient: (w, θ) → (∂outer/∂w, ∂outer/∂θ).
    """

    flat_w: Flat
    flat_theta: Flat
    residual: Callable
    outer: Callable
    jacobian: Callable
    jvp: Callable
    vjp: Callable
    outer_gradient: Callable

    @staticmethod
    def at(problem: Problem, theta: PyTree, w: PyTree, data: PyTree) -> "LocalProblem":
        """Prepare the compiled functions of ``problem``. Call them, and ``at``, within ``double_precision()``."""
        point = theta, w, data = tuple(as_double(part) for part in (theta, w, data))
        functions = {name: partial(function, point) for name, function in _programs(problem).items()}
        return LocalProblem(flatten(w, "w"), flatten(theta, "theta"), **functions)

    @property
    def w(self) -> jax.Array:
        return self.flat_w.vector

    @property
    def theta(self) -> jax.Array:
        return self.flat_theta.vector

    def product(self, u: jax.Array) -> jax.Array:
        """Return Au at the point."""
        return self.jvp(self.w, self.theta, u, jnp.zeros_like(self.theta))


@kept
def _programs(problem):
    """Return the compiled functions of :class:`LocalProblem`. Each gets the point (θ, w, data) as its first argument.

    The vector arguments hold the inexact entries of w and θ. The point provides the structures and the integer leaves.
    """

    def residual(point, w, theta):
        at_theta, at_w, data = point
        value = problem.condition.residual(flatten(at_w).rebuild(w), flatten(at_theta).rebuild(theta), data)
        return flatten(value).vector

    def outer(point, w, theta):
        at_theta, at_w, data = point
        value = problem.outer(flatten(at_w).rebuild(w), flatten(at_theta).rebuild(theta), data)
        return value[0] if problem.has_aux else value

    functions = {
        "residual": residual,
        "outer": outer,
        "jacobian": jax.jacfwd(residual, 1),
        "jvp": lambda point, w, theta, u, t: jax.jvp(partial(residual, point), (w, theta), (u, t))[1],
        "vjp": lambda point, w, theta, u: jax.vjp(partial(residual, point), w, theta)[1](u),
        "outer_gradient": jax.grad(outer, (1, 2)),
    }
    return {name: jax.jit(function) for name, function in functions.items()}


def random_like(vector: jax.Array, seed: int) -> jax.Array:
    """Return a standard normal vector of the shape of ``vector``."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=vector.shape))
