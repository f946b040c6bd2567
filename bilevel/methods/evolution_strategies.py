"""Hypergradients from samples of the outer value: EvolutionStrategies."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.methods.estimates import constant, estimated
from bilevel.methods.protocol import Start, outer_with_aux, solve_constant
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.types import Hypergradient, PyTree


@dataclass(frozen=True)
class EvolutionStrategies:
    """Antithetic samples of the outer value, for an inner solver that cannot be differentiated.

    The smoothed outer value is the mean of outer(w(θ + σε)) over random ε. Its gradient is estimated from pairs θ ± σε.
    The ε are orthogonal and of length √d, where d is the number of entries of θ. With d pairs the estimate consists of
    central differences in a random basis, with an error of O(σ²). With fewer pairs the estimate is random. Its mean has
    the same error of O(σ²), and its variance falls as the number of pairs grows.

    JAX's derivative of the value in θ is this estimate. The derivative of the value in data, and any derivative of
    another result, raises an error. Use :class:`Implicit` for these derivatives.

    Args:
        pairs: the number of directions; at most d are used. Each direction takes two inner solves, and the value at θ
            takes one more.
        scale: σ > 0.
        seed: the seed of the directions ε. They depend on θ too, and equal θ gives equal directions.

    Raises:
        ValueError: for fewer than one pair or a scale that is not positive.

    Source: Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers;
    orthogonal directions: Choromanski et al. (2018).

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import Problem, Stationary, value_and_hypergradient
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

    start_is_constant = True

    def __post_init__(self) -> None:
        if self.pairs < 1 or not self.scale > 0:
            raise ValueError(
                f"EvolutionStrategies needs pairs of at least 1 and a scale above 0, got {self.pairs} and {self.scale}"
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
        del linear_init  # this method solves no linear system
        at, data_at = jax.lax.stop_gradient((theta, data))
        floats, join = tree.partition_inexact(at)
        flat, unravel = ravel_pytree(tree.widened(floats))

        def value_at(flat):
            theta = join(tree.like(unravel(flat), floats))
            inner = solve_constant(solver, problem.condition, init, theta, data_at)
            value, aux = outer_with_aux(problem)(inner.w, theta, data_at)
            return value, aux, inner

        def derivative_along(direction):
            ahead, behind = (value_at(flat + sign * self.scale * direction)[0] for sign in (1, -1))
            return direction * ((ahead - behind) / (2 * self.scale)).astype(flat.dtype)

        value, aux, inner = value_at(flat)
        gradient = jnp.mean(jax.lax.map(derivative_along, self._directions(flat)), axis=0)
        gradient = tree.with_zeros(join(tree.like(unravel(gradient), floats)), theta)
        found = Hypergradient(value, gradient, aux, inner, None)
        residual = problem.condition.residual(inner.w, at, data_at)
        source = constant("EvolutionStrategies", value, (data, residual))
        return estimated(found, source, "EvolutionStrategies", theta, data, residual)

    def _directions(self, flat: jax.Array) -> jax.Array:
        """Return orthogonal rows of length √d, drawn from a key that depends on θ."""
        key = jax.random.fold_in(
            jax.random.key(self.seed), jax.lax.bitcast_convert_type(jnp.sum(flat).astype(jnp.float32), jnp.uint32)
        )
        normal = jax.random.normal(key, (flat.size, min(self.pairs, flat.size)), flat.dtype)
        return jnp.linalg.qr(normal)[0].T * jnp.sqrt(jnp.asarray(flat.size, flat.dtype))
