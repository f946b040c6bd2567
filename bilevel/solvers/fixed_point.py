"""Inner solvers that iterate a mapping: FixedPointIteration, FISTA and Anderson."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel._deprecation import renamed_field
from bilevel.conditions.protocol import Condition
from bilevel.solvers.iteration import iterate, until_converged
from bilevel.solvers.protocol import check_budget, check_mapping, report
from bilevel.types import PyTree, Solution


@renamed_field("maxiter", "max_steps")
@dataclass(frozen=True)
class FixedPointIteration:
    """Fixed-point iteration: w ← mapping(w, θ, data), from ``init``, for a mapping that contracts.

    Args:
        max_steps: the budget, in evaluations of the mapping.
        tol: stop at ‖w − mapping(w)‖ ≤ tol; None takes all ``max_steps``, with status BUDGET_USED.

    Raises:
        ValueError: for a negative budget or tol, and, when called, for a condition that has no mapping.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import FixedPoint
        >>> halve = FixedPoint(lambda w, theta, data: 0.5 * w + theta)
        >>> float(FixedPointIteration(3)(halve, jnp.float32(0.0), jnp.float32(1.0), None).w)  # 1 + ½ + ¼
        1.75
    """

    max_steps: int
    tol: float | None = None

    traceable = True

    def __post_init__(self) -> None:
        check_budget("FixedPointIteration", self.max_steps, self.tol)

    def check(self, condition: Condition) -> None:
        check_mapping("FixedPointIteration", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        return init, None

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        # w − (w − mapping) equals the mapping up to rounding. Rounding is monotone, so an entry that the mapping keeps
        # at or above zero stays there.
        return tree.subtract(state[0], residual), None

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


@dataclass(frozen=True)
class FISTA:
    """Accelerated proximal gradient descent, for :class:`ProximalGradient` and :class:`Projected`.

    With T the condition's mapping and x₀ = y₀ = ``init``:

        x₊ = T(y),   t₊ = ½(1 + √(1 + 4t²)),   y₊ = x₊ + (t − 1)/t₊ · (x₊ − x),   t₀ = 1.

    Let L be the Lipschitz constant of the gradient of a convex objective, and the step size at most 1/L. After k steps,
    the error of the objective's value is of the order of 1/k². With :class:`FixedPointIteration` it is of the order of
    1/k. With ``restart``, it falls linearly if the objective is strongly convex. The last step does not extrapolate, so
    the solution of a :class:`Projected` lies in its set.

    Args:
        max_steps: the budget, in evaluations of the mapping. The reported residual takes one more, or two with a
            ``tol``.
        tol: stop at ‖y − T(y)‖ ≤ tol and return T(y); None takes all ``max_steps``, with status BUDGET_USED.
        restart: set t = 1 in a step with ⟨y − x₊, x₊ − x⟩ > 0, where the momentum points uphill.

    Raises:
        ValueError: for a negative budget or tol, and, when called, for a condition that has no mapping.

    Source: Beck and Teboulle (2009), A fast iterative shrinkage-thresholding algorithm; restart: O'Donoghue and Candès
    (2015), Adaptive restart for accelerated gradient schemes, section 3.2.

    Example:
        The objective has curvatures 1 and 0.01, and 0.1‖w‖₁ is added to it:

        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import ProximalGradient
        >>> def objective(w, theta, data):
        ...     return 0.5 * jnp.vdot(jnp.array([1.0, 0.01]), (w - theta) ** 2)
        >>> def shrink(w, theta, data, step_size):
        ...     return jnp.sign(w) * jnp.maximum(jnp.abs(w) - 0.1 * step_size, 0)
        >>> lasso = ProximalGradient(objective, shrink)
        >>> solution = FISTA(200, tol=1e-5)(lasso, jnp.zeros(2), jnp.array([1.0, 30.0]), None)
        >>> [round(float(entry), 2) for entry in solution.w], int(solution.steps) < 100
        ([0.9, 20.0], True)
    """

    max_steps: int
    tol: float | None = None
    restart: bool = True

    traceable = True

    def __post_init__(self) -> None:
        check_budget("FISTA", self.max_steps, self.tol)

    def check(self, condition: Condition) -> None:
        check_mapping("FISTA", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        one = jnp.ones((), tree.norm(init).dtype)
        return init, (init, *tree.match_varying_axes(init, one, jnp.int32(0))[1:])

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        y, (last_x, t, count) = state
        x = tree.subtract(y, residual)
        step = tree.subtract(x, last_x)
        if self.restart:
            t = jnp.where(tree.vdot(residual, step) > 0, jnp.ones_like(t), t)
        next_t = 0.5 * (1 + jnp.sqrt(1 + 4 * t**2))
        factor = jnp.where(count + 1 < self.max_steps, (t - 1) / next_t, jnp.zeros_like(t))
        return tree.add(x, tree.scale(factor, step)), (x, next_t, count + 1)

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        if self.tol is None:
            return iterate(self, condition, init, theta, data)
        self.check(condition)

        def residual(w: PyTree) -> PyTree:
            return condition.residual(w, theta, data)

        (y, _), last, steps = until_converged(
            self.update, lambda state: residual(state[0]), self.start(init), self.max_steps, self.tol
        )
        x = tree.subtract(y, last)  # T(y)
        return report(residual(x), x, steps, self.tol, stopped=tree.norm(last) <= self.tol)


@renamed_field("maxiter", "max_steps")
@dataclass(frozen=True)
class Anderson:
    """Fixed-point iteration with Anderson's acceleration, which combines past steps to make the residual small.

    It can converge where the mapping does not contract. On an affine mapping, with a history of all steps, it is
    essentially equivalent to GMRES.

    Args:
        max_steps: the budget, in evaluations of the mapping.
        tol: stop at ‖w − mapping(w)‖ ≤ tol; None takes all ``max_steps``, with status BUDGET_USED.
        history: how many past steps are combined, at most as many as w has entries. Each past step takes the memory of
            two vectors like w.

    Raises:
        ValueError: for a negative budget or tol, a history below one, and, when called, for a condition that
            has no mapping.

    Source: Walker and Ni (2011), Anderson acceleration for fixed-point iterations, algorithm AA.

    Example:
        For a rotation by a quarter turn about (0.5, 0.5), fixed-point iteration would go round in a circle:

        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import FixedPoint
        >>> turn = FixedPoint(lambda w, theta, data: jnp.array([-w[1], w[0]]) + theta)
        >>> solution = Anderson(10, tol=1e-4)(turn, jnp.zeros(2), jnp.array([1.0, 0.0]), None)
        >>> [round(float(entry), 3) for entry in solution.w], int(solution.status)
        ([0.5, 0.5], 0)
    """

    max_steps: int
    tol: float | None = None
    history: int = 5

    traceable = True

    def __post_init__(self) -> None:
        check_budget("Anderson", self.max_steps, self.tol)
        if self.history < 1:
            raise ValueError(f"Anderson needs a history of at least 1, got {self.history}")

    def check(self, condition: Condition) -> None:
        check_mapping("Anderson", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        flat = ravel_pytree(tree.widened(init))[0]
        zeros = jnp.zeros_like(flat)
        # More differences than unknowns would be linearly dependent, and their mix would be undetermined.
        rows = max(1, min(self.history, flat.size))
        differences, products = jnp.zeros((rows, flat.size), flat.dtype), jnp.zeros((rows, rows), flat.dtype)
        return init, (zeros, zeros, differences, differences, products, jnp.int32(0))

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        w, (last_value, last_residual, steps_value, steps_residual, products, count) = state
        flat, unravel = ravel_pytree(tree.widened(w))
        flat_residual = ravel_pytree(tree.widened(residual))[0]
        value = flat - flat_residual  # of the mapping
        has_previous, slot = count > 0, (count - 1) % steps_value.shape[0]
        step_value = jnp.where(has_previous, value - last_value, jnp.zeros_like(value))
        step_residual = jnp.where(has_previous, flat_residual - last_residual, jnp.zeros_like(value))
        # Both steps are divided by ‖step_residual‖, which does not change the mix of the steps. It is a constant for
        # derivatives, because the norm of a zero step has none.
        length = tree.safe_divisor(tree.norm(jax.lax.stop_gradient(step_residual)))
        steps_value = steps_value.at[slot].set(step_value / length)
        unit = step_residual / length
        steps_residual = steps_residual.at[slot].set(unit)
        row = _times(steps_residual, unit)
        products = products.at[slot].set(row).at[:, slot].set(row)
        mix = _least_squares(products, _times(steps_residual, flat_residual))
        next_w = tree.like(unravel(value - _times(mix, steps_value)), w)
        return next_w, (value, flat_residual, steps_value, steps_residual, products, count + 1)

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


_times = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _least_squares(products: jax.Array, projections: jax.Array) -> jax.Array:
    """Return argmin_c ‖target − c·rows‖, for rows of length 1 or 0.

    ``products`` is rows·rowsᵀ and ``projections`` is rows·target. The normal equations are solved with a ridge of
    10·eps.
    """
    ridge = 10 * jnp.finfo(products.dtype).eps * jnp.eye(len(products), dtype=products.dtype)
    return jnp.linalg.solve(products + ridge, projections)
