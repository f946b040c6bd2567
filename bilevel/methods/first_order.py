"""First-order hypergradients: FirstOrder."""

from dataclasses import dataclass

import jax

from bilevel import tree
from bilevel.methods.estimates import estimated, with_tangent
from bilevel.methods.protocol import Start, outer_derivatives, outer_with_aux, solve_constant
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.theorem import pull_back_to_theta
from bilevel.types import Hypergradient, PyTree


@dataclass(frozen=True)
class FirstOrder:
    """Implicit differentiation with a diagonal matrix in place of A, the matrix of the adjoint system.

    For :class:`Proximal`, A = H + λI is replaced by λI, where H is the Hessian of its objective. If θ is the centre and
    enters nowhere else, the gradient is then ∇_w outer at the solution, as in first-order MAML. For a condition with a
    mapping, A = I − ∂mapping/∂w is replaced by I. No linear system remains to be solved.

    JAX's derivative of the value, in θ and in data, is this estimate. The derivative of any other result is refused.
    For second derivatives use :class:`Implicit`.

    Raises:
        ValueError: when called, for a condition with neither a proximal term nor a mapping.

    Source: Finn, Abbeel, Levine (2017), section 5.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import GradientDescent, Problem, Proximal, value_and_hypergradient
        >>> pull = Proximal(lambda w, theta, data: 0.5 * (w - data) ** 2, strength=1.0)
        >>> problem = Problem(pull, lambda w, theta, data: w**2)
        >>> out = value_and_hypergradient(problem, GradientDescent(0.5, max_steps=1), FirstOrder())(1.0, 0.0, 3.0)
        >>> float(out.inner.w), float(out.gradient)  # the exact gradient is λ / (1 + λ) times this one
        (2.0, 4.0)
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
        condition = problem.condition
        at, data_at = jax.lax.stop_gradient((theta, data))
        scaling = condition.scaling(at, data_at)
        if scaling is None and not hasattr(condition, "mapping"):
            raise ValueError(
                f"FirstOrder needs a proximal term or a mapping, and {type(condition).__name__} has neither: use it "
                "with Proximal, FixedPoint, Projected or ProximalGradient, or use Implicit, OneStep or Unrolled"
            )

        def divide(v):
            """Return v divided by the matrix that replaces A."""
            return v if scaling is None else tree.scale(scaling, tree.scale(scaling, v))

        inner = solve_constant(solver, condition, init, at, data_at)
        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, at, data_at)
        through_w = pull_back_to_theta(condition, inner.w, at, data_at, divide(outer_w))
        found = Hypergradient(value, tree.subtract(outer_theta, through_w), aux, inner, None)
        residual = condition.residual(inner.w, at, data)
        moved_w = with_tangent(inner.w, tree.scale(-1.0, divide(tree.like(residual, inner.w))))
        source, _ = outer_with_aux(problem)(moved_w, at, data)
        return estimated(found, source, "FirstOrder", theta, data, residual)
