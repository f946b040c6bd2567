"""Conjugate gradients, unrolled gradient descent and derivatives of a task's losses, without code of :mod:`bilevel`.

:mod:`imaml.runs.verification` compares the results of :mod:`bilevel` with them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from imaml.learning.algorithms import Learner
from imaml.learning.tasks import Task

Vector = np.ndarray
"""A point or a direction in the space of the parameters, float64 ``[parameters]``."""


def flat(tree: Any) -> Vector:
    """Return the leaves of a pytree as one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


class TaskDerivatives:
    """Derivatives of the support and query losses of one task, and of its inner objective.

    The inner objective is the support loss plus ½ λ‖φ − θ‖², with the learner's strength λ.

    Args:
        learner: network, loss and λ.
        theta: parameters that have the structure of φ; their values are not used.
        task: the task.
    """

    def __init__(self, learner: Learner, theta: Any, task: Task):
        assert learner.strength is not None  # true for implicit MAML
        self.strength = learner.strength
        unravel = ravel_pytree(theta)[1]

        def value_and_gradient(phi, x, y):
            return jax.value_and_grad(lambda phi: learner.loss(learner.apply(unravel(phi), x), y))(phi)

        def support(phi, task):
            return value_and_gradient(phi, task.support_x, task.support_y)[1]

        def along(phi, u, task):
            return jax.jvp(lambda phi: support(phi, task), (phi,), (u,))

        def unrolled(state, direction, rate, momentum, count, theta, task):
            def body(_, state):
                (phi, step), (tangent, tangent_step) = state
                gradient, product = along(phi, tangent, task)
                step = momentum * step - rate * (gradient + self.strength * (phi - theta))
                change = product + self.strength * (tangent - direction)
                tangent_step = momentum * tangent_step - rate * change
                return (phi + step, step), (tangent + tangent_step, tangent_step)

            return jax.lax.fori_loop(0, count, body, state)

        self._task = task
        self._query = jax.jit(lambda phi, task: value_and_gradient(phi, task.query_x, task.query_y))
        self._support = jax.jit(along)
        self.unrolled = unrolled
        """Gradient descent with momentum on the inner objective, differentiated in forward mode along a direction in θ.

        ``unrolled(state, direction, rate, momentum, count, theta, task)`` takes ``count`` steps. A state holds φ and
        the last step, and the derivatives of both along the direction: ``((φ, step), (tangent, tangent_step))``.
        Forward mode stores no iterates, so the memory does not depend on the number of steps.
        """

    def query(self, phi: Vector) -> tuple[float, Vector]:
        """Return the query loss at φ and its gradient."""
        value, gradient = self._query(phi, self._task)
        return float(value), np.asarray(gradient)

    def inner(self, phi: Vector, theta: Vector, u: Vector) -> tuple[Vector, Vector]:
        """Return the gradient F of the inner objective at φ, and (H + λI)u with the Hessian H of the support loss."""
        gradient, product = self._support(phi, u, self._task)
        return np.asarray(gradient) + self.strength * (phi - theta), np.asarray(product) + self.strength * u

    def residual(self, phi: Vector, gradient: Vector) -> float:
        """Return ‖v − (I + H/λ)g‖ / ‖v‖, the relative residual of a meta-gradient g, which is ``gradient``.

        Here v is the gradient of the query loss at φ.
        """
        v = self.query(phi)[1]
        rest = v - self.inner(phi, phi, gradient)[1] / self.strength
        return float(np.linalg.norm(rest) / np.linalg.norm(v))


def conjugate_gradients(product: Callable[[Vector], Vector], b: Vector) -> Iterator[tuple[Vector, float, float]]:
    """Yield x, ‖b − Ax‖ and the curvature pᵀAp of the search direction p, for each step of conjugate gradients.

    The iteration for Ax = b starts at x = 0. Like the CG of the presets, it continues after a negative curvature.

    Args:
        product: the function x ↦ Ax, with A symmetric.
        b: the right-hand side.
    """
    x, rest, direction, square = np.zeros_like(b), b, b, b @ b
    while square > 0:
        image = product(direction)
        curvature = direction @ image
        x = x + square / curvature * direction
        rest = rest - square / curvature * image
        square, before = rest @ rest, square
        direction = rest + square / before * direction
        yield x, float(np.sqrt(square)), float(curvature)
