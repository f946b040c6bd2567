"""The implicit function theorem by differences: FiniteDifference."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.linear import CG, Neumann
from bilevel.methods.estimates import estimated, with_tangent
from bilevel.methods.protocol import Start, check_potential, outer_derivatives, outer_with_aux, solve_constant
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.theorem import solve_scaled
from bilevel.types import Hypergradient, PyTree


@dataclass(frozen=True)
class FiniteDifference:
    """The implicit function theorem with central differences of gradients in place of second derivatives.

    With the inner objective L, its gradient F = ∇_w L, A = ∂F/∂w and B = ∂F/∂θ, the products are
    A u ≈ (F(w + εu) − F(w − εu)) / 2ε and Bᵀv ≈ (∇_θL(w + εv) − ∇_θL(w − εv)) / 2ε. The error is O(ε²) from the third
    derivative and eps/ε from rounding, with the machine epsilon eps. The default ε = eps^⅓·(1 + ‖w‖) / ‖u‖ balances
    both. The relative error of a product is then about eps^⅔: 2e-5 in float32 and 4e-11 in float64.

    JAX's derivative of the value in θ is this estimate. The derivative of the value in data is computed with the same A
    and an exact ∂F/∂data. The derivative of any other result is refused. For second derivatives use :class:`Implicit`.

    Args:
        linear: solves the adjoint system by products alone: :class:`CG` or :class:`Neumann`. ``Neumann(1, α)`` gives
            DARTS, which unrolls one step of gradient descent with step size α.
        step: ε·‖u‖ / (1 + ‖w‖); None for eps^⅓.

    Raises:
        ValueError: for a step that is not positive, for a linear solver other than CG and Neumann, and, when called,
            for a condition that is not the gradient of an objective.

    Source: Liu, Simonyan, Yang (2019), DARTS, equation 8.

    Example:
        >>> from bilevel import GradientDescent, Problem, Stationary, value_and_hypergradient
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2)
        >>> problem = Problem(condition, lambda w, theta, data: w)
        >>> method = FiniteDifference(CG(1))
        >>> round(float(value_and_hypergradient(problem, GradientDescent(1.0, 1), method)(3.0, 0.0, None).gradient), 2)
        6.0
    """

    linear: CG | Neumann
    step: float | None = None

    start_is_constant = True

    def __post_init__(self) -> None:
        if self.step is not None and not self.step > 0:
            raise ValueError(f"FiniteDifference needs a step above 0, got {self.step}; pass None for eps^⅓")
        if not isinstance(self.linear, CG | Neumann):
            raise ValueError(
                f"FiniteDifference needs a solver that works by products, CG or Neumann, got {self.linear}"
            )

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient:
        condition = check_potential("FiniteDifference", problem.condition)
        at, data_at = jax.lax.stop_gradient((theta, data))
        inner = solve_constant(solver, condition, init, at, data_at)

        def along(function, u):
            """Return the central difference for d function(w + εu)/dε at ε = 0."""
            size, reach = tree.norm(u), 1 + tree.norm(inner.w)
            step = tree.eps(inner.w) ** (1 / 3) if self.step is None else self.step
            epsilon = step * reach / jnp.where(size > 0, size, jnp.ones_like(size))
            ahead, behind = (function(tree.add(inner.w, tree.scale(e, u))) for e in (epsilon, -epsilon))
            return tree.scale(0.5 / epsilon, tree.subtract(ahead, behind))

        def matvec(u):
            return jax.lax.stop_gradient(along(lambda w: condition.residual(w, at, data_at), u))

        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, at, data_at)
        scaling = condition.scaling(at, data_at)
        adjoint, info = solve_scaled(self.linear, matvec, outer_w, scaling, True, linear_init)
        gradient_in_theta = jax.grad(condition.potential, argnums=1, allow_int=True)
        through_w = along(lambda w: tree.with_zeros(gradient_in_theta(w, at, data_at), at), adjoint)
        found = Hypergradient(value, tree.subtract(outer_theta, through_w), aux, inner, info)
        residual = condition.residual(inner.w, at, data)
        step, _ = solve_scaled(self.linear, matvec, tree.scale(-1.0, tree.like(residual, inner.w)), scaling, True)
        source, _ = outer_with_aux(problem)(with_tangent(inner.w, step), at, data)
        return estimated(found, source, "FiniteDifference", theta, data, residual)
