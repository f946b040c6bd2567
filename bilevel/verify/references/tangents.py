"""The reference by tangents: forward-mode derivatives through the solver's own iterations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree
from bilevel.verify.flat import flatten
from bilevel.verify.precision import EPS, as_double, double_precision
from bilevel.verify.programs import kept
from bilevel.verify.references.directions import choose_directions
from bilevel.verify.references.record import (
    Reference,
    ReferenceUnavailable,
    joined_init,
    make_reference,
    outer_value,
    solve_inner,
    split_init,
)


def unrolled(
    problem: Problem,
    solver: Callable,
    theta: PyTree,
    init: PyTree | Callable,
    data: PyTree,
    directions: np.ndarray | None = None,
) -> Reference:
    """Return the derivative of the outer value at the solver's output, by forward mode through its iterations.

    Forward mode also differentiates loops whose length is known only at run time. The uncertainty allows for
    rounding. It is 100·eps times the sum of the absolute values of the two terms, through w and directly through θ.

    Args:
        problem, solver, theta, init, data, directions: as for :func:`finite_differences`. If ``init`` is a function
            of θ, the result includes the derivative of ``init``.

    Raises:
        ReferenceUnavailable: for a solver that JAX cannot differentiate in forward mode.

    Example:
        >>> from bilevel import GradientDescent, Problem, Stationary
        >>> problem = Problem(Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)
        >>> float(unrolled(problem, GradientDescent(0.5, 2), 1.0, 0.0, None).gradient)  # 1 − ½²
        0.75
    """
    with double_precision():
        theta, data = as_double(theta), as_double(data)
        function, start = split_init(init)
        directions, labels = choose_directions(directions, flatten(theta, "theta"))
        tangents = _tangents(problem, solver, function)
        try:
            derivatives, size, ws = tangents(jnp.asarray(directions), theta, start, data)
        except TypeError as error:  # JAX raises it for a custom_vjp, which has no forward rule
            raise ReferenceUnavailable(f"JAX cannot differentiate this solver in forward mode: {error}") from error
        w = jax.tree.map(lambda leaf: leaf[0], ws)
        derivatives, uncertainty = np.asarray(derivatives), 100 * EPS * np.asarray(size)
        return make_reference(
            "unrolled", "the solver's output", problem, w, theta, data, directions, labels, derivatives, uncertainty
        )


@kept
def _tangents(problem, solver, function):
    """Return the compiled function that returns the derivative along each direction, the size of its terms, and w."""
    outer_at = outer_value(problem)

    @jax.jit
    def tangents(directions, theta, start, data):
        point = flatten(theta)

        def solve(vector):
            theta = point.rebuild(vector)
            w = solve_inner(problem.condition, solver, theta, joined_init(function, start), data)
            return flatten(w).vector, w

        def derivative(direction):
            (flat, w), (w_tangent, _) = jax.jvp(solve, (point.vector,), (direction,))
            like_w = flatten(w)

            def outer(flat, vector):
                return outer_at(like_w.rebuild(flat), point.rebuild(vector), data)

            primals = flat, point.vector
            through_w = jax.jvp(outer, primals, (w_tangent, jnp.zeros_like(direction)))[1]
            direct = jax.jvp(outer, primals, (jnp.zeros_like(w_tangent), direction))[1]
            return through_w + direct, jnp.abs(through_w) + jnp.abs(direct), w

        return jax.lax.map(derivative, directions)

    return tangents
