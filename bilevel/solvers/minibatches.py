"""An inner solver that sees a random batch of the samples at each step: Minibatches."""

from dataclasses import dataclass

import jax

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.solvers.descent import GradientDescent, Optax
from bilevel.solvers.protocol import report
from bilevel.types import PyTree, Solution


@dataclass(frozen=True)
class Minibatches:
    """Stochastic gradient descent: each step of ``solver`` takes the gradient on a random batch of the data.

    ``data`` is a pytree of arrays with one leading axis of samples, and the objective is a mean over the samples in
    ``data``. The batches are drawn with replacement. The residual in the Solution is the true one, on all samples,
    and costs one gradient on all of them. Its norm does not fall below the noise of the last steps, so let the step
    size fall: pass a schedule, such as ``optax.exponential_decay``. A method that differentiates the solution, such as
    :class:`Implicit`, uses all samples. :func:`bilevel.stochastic.minimize` uses batches for the derivatives too.

    Args:
        solver: a :class:`GradientDescent` or :class:`Optax` without ``tol``. Its ``max_steps`` is the number of
            batches.
        batch: the number of samples in a batch.
        seed: the seed of the random batches. Every call draws the same batches.

    Raises:
        ValueError: for any other solver, for a solver with a ``tol``, and for a batch below 1. When called, for a
            condition that is not a gradient, and for data without samples or with leaves of different leading axes.

    Source: Robbins and Monro (1951); for hypergradients, Ji, Yang and Liang (2021), algorithm 2 (stocBiO).

    Example:
        The mean of 1,000 numbers, from batches of 10:

        >>> import jax.numpy as jnp
        >>> import optax
        >>> from bilevel.conditions import Stationary
        >>> mean = Stationary(lambda w, theta, data: 0.5 * jnp.mean((w - data) ** 2))
        >>> descent = GradientDescent(optax.exponential_decay(0.5, 100, 0.5), max_steps=1000)
        >>> numbers = jnp.linspace(0.0, 1.0, 1000)
        >>> solution = Minibatches(descent, batch=10)(mean, jnp.float32(0.0), None, numbers)
        >>> round(float(solution.w), 1), bool(solution.residual_norm < 0.01)
        (0.5, True)
    """

    solver: GradientDescent | Optax
    batch: int
    seed: int = 0

    traceable = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, GradientDescent | Optax) or self.solver.tol is not None:
            raise ValueError(
                "Minibatches needs a GradientDescent or an Optax with tol=None, because the residual of a batch tells "
                f"nothing about convergence; got {self.solver}"
            )
        if self.batch < 1:
            raise ValueError(f"Minibatches needs a batch of at least 1 sample, got {self.batch}")

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        self.solver.check(condition)
        data = tree.arrays(data, "data")
        count = tree.count_samples(data, "Minibatches")
        key = jax.random.key(self.seed)

        def advance(step: jax.Array, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            drawn = jax.random.randint(jax.random.fold_in(key, step), (self.batch,), 0, count)
            batch = jax.tree.map(lambda leaf: leaf[drawn], data)
            return self.solver.update(state, condition.residual(state[0], theta, batch))

        w, _ = jax.lax.fori_loop(0, self.solver.max_steps, advance, self.solver.start(init))
        return report(condition.residual(w, theta, data), w, self.solver.max_steps)
