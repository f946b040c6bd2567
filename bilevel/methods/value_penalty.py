"""The value-function penalty: ValuePenalty."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from bilevel import solvers, tree
from bilevel.conditions import Stationary
from bilevel.methods.estimates import estimated
from bilevel.methods.protocol import Start, check_potential, outer_derivatives, outer_with_aux, solve_constant
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.types import Hypergradient, PyTree


@dataclass(frozen=True)
class ValuePenalty:
    """The value-function penalty: first derivatives only, and a second inner solve in place of a linear solve.

    With the inner objective L, w* = argmin L and w_ρ = argmin (L + outer/ρ), the gradient is
    ∂_θ outer(w_ρ) + ρ·(∂_θ L(w_ρ) − ∂_θ L(w*)). Its error is O(1/ρ). Rounding errors and the errors of
    the inner solves are multiplied by ρ.

    Without ``linear_init`` the penalised solve starts from the computed w*. In an outer loop it must start from the
    last w_ρ instead: the computed w* lags behind a θ that moves, and ρ multiplies that error. So ``linear_init`` is
    a pair, the start of the penalised solve and the memory of its solver. The ``warm_start`` of the result is the pair
    for the next call. Unless its warm starts are off, :func:`minimize` passes this pair on. One inner step for each
    outer step is then enough.

    JAX's derivative of the value, in θ and in data, is this estimate. The derivative of any other result is refused.
    For second derivatives use :class:`Implicit`.

    Args:
        penalty: ρ > 0.

    Raises:
        ValueError: for a ρ that is not positive and finite, and, when called, for a condition that is not the
            gradient of an objective.

    Source: Kwon, Kwon, Wright, Nowak (2023), A fully first-order method for stochastic bilevel optimization.

    Example:
        >>> from bilevel import GradientDescent, Problem, value_and_hypergradient
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> problem = Problem(condition, lambda w, theta, data: 0.5 * w**2)
        >>> function = value_and_hypergradient(problem, GradientDescent(0.5, 50), ValuePenalty(9.0))
        >>> round(float(function(1.0, 0.0, None).gradient), 4)  # θ·ρ / (ρ + 1)
        0.9
    """

    penalty: float

    start_is_constant = True

    def __post_init__(self) -> None:
        if not 0 < self.penalty < float("inf"):
            raise ValueError(
                f"ValuePenalty needs a finite penalty ρ above 0, got {self.penalty}; the error falls like 1/ρ"
            )

    def first_warm_start(self, w: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        """Return the start and the memory of the first penalised solve of an outer loop: those of the plain solve."""
        return w, memory

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient:
        condition = check_potential("ValuePenalty", problem.condition)

        def penalised(w, theta, data):
            outer, _ = outer_with_aux(problem)(w, theta, data)
            # The dtypes may differ, for example if only one of the functions uses float64 data.
            inner, outer = tree.widened((condition.potential(w, theta, data), jnp.asarray(outer)))
            return inner + outer / self.penalty

        at, data_at = jax.lax.stop_gradient((theta, data))
        inner = solve_constant(solver, condition, init, at, data_at)
        start, memory = (inner.w, None) if linear_init is None else linear_init
        at_penalised = solve_constant(solvers.resumed(solver, memory), Stationary(penalised), start, at, data_at)
        value, aux, _, _ = outer_derivatives(problem, inner.w, at, data_at)
        with_outer = jax.grad(penalised, argnums=1, allow_int=True)(at_penalised.w, at, data_at)
        plain = jax.grad(condition.potential, argnums=1, allow_int=True)(inner.w, at, data_at)
        with_outer, plain = tree.with_zeros(with_outer, theta), tree.with_zeros(plain, theta)
        gradient = tree.scale(self.penalty, tree.subtract(with_outer, plain))
        inner = replace(inner, status=jnp.maximum(inner.status, at_penalised.status))
        found = Hypergradient(value, gradient, aux, inner, None, (at_penalised.w, at_penalised.memory))
        difference = penalised(at_penalised.w, at, data) - condition.potential(inner.w, at, data)
        source = (self.penalty * difference).astype(value.dtype)
        return estimated(found, source, "ValuePenalty", theta, data, condition.residual(inner.w, at, data))
