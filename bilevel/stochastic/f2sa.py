"""F2SA: a fully first-order method, which penalises the inner problem in place of an adjoint."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax

from bilevel import tree
from bilevel.stochastic.protocol import Draws, Oracle, State, register
from bilevel.stochastic.rates import Power, Rate, at_step, check_count, descend
from bilevel.stochastic.samples import Sampling

PENALTY = Power(10.0, -1 / 7)
"""The default of λ. It grows as (t + 1)^(1/7) at step t, with the exponent of the paper."""


@register("inner_rate", "outer_rate", "penalty")
@dataclass(frozen=True)
class F2SA:
    """Fully first-order stochastic approximation: no second derivatives, and no adjoint.

    G is the inner objective, and outer is the outer function. The sequence y follows the minimiser of G, and the
    sequence z follows the minimiser of outer + λG. In each step both start from their last values and take
    ``inner_steps`` steps

        y ← y − ρ ∇G(y),        z ← z − ρ(∇G(z) + ∇outer(z)/λ),

    and then θ moves against ∂outer/∂θ(z) + λ(∂G/∂θ(z) − ∂G/∂θ(y)). Each of these steps uses the same inner batch for y
    and z. The error of this hypergradient is of the order of 1/λ. The result has w = y and the adjoint λ(y − z), which
    tends to the solution of Aᵀv = g.

    Args:
        inner_rate: ρ, a :data:`Rate`; None for one that is estimated: see :func:`choose_rates`. The paper lets it fall
            with the exponent 4/7.
        outer_rate: γ, as for ``inner_rate``, or an optax transformation. The paper lets it fall with the exponent 5/7.
        penalty: λ > 0, a :data:`Rate`. It grows as t^(1/7) in the paper; a number keeps it constant.
        inner_steps: steps of y and z for each step of θ.
        inner_batch: as for :class:`SOBA`.
        outer_batch: as for :class:`SOBA`.
        sampling: as for :class:`SOBA`.

    Raises:
        ValueError: for ``inner_steps`` below 1; from :func:`minimize`, for a penalty that is not above 0.

    Source: Kwon, Kwon, Wright, Nowak (2023), A fully first-order method for stochastic bilevel optimization,
    algorithm 1, with ρ/λ as the step size of z.
    """

    inner_rate: Rate | None = None
    outer_rate: Any = None
    penalty: Rate = PENALTY
    inner_steps: int = 1
    inner_batch: int = 64
    outer_batch: int = 64
    sampling: Sampling = "with_replacement"

    needs_objective: ClassVar[bool] = True
    evaluates_only_draws: ClassVar[bool] = True
    exponents: ClassVar[tuple[float, float]] = (4 / 7, 5 / 7)

    def __post_init__(self) -> None:
        check_count("F2SA", inner_steps=self.inner_steps)

    @property
    def draws(self) -> tuple[int, int]:
        """An inner and an outer batch for each step of y and z, and one of each for θ."""
        return self.inner_steps + 1, self.inner_steps + 1

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the state with y and z at w."""
        del oracle
        return replace(state, memory=state.w)

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step."""
        rate, penalty = at_step(self.inner_rate, state.step), at_step(self.penalty, state.step)

        def move(k, points):
            y, z = points
            of_y, _ = oracle.objective(draws.inner[k], y, state.theta)
            of_z, _ = oracle.objective(draws.inner[k], z, state.theta)
            outer = oracle.outer(draws.outer[k], z, state.theta)
            lagrangian = tree.add(of_z, tree.scale(1 / penalty, outer.in_w))
            return descend(points, rate, oracle.average((of_y, lagrangian)))

        y, z = jax.lax.fori_loop(0, self.inner_steps, move, (state.w, state.memory))
        _, of_y = oracle.objective(draws.inner[-1], y, state.theta)
        _, of_z = oracle.objective(draws.inner[-1], z, state.theta)
        outer = oracle.outer(draws.outer[-1], z, state.theta)
        direction = tree.add(outer.in_theta, tree.scale(penalty, tree.subtract(of_z, of_y)))
        theta, optimizer = oracle.move_theta(self.outer_rate, state, oracle.average(direction))
        adjoint = tree.scale(penalty, tree.subtract(y, z))
        return replace(state, w=y, adjoint=adjoint, memory=z, theta=theta, optimizer=optimizer)
