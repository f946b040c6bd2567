"""SABA: variance reduction by tables of the terms of every batch."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.stochastic.memory import check_memory
from bilevel.stochastic.protocol import Draws, InnerTerms, Oracle, OuterTerms, State, directions, register
from bilevel.stochastic.rates import Rate
from bilevel.stochastic.samples import Samples, Sampling
from bilevel.stochastic.soba import move_inner
from bilevel.types import PyTree


@register("inner_rate", "linear_rate", "outer_rate")
@dataclass(frozen=True)
class SABA:
    """Stochastic average bilevel algorithm: SOBA with a table of the last terms of each batch (SAGA).

    For each of the five terms F, Aᵀv, Bᵀv, g and h, a table holds one row for each batch of the fixed partition. The
    estimate from batch i is

        new term of batch i − row i + mean of the rows,

    after which the new term becomes row i. Near the solution the noise vanishes, so constant rates converge linearly on
    a strongly convex problem. All rows are zero at the beginning.

    A rate that SOBA tolerates can be too large for SABA, where the Hessians of the batches differ much.

    Args:
        inner_rate: as for :class:`SOBA`; a constant rate is usual.
        linear_rate: likewise.
        outer_rate: likewise.
        inner_batch: samples in an inner batch. Larger batches have smaller tables.
        outer_batch: samples in an outer batch.
        sampling: as for :class:`SOBA`.
        memory_limit: the largest size of the tables in bytes. By default half of what the device, or the machine for a
            CPU, has left.

    Raises:
        ValueError: from ``init``, for tables above the memory limit.

    Source: Dagréou, Ablin, Vaiter, Moreau (2022), section 3.2; Defazio, Bach, Lacoste-Julien (2014), SAGA.
    """

    inner_rate: Rate | None = None
    linear_rate: Rate | None = None
    outer_rate: Any = None
    inner_batch: int = 64
    outer_batch: int = 64
    sampling: Sampling = "with_replacement"
    memory_limit: int | None = None

    draws = (1, 1)

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the state with tables of zeros."""
        inner, outer = InnerTerms(state.w, state.w, state.theta), (state.w, state.theta)
        check_memory(oracle, inner, outer, self.memory_limit)
        return replace(state, tables=(_table(oracle.inner_samples, inner), _table(oracle.outer_samples, outer)))

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step."""
        inner_table, outer_table = state.tables
        inner = oracle.inner(draws.inner[0], state.w, state.adjoint, state.theta)
        outer = oracle.outer(draws.outer[0], state.w, state.theta)
        inner, inner_table = _reduced(oracle.inner_samples, inner_table, draws.inner[0], inner)
        (in_w, in_theta), outer_table = _reduced(oracle.outer_samples, outer_table, draws.outer[0], outer[1:])
        moves = oracle.average(directions(inner, OuterTerms(outer.value, in_w, in_theta)))
        theta, optimizer = oracle.move_theta(self.outer_rate, state, moves.theta)
        return replace(
            move_inner(self, state, moves), theta=theta, optimizer=optimizer, tables=(inner_table, outer_table)
        )


def _table(samples: Samples, like: PyTree) -> tuple[PyTree, PyTree, tuple[jax.Array, PyTree]]:
    """Return the rows, ``[batches, …]`` for each leaf, their mean, and the row that is written next with its number."""
    rows = jax.tree.map(lambda leaf: jnp.zeros((samples.batches, *leaf.shape), leaf.dtype), like)
    zeros = jax.tree.map(jnp.zeros_like, like)
    return rows, zeros, (jnp.int32(0), zeros)


def _reduced(samples: Samples, table: Any, number: jax.Array, new: PyTree) -> tuple[Any, Any]:
    """Return the estimate of the mean from the new terms of one batch, and the table with them.

    The new row is written at the beginning of the next step. Then a step writes to the table before it reads from it,
    and XLA changes the table in place. Otherwise it would copy the whole table in every step.
    """
    rows, mean, (last, row) = table
    rows = jax.tree.map(lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, last, 0), rows, row)
    old = jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, number, keepdims=False), rows)
    change = tree.subtract(new, old)
    mean, estimate = tree.add(mean, tree.scale(samples.weight(number), change)), tree.add(change, mean)
    return estimate, (rows, mean, (number, new))
