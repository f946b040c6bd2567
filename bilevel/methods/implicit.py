"""The implicit function theorem as a method: Implicit."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import solvers, tree
from bilevel.conditions.protocol import is_gradient
from bilevel.linear import check_linear
from bilevel.methods.protocol import Start, outer_derivatives, starting_point
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.theorem import (
    adjoint_matvec,
    check_symmetry,
    probe_symmetry,
    pull_back_to_theta,
    solve_implicitly,
    solve_scaled,
)
from bilevel.types import Hypergradient, LinearSolver, PyTree


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: one adjoint system at the inner solution, whatever solver found it.

    Memory does not grow with the inner steps. The gradient is exact if w and the adjoint are. Otherwise its error is of
    the order of ‖F(w)‖, the norm of the condition's residual, plus the residual of the linear solver.

    Args:
        linear: solves the adjoint system; :class:`CG`, :class:`Cholesky`, :class:`Nystrom`, and :class:`Lineax` with CG
            or Cholesky need a symmetric one. A function ``(matvec, b) -> x`` is accepted too. One more product then
            gives the true residual of its x.

    Raises:
        TypeError: for a linear solver that cannot be called with (matvec, b), such as a class in place of an instance.
        ValueError: when called, for a linear solver that needs a symmetric operator if the condition is not declared
            symmetric.

    Source: Rajeswaran et al. (2019), algorithm 2; Pedregosa (2016).

    Example:
        >>> from bilevel import CG, GradientDescent, Problem, Stationary, value_and_hypergradient
        >>> problem = Problem(Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2), lambda w, theta, data: w)
        >>> function = value_and_hypergradient(problem, GradientDescent(1.0, 1), Implicit(CG(1)))
        >>> float(function(3.0, 0.0, None).gradient)
        6.0
    """

    linear: LinearSolver

    start_is_constant = True

    def __post_init__(self) -> None:
        check_linear("Implicit", self.linear)

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient:
        condition = problem.condition
        check_symmetry(self.linear, condition)
        inner = solve_implicitly(condition, solver, self.linear, theta, starting_point(init, theta, data), data)
        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, theta, data)
        residual, matvec = adjoint_matvec(condition, inner.w, theta, data)
        inner = solvers.with_residual(inner, solver, residual)
        scaling, symmetric = condition.scaling(theta, data), is_gradient(condition)
        right_hand_side = _computed_after(inner.residual_norm, outer_w)
        adjoint, info = solve_scaled(self.linear, matvec, right_hand_side, scaling, symmetric, linear_init)
        if condition.symmetric and not symmetric:
            info = probe_symmetry(info, matvec, condition, inner.w, theta, data)
        through_w = pull_back_to_theta(condition, inner.w, theta, data, adjoint)
        return Hypergradient(value, tree.subtract(outer_theta, through_w), aux, inner, info)


def _computed_after(number: jax.Array, v: PyTree) -> PyTree:
    """Return ``v`` with a zero added that depends on ``number``.

    XLA then computes ``number`` first and frees its buffers. Otherwise it may keep the inner residual alive through
    the whole linear solve.
    """
    leaves, structure = jax.tree.flatten(v)
    if leaves:
        zero = jax.lax.stop_gradient(jnp.where(jnp.isfinite(number), 0 * number, 0))
        leaves[0] = leaves[0] + zero.astype(leaves[0].dtype)
    return jax.tree.unflatten(structure, leaves)
