"""SABA: variance reduction by tables of the terms of every batch."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

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
    """Stochastic average bilevel algorithm: SOBA with tables of the terms of every batch (SAGA).

    For each of the five terms F, Aᵀv, Bᵀv, g and h, a table holds one row for each batch of the fixed partition: the
    term of this batch when it was last drawn. The estimate from batch i is

        new term of batch i − row i + mean of the rows,

    after which the new term becomes row i. Near the solution the noise vanishes, so constant rates converge linearly on
    a strongly convex problem. All rows are zero at the beginning.

    If the Hessians of the batches differ much, a rate that SOBA tolerates can be too large for SABA.

    Args:
        inner_rate: as for :class:`SOBA`; a constant rate is usual.
        linear_rate: as for :class:`SOBA`; a constant rate is usual.
        outer_rate: as for :class:`SOBA`; a constant rate is usual.
        inner_batch: as for :class:`SOBA`. Larger batches make the tables smaller.
        outer_batch: as for :class:`SOBA`.
        sampling: as for :class:`SOBA`.
        memory_limit: the largest size of the tables in bytes. The default is half of the free memory of the device, or
            of the machine if the device does not report its memory, as a CPU.

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

    draws: ClassVar[tuple[int, int]] = (1, 1)
    evaluates_only_draws: ClassVar[bool] = True
    exponents: ClassVar[tuple[float, float]] = (0.0, 0.0)

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the state with tables of zeros."""
        inner, outer = InnerTerms(state.w, state.w, state.theta), (state.w, state.theta)
        check_memory(oracle, inner, outer, self.memory_limit)
        return replace(
            state, tables=(Table.zeros(oracle.inner_samples, inner), Table.zeros(oracle.outer_samples, outer))
        )

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step."""
        inner_table, outer_table = state.tables
        inner = oracle.inner(draws.inner[0], state.w, state.adjoint, state.theta)
        outer = oracle.outer(draws.outer[0], state.w, state.theta)
        inner, inner_table = inner_table.reduced(oracle.inner_samples, draws.inner[0], inner)
        (in_w, in_theta), outer_table = outer_table.reduced(oracle.outer_samples, draws.outer[0], outer[1:])
        moves = oracle.average(directions(inner, OuterTerms(outer.value, in_w, in_theta)))
        theta, optimizer = oracle.move_theta(self.outer_rate, state, moves.theta)
        return replace(
            move_inner(self, state, moves), theta=theta, optimizer=optimizer, tables=(inner_table, outer_table)
        )


class Table(NamedTuple):
    """A table with one row for each batch, and the mean of its rows.

    The last new row waits outside of the table until the next step. A step therefore writes before it reads, and XLA
    updates the table in place. If it read a row and then replaced it, XLA would fuse the read with later operations,
    and copy the whole table in every step.

    The change of the mean is computed one step later, from ``waiting`` and ``replaced``, and added by Kahan's
    compensated summation. If it were computed from the new terms in the step that makes them, XLA might compute these
    terms twice, with different roundings. The mean would then drift away from the mean of the rows, and bias the
    estimate.

    Attributes:
        rows: the terms of each batch, ``[batches, …]`` for each leaf.
        mean: the mean of the rows.
        lost: the rounding error of the last addition to ``mean``, which the next step subtracts.
        waiting: the last new row, which is not in ``rows`` yet.
        replaced: the row that ``waiting`` will replace.
        place: the index of this row.
    """

    rows: PyTree
    mean: PyTree
    lost: PyTree
    waiting: PyTree
    replaced: PyTree
    place: jax.Array

    @classmethod
    def zeros(cls, samples: Samples, like: PyTree) -> "Table":
        """Return a table of zeros."""
        rows = jax.tree.map(lambda leaf: jnp.zeros((samples.batches, *leaf.shape), leaf.dtype), like)
        zeros = jax.tree.map(jnp.zeros_like, like)
        return cls(rows, zeros, zeros, zeros, zeros, jnp.int32(0))

    def reduced(self, samples: Samples, number: jax.Array, new: PyTree) -> tuple[Any, "Table"]:
        """Return the estimate of the mean from the new terms of one batch, and the table with these terms."""
        write = partial(jax.lax.dynamic_update_index_in_dim, index=self.place, axis=0)
        rows = jax.tree.map(lambda rows, row: write(rows, row), self.rows, self.waiting)
        change = tree.subtract(self.waiting, self.replaced)
        step = tree.subtract(tree.scale(1 / samples.batches, change), self.lost)
        mean = tree.add(self.mean, step)
        lost = tree.subtract(tree.subtract(mean, self.mean), step)
        old = jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, number, keepdims=False), rows)
        return tree.add(tree.subtract(new, old), mean), Table(rows, mean, lost, new, old, number)
