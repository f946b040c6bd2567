"""SOBA and MA-SOBA: each step draws one inner and one outer batch."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.stochastic.protocol import Directions, Draws, Oracle, State, directions, register
from bilevel.stochastic.rates import Power, Rate, at_step, descend
from bilevel.stochastic.samples import Sampling

AVERAGING = Power(1.0, 0.5)
"""Default of ``MASOBA.averaging``: β = 1/√(t + 1) at step t. Estimated rates of SOBA fall with the same exponent."""


@register("inner_rate", "linear_rate", "outer_rate")
@dataclass(frozen=True)
class SOBA:
    """Stochastic bilevel algorithm: each step moves w, the adjoint v and θ, on one inner and one outer batch.

    A step evaluates the three directions at (w, v, θ), before it moves any of these. F, A, B, g and h are those of
    ``bilevel.stochastic.protocol``:

        w ← w − ρ F,        v ← v − ρ′(Aᵀv − g),        θ ← θ − γ(h − Bᵀv).

    A step costs one gradient and one Hessian-vector product on the inner batch, and one gradient on the outer batch.
    The noise of a batch keeps w, v and θ at a distance from the solution that shrinks with the rates.

    Args:
        inner_rate: ρ, a :data:`Rate`; None for one that is estimated: see :func:`choose_rates`.
        linear_rate: ρ′, a :data:`Rate`. None stands for the value of ``inner_rate`` if that is given, and otherwise for
            the estimated inner rate.
        outer_rate: γ, as for ``inner_rate``, or an optax transformation.
        inner_batch: the largest number of samples in an inner batch; the batches are made nearly equal.
        outer_batch: the largest number of samples in an outer batch.
        sampling: ``"with_replacement"``, or ``"without_replacement"`` for a new order of the batches in each epoch.

    Source: Dagréou, Ablin, Vaiter, Moreau (2022), algorithm 1 with equation 6.
    """

    inner_rate: Rate | None = None
    linear_rate: Rate | None = None
    outer_rate: Any = None
    inner_batch: int = 64
    outer_batch: int = 64
    sampling: Sampling = "with_replacement"

    draws: ClassVar[tuple[int, int]] = (1, 1)
    evaluates_only_draws: ClassVar[bool] = True
    exponents: ClassVar[tuple[float, float]] = (0.5, 0.5)

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the state unchanged."""
        del oracle
        return state

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step."""
        moves = batch_directions(oracle, state, draws)
        theta, optimizer = oracle.move_theta(self.outer_rate, state, moves.theta)
        return replace(move_inner(self, state, moves), theta=theta, optimizer=optimizer)


@register("inner_rate", "linear_rate", "outer_rate", "averaging")
@dataclass(frozen=True)
class MASOBA:
    """Moving-average SOBA: SOBA whose θ moves against a moving average of its direction.

        θ ← θ − γ m,        m ← (1 − β) m + β(h − Bᵀv)

    The average m begins with zero and lowers the noise in θ.

    Args:
        inner_rate: as for :class:`SOBA`.
        linear_rate: as for :class:`SOBA`.
        outer_rate: as for :class:`SOBA`.
        averaging: β, a :data:`Rate` above 0 and of at most 1. The default is 1/√(t + 1) at step t.
        inner_batch: as for :class:`SOBA`.
        outer_batch: as for :class:`SOBA`.
        sampling: as for :class:`SOBA`.

    Raises:
        ValueError: from :func:`minimize`, for a number β that is not above 0 and at most 1.

    Source: Chen, Xiao, Balasubramanian (2023), Optimal algorithms for stochastic bilevel optimization under relaxed
    smoothness conditions, algorithm 1.
    """

    inner_rate: Rate | None = None
    linear_rate: Rate | None = None
    outer_rate: Any = None
    averaging: Rate = AVERAGING
    inner_batch: int = 64
    outer_batch: int = 64
    sampling: Sampling = "with_replacement"

    draws: ClassVar[tuple[int, int]] = (1, 1)
    evaluates_only_draws: ClassVar[bool] = True
    exponents: ClassVar[tuple[float, float]] = (0.5, 0.5)

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the state with an average of zero."""
        del oracle
        return replace(state, memory=jax.tree.map(jnp.zeros_like, state.theta))

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step."""
        moves = batch_directions(oracle, state, draws)
        theta, optimizer = oracle.move_theta(self.outer_rate, state, state.memory)
        average = descend(state.memory, at_step(self.averaging, state.step), tree.subtract(state.memory, moves.theta))
        return replace(move_inner(self, state, moves), theta=theta, optimizer=optimizer, memory=average)


def batch_directions(oracle: Oracle, state: State, draws: Draws) -> Directions:
    """Return the directions on the first inner and the first outer batch of a step.

    If the samples are divided into shares, such as one for each device (see :class:`Oracle`), the result is the mean
    over the shares.
    """
    inner = oracle.inner(draws.inner[0], state.w, state.adjoint, state.theta)
    return oracle.average(directions(inner, oracle.outer(draws.outer[0], state.w, state.theta)))


def move_inner(algorithm: Any, state: State, moves: Directions) -> State:
    """Return the state with w and the adjoint moved against their directions."""
    return replace(
        state,
        w=descend(state.w, at_step(algorithm.inner_rate, state.step), moves.w),
        adjoint=descend(state.adjoint, at_step(algorithm.linear_rate, state.step), moves.adjoint),
    )
