"""AmIGO: several steps for w and for the adjoint from warm starts, then one for θ."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax

from bilevel import tree
from bilevel.stochastic.protocol import Draws, Oracle, State, register
from bilevel.stochastic.rates import Rate, at_step, check_count, descend
from bilevel.stochastic.samples import Sampling


@register("inner_rate", "linear_rate", "outer_rate")
@dataclass(frozen=True)
class AmIGO:
    """Amortized implicit gradient optimization: w and the adjoint follow θ by several steps each.

    In each step, w takes ``inner_steps`` steps of stochastic gradient descent from its last value. Then the adjoint
    takes ``linear_steps`` steps on Aᵀv = g from its last value. Then θ takes one step. Each of these steps draws an
    inner batch of its own. The steps of the adjoint and of θ share one outer batch.

    Args:
        inner_rate: as for :class:`SOBA`.
        linear_rate: as for :class:`SOBA`.
        outer_rate: as for :class:`SOBA`.
        inner_steps: steps of w for each step of θ.
        linear_steps: steps of the adjoint for each step of θ.
        inner_batch: as for :class:`SOBA`.
        outer_batch: as for :class:`SOBA`.
        sampling: as for :class:`SOBA`.

    Raises:
        ValueError: for ``inner_steps`` or ``linear_steps`` below 1.

    Source: Arbel, Mairal (2022), Amortized implicit differentiation for stochastic bilevel optimization, algorithm 1.
    """

    inner_rate: Rate | None = None
    linear_rate: Rate | None = None
    outer_rate: Any = None
    inner_steps: int = 10
    linear_steps: int = 10
    inner_batch: int = 64
    outer_batch: int = 64
    sampling: Sampling = "with_replacement"

    evaluates_only_draws: ClassVar[bool] = True
    exponents: ClassVar[tuple[float, float]] = (0.5, 0.5)

    def __post_init__(self) -> None:
        check_count("AmIGO", inner_steps=self.inner_steps, linear_steps=self.linear_steps)

    @property
    def draws(self) -> tuple[int, int]:
        """An inner batch for each step of w, of the adjoint and of θ, and one outer batch for the adjoint and θ."""
        return self.inner_steps + self.linear_steps + 1, 1

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the state unchanged."""
        del oracle
        return state

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step."""
        inner_rate, linear_rate = at_step(self.inner_rate, state.step), at_step(self.linear_rate, state.step)

        def move_w(k, w):
            # XLA removes the products with the adjoint, which nothing uses here.
            residual = oracle.inner(draws.inner[k], w, state.adjoint, state.theta).residual
            return descend(w, inner_rate, oracle.average(residual))

        w = jax.lax.fori_loop(0, self.inner_steps, move_w, state.w)
        outer = oracle.outer(draws.outer[0], w, state.theta)

        def move_adjoint(k, adjoint):
            transposed = oracle.inner(draws.inner[self.inner_steps + k], w, adjoint, state.theta).transposed
            return descend(adjoint, linear_rate, oracle.average(tree.subtract(transposed, outer.in_w)))

        adjoint = jax.lax.fori_loop(0, self.linear_steps, move_adjoint, state.adjoint)
        cross = oracle.inner(draws.inner[-1], w, adjoint, state.theta).cross
        theta, optimizer = oracle.move_theta(
            self.outer_rate, state, oracle.average(tree.subtract(outer.in_theta, cross))
        )
        return replace(state, w=w, adjoint=adjoint, theta=theta, optimizer=optimizer)
