"""Hypergradients without second derivatives: by differences, by a penalty, by samples.

Each stands where :class:`~bilevel.Implicit` does. Their errors do not vanish with the residuals: a step size,
a penalty or a number of samples bounds them, and each says by how much.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import solvers, tree
from bilevel.conditions import Condition, Stationary
from bilevel.hypergradients import outer_derivatives, outer_with_aux, solve_scaled, starting_point
from bilevel.linear import CG, Neumann
from bilevel.types import Hypergradient, PyTree


@dataclass(frozen=True)
class FiniteDifference:
    """The implicit function theorem with central differences of gradients for every second derivative.

    A u ≈ (F(w + εu) − F(w − εu)) / 2ε and, as B = ∂_θ∇_w L, Bᵀv ≈ (∇_θL(w + εv) − ∇_θL(w − εv)) / 2ε. The error
    is O(ε²) from the third derivative and eps/ε from rounding; the default ε, eps^⅓·(1 + ‖w‖) / ‖u‖, balances
    both, which leaves some eps^⅔: 2e-5 in float32, 4e-11 in float64.

    Args:
        linear: solves the adjoint system by products alone: :class:`CG` or :class:`Neumann`. ``Neumann(1, α)``
            is DARTS, one step of the inner solver unrolled.
        step: ε·‖u‖ / (1 + ‖w‖); None for eps^⅓.

    Raises:
        ValueError: for a step that is not positive, another linear solver, and, when called, for a condition
            that is no gradient of an objective.

    Source: Liu, Simonyan, Yang (2019), DARTS, equation 8.

    Example:
        >>> from bilevel import GradientDescent, Problem, value_and_hypergradient
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2)
        >>> problem = Problem(condition, lambda w, theta, data: w)
        >>> method = FiniteDifference(CG(1))
        >>> round(float(value_and_hypergradient(problem, GradientDescent(1.0, 1), method)(3.0, 0.0, None).gradient), 2)
        6.0
    """

    linear: CG | Neumann
    step: float | None = None

    def __post_init__(self):
        if self.step is not None and not self.step > 0:
            raise ValueError(f"FiniteDifference needs a step above 0, got {self.step}; None for the cube root of eps")
        if not isinstance(self.linear, CG | Neumann):
            raise ValueError(
                f"FiniteDifference needs a solver that works by products, CG or Neumann, got {self.linear}"
            )

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        condition = problem.condition
        _check_potential("FiniteDifference", condition)
        inner = _solve(solver, condition, init, theta, data)

        def along(function, u):
            """d function(w + εu)/dε at 0, of length ‖u‖."""
            size, reach = tree.norm(u), 1 + tree.norm(inner.w)
            step = tree.eps(inner.w) ** (1 / 3) if self.step is None else self.step
            epsilon = step * reach / jnp.where(size > 0, size, jnp.ones_like(size))
            ahead, behind = (function(tree.add(inner.w, tree.scale(e, u))) for e in (epsilon, -epsilon))
            return tree.scale(0.5 / epsilon, tree.subtract(ahead, behind))

        def matvec(u):
            return along(lambda w: condition.residual(w, theta, data), u)

        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, theta, data)
        adjoint, info = solve_scaled(self.linear, matvec, outer_w, condition.scaling(theta, data), True, linear_init)
        slope = jax.grad(condition.potential, argnums=1, allow_int=True)
        through_w = along(lambda w: tree.with_zeros(slope(w, theta, data), theta), adjoint)
        return Hypergradient(value, tree.subtract(outer_theta, through_w), aux, inner, info)


@dataclass(frozen=True)
class ValuePenalty:
    """The value-function penalty: first derivatives only, and a second inner solve instead of a linear one.

    With w* = argmin L and w_ρ = argmin (L + outer/ρ) the gradient is
    ∂_θ outer(w_ρ) + ρ·(∂_θ L(w_ρ) − ∂_θ L(w*)), which is off by O(1/ρ); rounding and the inner solves' errors
    are multiplied by ρ.

    Args:
        penalty: ρ > 0.

    Raises:
        ValueError: for a ρ that is not positive and finite, and, when called, for a condition that is no
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

    def __post_init__(self):
        if not 0 < self.penalty < float("inf"):
            raise ValueError(f"ValuePenalty needs a penalty ρ above 0, got {self.penalty}; the error falls like 1/ρ")

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        del linear_init  # no linear system
        condition = problem.condition
        _check_potential("ValuePenalty", condition)

        def leaning(w, theta, data):
            return condition.potential(w, theta, data) + outer_with_aux(problem)(w, theta, data)[0] / self.penalty

        inner = _solve(solver, condition, init, theta, data)
        pulled = _solve(solver, Stationary(leaning), inner.w, theta, data)
        value, aux, _, _ = outer_derivatives(problem, inner.w, theta, data)
        slope = jax.grad(leaning, argnums=1, allow_int=True)(pulled.w, theta, data)
        plain = jax.grad(condition.potential, argnums=1, allow_int=True)(inner.w, theta, data)
        slope, plain = tree.with_zeros(slope, theta), tree.with_zeros(plain, theta)
        gradient = tree.scale(self.penalty, tree.subtract(slope, plain))
        inner = replace(inner, status=jnp.maximum(inner.status, pulled.status))
        return Hypergradient(value, gradient, aux, inner, None)


@dataclass(frozen=True)
class EvolutionStrategies:
    """Antithetic samples of the outer value: for an inner loop that is a black box.

    The gradient of E outer(w(θ + σε)), estimated from pairs θ ± σε along orthogonal directions of length √d, d the
    entries of θ. With d pairs it is central differences in a random basis, with an error of O(σ²); with fewer it
    is an unbiased estimate of that, whose variance falls as pairs are added.

    Args:
        pairs: directions, each two inner solves; at most d are used.
        scale: σ > 0.
        seed: of the directions. They change with θ too, and are the same at the same θ.

    Raises:
        ValueError: for fewer than one pair or a scale that is not positive.

    Source: Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers;
    orthogonal directions: Choromanski et al. (2018).

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import Problem, value_and_hypergradient
        >>> condition = Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - theta) ** 2))
        >>> problem = Problem(condition, lambda w, theta, data: 0.5 * jnp.sum(w**2))
        >>> black_box = lambda condition, init, theta, data: theta
        >>> function = value_and_hypergradient(problem, black_box, EvolutionStrategies(pairs=2, scale=0.1))
        >>> [round(float(entry), 2) for entry in function(jnp.array([1.0, 2.0]), jnp.zeros(2), None).gradient]
        [1.0, 2.0]
    """

    pairs: int
    scale: float = 0.01
    seed: int = 0

    def __post_init__(self):
        if self.pairs < 1 or not self.scale > 0:
            raise ValueError(
                f"EvolutionStrategies needs pairs of at least 1 and a scale above 0, got {self.pairs} and {self.scale}"
            )

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        del linear_init  # no linear system
        floats, join = tree.split_floating(theta)
        flat, unravel = ravel_pytree(tree.widened(floats))

        def value_at(flat):
            theta = join(tree.like(unravel(flat), floats))
            inner = _solve(solver, problem.condition, init, theta, data)
            value, aux = outer_with_aux(problem)(inner.w, theta, data)
            return value, aux, inner

        def slope_along(direction):
            ahead, behind = (value_at(flat + sign * self.scale * direction)[0] for sign in (1, -1))
            return direction * ((ahead - behind) / (2 * self.scale)).astype(flat.dtype)

        value, aux, inner = value_at(flat)
        gradient = jnp.mean(jax.lax.map(slope_along, self._directions(flat)), axis=0)
        return Hypergradient(
            value, tree.with_zeros(join(tree.like(unravel(gradient), floats)), theta), aux, inner, None
        )

    def _directions(self, flat):
        """Orthogonal rows of length √d, drawn anew where θ changes."""
        key = jax.random.fold_in(
            jax.random.key(self.seed), jax.lax.bitcast_convert_type(jnp.sum(flat).astype(jnp.float32), jnp.uint32)
        )
        normal = jax.random.normal(key, (flat.size, min(self.pairs, flat.size)), flat.dtype)
        return jnp.linalg.qr(normal)[0].T * jnp.sqrt(jnp.asarray(flat.size, flat.dtype))


def _solve(solver, condition: Condition, init, theta: PyTree, data: PyTree):
    return jax.lax.stop_gradient(solvers.solve(solver, condition, starting_point(init, theta, data), theta, data))


def _check_potential(name, condition):
    if not hasattr(condition, "potential"):
        raise ValueError(
            f"{name} differentiates an inner objective, and {type(condition).__name__} is no gradient of one: use "
            "Stationary or Proximal, or Implicit, which takes any condition"
        )
