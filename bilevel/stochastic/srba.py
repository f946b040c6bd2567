"""SRBA: variance reduction by recursive estimates of the directions."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.stochastic.protocol import Directions, Draws, Oracle, State, register
from bilevel.stochastic.rates import Rate, check_count
from bilevel.stochastic.samples import Sampling
from bilevel.stochastic.soba import move_inner


@register("inner_rate", "linear_rate", "outer_rate")
@dataclass(frozen=True)
class SRBA:
    """Stochastic recursive bilevel algorithm: directions over all samples, corrected by batches (SARAH).

    Every q-th step computes the three directions over all samples. In the steps between, each direction is corrected by

        D ← D + (direction of a batch at the new point) − (direction of the same batch at the previous point).

    Such a step makes twice as many evaluations as one of :class:`SOBA`. Every q-th step makes a pass over all samples.
    The algorithm has no tables. Constant rates converge linearly on a strongly convex problem.

    Args:
        inner_rate: as for :class:`SOBA`; a constant rate is usual.
        linear_rate: as for :class:`SOBA`; a constant rate is usual.
        outer_rate: as for :class:`SOBA`; a constant rate is usual.
        period: q. By default the number of inner batches plus that of outer batches, divided by 2. The steps between
            two passes then draw about as many samples as one pass.
        inner_batch: as for :class:`SOBA`.
        outer_batch: as for :class:`SOBA`.
        sampling: as for :class:`SOBA`.

    Raises:
        ValueError: for a period below 1.

    Source: Dagréou, Moreau, Vaiter, Ablin (2023), A near-optimal algorithm for bilevel empirical risk minimization,
    algorithm 1; Nguyen, Liu, Scheinberg, Takáč (2017), SARAH.
    """

    inner_rate: Rate | None = None
    linear_rate: Rate | None = None
    outer_rate: Any = None
    period: int | None = None
    inner_batch: int = 64
    outer_batch: int = 64
    sampling: Sampling = "with_replacement"

    draws: ClassVar[tuple[int, int]] = (1, 1)
    evaluates_only_draws: ClassVar[bool] = True
    exponents: ClassVar[tuple[float, float]] = (0.0, 0.0)

    def __post_init__(self) -> None:
        check_count("SRBA", period=self.period)

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the state with the first point, and with age 0, so that the first step evaluates all samples."""
        point = state.w, state.adjoint, state.theta
        zero = Directions(*jax.tree.map(jnp.zeros_like, point))
        return replace(state, memory=(point, zero, jnp.int32(0)))

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step."""
        period = self.period or max(1, (oracle.inner_samples.batches + oracle.outer_samples.batches) // 2)
        previous, estimate, age = state.memory
        point = state.w, state.adjoint, state.theta

        def evaluated():
            # Integer leaves of θ have no direction. Those of a pass are different arrays on each device, and the two
            # branches must agree on that.
            return tree.with_others(oracle.full(*point), estimate)

        def corrected():
            change = oracle.change(draws.inner[0], draws.outer[0], point, previous)
            return tree.add(estimate, oracle.average(change))

        # The age is the number of steps since the last pass, modulo the period. It is not the step modulo the period,
        # because after a divergence a run begins anew at a step that need not be a multiple of the period.
        moves = jax.lax.cond(age == 0, evaluated, corrected)
        theta, optimizer = oracle.move_theta(self.outer_rate, state, moves.theta)
        memory = point, moves, (age + 1) % period
        return replace(move_inner(self, state, moves), theta=theta, optimizer=optimizer, memory=memory)
