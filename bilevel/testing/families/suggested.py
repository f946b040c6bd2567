"""The inner solvers that cases suggest: Newton's method in plain JAX, gradient descent and fixed-point iteration."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel.conditions import Condition
from bilevel.testing.families.building_blocks import Options
from bilevel.types import PyTree


def newton(condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> PyTree:
    """Take eight Newton steps with a dense Jacobian: an inner solver for any smooth condition, as a plain function."""
    flat, unravel = ravel_pytree(init)

    def residual(w):
        return ravel_pytree(condition.residual(unravel(w), theta, data))[0]

    def step(_, w):
        return w - jnp.linalg.solve(jax.jacobian(residual)(w), residual(w))

    return unravel(jax.lax.fori_loop(0, 8, step, flat))


def suggest_newton(options: Options) -> Callable[..., Any]:
    """Suggest :func:`newton`, whatever the options."""
    del options
    return newton


def suggest_descent(options: Options) -> Callable[..., Any]:
    """Suggest gradient descent with step size ½, for a Hessian with eigenvalues between ½/κ and 3."""
    import bilevel  # Only this function and the next one use the library's solvers, which are under test.

    return bilevel.GradientDescent(0.5, _steps(options))


def suggest_iteration(options: Options) -> Callable[..., Any]:
    """Suggest fixed-point iteration."""
    import bilevel

    return bilevel.FixedPointIteration(_steps(options))


def _steps(options):
    """Return 160κ steps, which shrink an error by the factor e⁻⁴⁰, to below rounding.

    The smallest eigenvalue is at least ½/κ, so a descent step of size ½ shrinks the error at least by the factor
    1 − ¼/κ. The mappings of the fixed-point families contract faster.
    """
    return int(160 * options.condition)
