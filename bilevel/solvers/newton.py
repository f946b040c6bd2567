"""Newton's method without a Hessian matrix: HessianFree."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel._deprecation import renamed_field
from bilevel.conditions.protocol import Condition
from bilevel.linear.system import in_accumulation_dtype, normalise
from bilevel.linear.watched_cg import conjugate_gradients
from bilevel.solvers.iteration import until_converged
from bilevel.solvers.line_search import line_search
from bilevel.solvers.protocol import check_budget, check_gradient, report
from bilevel.types import MatVec, PyTree, Solution


@renamed_field("steps", "max_steps")
@dataclass(frozen=True)
class HessianFree:
    """Newton's method with directions from a few CG steps, and a backtracking line search.

    With the inner gradient F and Hessian H, a few CG steps on H d = −F give the direction d. CG stops at a search
    direction whose curvature is negative, zero, or positive only by a rounding error. It then returns the iterate
    before that direction, or −F if that direction is the first one. So d always is a descent direction. The step is
    halved until the objective falls by at least 10⁻⁴ of the linear prediction (Armijo's rule).

    Args:
        max_steps: the budget, in Newton steps. Each takes a gradient, up to ``cg_steps`` products, and values of
            the objective in the line search.
        cg_steps: the largest number of products with the Hessian for one direction.
        tol: stop at ‖F‖ ≤ tol; None takes up to ``max_steps``, with status BUDGET_USED.
        halvings: how often a step is halved at most. If Armijo's rule then still fails, the last trial is taken if its
            objective is not above that of w; otherwise w stays.

    Raises:
        ValueError: for a negative budget, tol or number of halvings, fewer than one CG step, and, when called, for a
            condition that is not a gradient.

    Source: Martens (2010); Nocedal and Wright (2006), algorithm 7.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> float(HessianFree(max_steps=1)(condition, jnp.float32(0.0), jnp.float32(3.0), None).w)
        3.0
    """

    max_steps: int
    cg_steps: int = 5
    tol: float | None = None
    halvings: int = 20

    traceable = True

    def __post_init__(self) -> None:
        check_budget("HessianFree", self.max_steps, self.tol)
        if self.cg_steps < 1 or self.halvings < 0:
            raise ValueError(
                "HessianFree needs cg_steps of at least 1 and halvings of at least 0, "
                f"got {self.cg_steps} and {self.halvings}"
            )

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        objective = check_gradient("HessianFree", condition)

        def residual(w):
            return condition.residual(w, theta, data)

        def potential(w):
            return objective.potential(w, theta, data)

        def update(w, gradient):
            direction = _truncated_newton(jax.linearize(residual, w)[1], gradient, self.cg_steps)
            return line_search(potential, w, gradient, direction, self.halvings)

        w, gradient, steps = until_converged(update, residual, init, self.max_steps, self.tol)
        return report(gradient, w, steps, self.tol)


def _truncated_newton(matvec: MatVec, gradient: PyTree, cg_steps: int) -> PyTree:
    """Return a descent direction d ≈ −H⁻¹ gradient, by conjugate gradients that stop at negative curvature."""
    size, unit, _ = normalise(gradient)
    eps = float(jnp.finfo(size.dtype).eps)
    minus = tree.widened(tree.scale(-1, unit))
    state = conjugate_gradients(in_accumulation_dtype(matvec, gradient), minus, None, cg_steps, eps, truncate=True)
    return tree.scale(size, tree.like(state.x, gradient))
