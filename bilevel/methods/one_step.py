"""One-step differentiation: OneStep."""

from dataclasses import dataclass

import jax

from bilevel import solvers, tree
from bilevel.methods.estimates import estimated, with_tangent
from bilevel.methods.protocol import Start, outer_derivatives, outer_with_aux, solve_constant
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.types import Hypergradient, PyTree


@dataclass(frozen=True)
class OneStep:
    """One-step (Jacobian-free) differentiation: dw*/dθ ≈ ∂step(w*, θ)/∂θ, for one solver step from a constant w*.

    It needs no linear system and no second derivative in w. The relative error of dw*/dθ is at most the
    contraction factor of the step, so a solver that converges in few steps gives an accurate result.

    JAX's derivative of the value, in θ and in data, is this estimate. The derivative of any other result is refused.
    For second derivatives use :class:`Implicit`.

    Raises:
        ValueError: when called, for a solver other than GradientDescent, FixedPointIteration and Anderson.

    Source: Bolte, Pauwels, Vaiter (2023), One-step differentiation of iterative algorithms.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import FixedPoint, FixedPointIteration, Problem, value_and_hypergradient
        >>> problem = Problem(FixedPoint(lambda w, theta, data: 0.1 * w + theta), lambda w, theta, data: w)
        >>> out = value_and_hypergradient(problem, FixedPointIteration(20), OneStep())(1.0, 0.0, None)
        >>> round(float(out.value), 3), float(out.gradient)  # exact: 1 / 0.9 for both
        (1.111, 1.0)
    """

    start_is_constant = True

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient:
        del linear_init  # this method solves no linear system
        if not isinstance(solver, solvers.GradientDescent | solvers.FixedPointIteration | solvers.Anderson):
            raise ValueError(
                "OneStep differentiates a step without memory: use GradientDescent, FixedPointIteration or Anderson, "
                f"whose first step uses no memory, or Implicit, which takes any solver; got {solver}"
            )
        at, data_at = jax.lax.stop_gradient((theta, data))
        inner = solve_constant(solver, problem.condition, init, at, data_at)

        def step(theta, data):
            return solver.update(solver.start(inner.w), problem.condition.residual(inner.w, theta, data))[0]

        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, at, data_at)
        moved, pull_back = jax.vjp(lambda theta: step(theta, data_at), at)
        gradient = tree.add(outer_theta, tree.with_zeros(pull_back(outer_w)[0], at))
        found = Hypergradient(value, gradient, aux, inner, None)
        source, _ = outer_with_aux(problem)(with_tangent(inner.w, step(at, data)), at, data)
        return estimated(found, source, "OneStep", theta, data, moved)
