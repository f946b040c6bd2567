"""Solvers of nonlinear least squares: GaussNewton and LevenbergMarquardt.

Both form the Jacobian J of the residuals r as a dense matrix of m residuals by n unknowns, and solve for the step
without forming JᵀJ, whose condition number is the square of that of J.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.conditions.protocol import Condition, Residual, is_gradient
from bilevel.solvers.iteration import until_converged
from bilevel.solvers.line_search import line_search
from bilevel.solvers.protocol import check_budget, report
from bilevel.types import PyTree, Solution


@dataclass(frozen=True)
class GaussNewton:
    """The Gauss-Newton method with a backtracking line search, for :class:`LeastSquares` and systems of equations.

    For m residuals r with the Jacobian J in n unknowns, the step is the shortest d that minimises ‖r + Jd‖. A singular
    value decomposition of J gives d. The step is halved until ½‖r‖² falls by at least 10⁻⁴ of the linear prediction
    (Armijo's rule). For a condition such as :class:`Root`, r is its
    residual, and the method is Newton's. The m·n entries of J are stored, so use :class:`HessianFree` for a
    :class:`LeastSquares` with very many unknowns.

    Args:
        max_steps: the budget. Each step takes a Jacobian (the smaller of m and n products), a decomposition of it, and
            residuals in the line search.
        tol: stop at ‖F‖ ≤ tol with the condition's residual F, which is Jᵀr for :class:`LeastSquares`; None takes up to
            ``max_steps``, with status BUDGET_USED.
        halvings: as for :class:`HessianFree`.
        lower, upper: bounds of w, each a number, or a pytree like w; None for no bound. They keep the iterates where
            the residuals are defined, for example above zero for a logarithm. The start and every step are clipped to
            them. The solution must lie inside the bounds. If the minimum within the bounds lies on a bound, F is not
            zero there, and ``tol`` is not met. Use :class:`Projected` as the condition of such a problem.

    Raises:
        ValueError: for a negative budget, tol or number of halvings, and, when called, for a condition that is the
            gradient of an objective and has no residuals, and for bounds with another tree structure than w.

    Source: Nocedal and Wright (2006), section 10.3.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import LeastSquares
        >>> decay = LeastSquares(lambda w, theta, data: jnp.exp(-w * jnp.arange(3.0)) - data)
        >>> data = jnp.array([1.0, 0.5, 0.25])
        >>> round(float(GaussNewton(10, tol=1e-6)(decay, jnp.float32(0.0), None, data).w), 4)  # log 2
        0.6931
    """

    max_steps: int
    tol: float | None = None
    halvings: int = 20
    lower: PyTree = None
    upper: PyTree = None

    traceable = True

    def __post_init__(self) -> None:
        check_budget("GaussNewton", self.max_steps, self.tol)
        if self.halvings < 0:
            raise ValueError(f"GaussNewton needs halvings of at least 0, got {self.halvings}")

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        residuals, x, as_w = _on_vectors("GaussNewton", condition, init, theta, data)
        lower, upper = (self._bound(bound, init) for bound in (self.lower, self.upper))

        def potential(x):
            r = residuals(x)
            return 0.5 * jnp.vdot(r, r)

        def update(x, residual):
            del residual
            r, jacobian = residuals(x), _jacobian(residuals, x)
            gradient, step = jacobian.T @ r, -jnp.linalg.lstsq(jacobian, r)[0]
            if lower is not None or upper is not None:
                # A clipped Newton step may point uphill. A clipped gradient step never does.
                clipped, downwards = (jnp.clip(x + d, lower, upper) - x for d in (step, -gradient))
                step = jnp.where(jnp.vdot(gradient, clipped) < 0, clipped, downwards)
            return line_search(potential, x, gradient, step, self.halvings)

        x, residual, steps = until_converged(
            update,
            lambda x: condition.residual(as_w(x), theta, data),
            x if lower is None and upper is None else jnp.clip(x, lower, upper),
            self.max_steps,
            self.tol,
        )
        return report(residual, as_w(x), steps, self.tol)

    def _bound(self, bound: PyTree, init: PyTree) -> jax.Array | None:
        """Return a bound as a vector like w, or None."""
        if bound is None:
            return None
        if (got := jax.tree.structure(bound)) != jax.tree.structure(init):
            if not jax.tree_util.all_leaves([bound]):
                raise ValueError(
                    "GaussNewton needs bounds that are numbers or have the tree structure of w, "
                    f"{jax.tree.structure(init)}, got {got}"
                )
            bound = jax.tree.map(lambda leaf: bound, init)
        filled = jax.tree.map(
            lambda leaf, value: jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape), init, bound
        )
        return ravel_pytree(tree.widened(filled))[0]


@dataclass(frozen=True)
class LevenbergMarquardt:
    """The Levenberg-Marquardt method, for :class:`LeastSquares` and systems of equations.

    For m residuals r with the Jacobian J in n unknowns, the step d minimises ‖r + Jd‖² + μ‖d‖². A QR decomposition of
    the matrix with the rows of J and of √μ·I gives d. The step is taken if ½‖r‖² falls, or stays the same up to
    rounding. The gain ratio ρ is the decrease of ½‖r‖² divided by the decrease that the linear model predicts. After a
    step that is taken, the damping μ is multiplied by max(⅓, 1 − (2ρ − 1)³). After the first, second, third, … refused
    step in a row, μ is multiplied by 2, 4, 8, …. There may be fewer residuals than unknowns, and J may have any rank.
    For a condition such as :class:`Root`, r is its residual. The m·n entries of J are stored.

    Args:
        max_steps: the budget, refused steps included. Each takes a Jacobian (the smaller of m and n products), a QR
            decomposition, and the residuals.
        tol: as for :class:`GaussNewton`.
        damping: the first μ divided by the largest diagonal entry of JᵀJ. Take 1 for a start that is far from the
            solution, and 10⁻⁶ for one that is close to it.

    Raises:
        ValueError: for a negative budget or tol, a damping that is not positive and finite, and, when called, for a
            condition that is the gradient of an objective and has no residuals.

    Source: Madsen, Nielsen and Tingleff (2004), Methods for non-linear least squares problems, algorithm 3.16.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import LeastSquares
        >>> rosenbrock = LeastSquares(lambda w, theta, data: (theta * (w[1] - w[0] ** 2), 1 - w[0]))
        >>> solution = LevenbergMarquardt(50, tol=1e-4)(rosenbrock, jnp.array([-1.2, 1.0]), jnp.float32(10.0), None)
        >>> [round(float(entry), 3) for entry in solution.w]
        [1.0, 1.0]
    """

    max_steps: int
    tol: float | None = None
    damping: float = 1e-3

    traceable = True

    def __post_init__(self) -> None:
        check_budget("LevenbergMarquardt", self.max_steps, self.tol)
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"LevenbergMarquardt needs a finite damping above 0, got {self.damping}")

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        residuals, x, as_w = _on_vectors("LevenbergMarquardt", condition, init, theta, data)

        def update(state, residual):
            del residual
            x, r, damping, growth = state
            jacobian = _jacobian(residuals, x)
            first = self.damping * jnp.max(jnp.sum(jacobian**2, axis=0), initial=0)
            damping = jnp.where(damping < 0, first, damping)
            step = _damped_step(jacobian, r, damping)
            moved = residuals(x + step)
            decrease = 0.5 * jnp.vdot(r - moved, r + moved)
            predicted = 0.5 * jnp.vdot(step, damping * step - jacobian.T @ r)
            # Near the minimum, both changes are rounding errors of ½‖r‖². The slack brings their ratio close to 1.
            slack = 4 * jnp.finfo(r.dtype).eps * jnp.vdot(r, r)
            gain = (decrease + slack) / tree.safe_divisor(predicted + slack)
            accepted = gain > 0  # False for NaN
            damping = damping * jnp.where(accepted, jnp.maximum(1 / 3, 1 - (2 * gain - 1) ** 3), growth)
            growth = jnp.where(accepted, 2.0, 2 * growth).astype(r.dtype)
            x, r = jnp.where(accepted, x + step, x), jnp.where(accepted, moved, r)
            return x, r, damping, growth

        unset, growth = jnp.full((), -1, x.dtype), jnp.full((), 2, x.dtype)
        (x, *_), residual, steps = until_converged(
            update,
            lambda state: condition.residual(as_w(state[0]), theta, data),
            (x, residuals(x), unset, growth),
            self.max_steps,
            self.tol,
        )
        return report(residual, as_w(x), steps, self.tol)


def _damped_step(jacobian: jax.Array, r: jax.Array, damping: jax.Array) -> jax.Array:
    """Return argmin_d ‖r + Jd‖² + damping·‖d‖²."""
    rows, columns = jacobian.shape
    ridge = jnp.sqrt(damping) * jnp.eye(columns, dtype=jacobian.dtype)
    orthogonal, triangular = jnp.linalg.qr(jnp.concatenate([jacobian, ridge]))
    return -jax.scipy.linalg.solve_triangular(triangular, orthogonal[:rows].T @ r)


def _on_vectors(
    name: str, condition: Condition, init: PyTree, theta: PyTree, data: PyTree
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array, Callable[[jax.Array], PyTree]]:
    """Return the residuals as a function of vectors, the start as a vector, and the map from such a vector to w."""
    function = _residuals(name, condition)
    x, unravel = ravel_pytree(tree.widened(init))

    def as_w(x: jax.Array) -> PyTree:
        return tree.like(unravel(x), init)

    def residuals(x: jax.Array) -> jax.Array:
        return ravel_pytree(tree.widened(tree.arrays(function(as_w(x), theta, data))))[0].astype(x.dtype)

    return residuals, x, as_w


def _residuals(name: str, condition: Condition) -> Residual:
    """Return r of ½‖r‖²: the residuals of LeastSquares, or the residual of a condition that is not a gradient."""
    if is_gradient(condition) and not hasattr(condition, "residuals"):
        raise ValueError(
            f"{name} needs the residuals of a sum of squares, and {type(condition).__name__} has only an objective: "
            "declare LeastSquares(residuals), or use HessianFree"
        )
    return getattr(condition, "residuals", condition.residual)


def _jacobian(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return the Jacobian matrix, in the mode that takes fewer products."""
    rows = jax.eval_shape(function, x).size
    return (jax.jacfwd if x.size <= rows else jax.jacrev)(function)(x)
