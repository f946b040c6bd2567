"""The compiled loop: the first state of a run, and chunks of steps that end with an evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.problem import Problem
from bilevel.stochastic.placement import Placement
from bilevel.stochastic.protocol import Draws, Oracle, State, is_mean_over_samples
from bilevel.stochastic.samples import Samples, draw, even_batch
from bilevel.types import PyTree

SMALL_BATCHES = 2**16
"""The largest number of bytes in an inner and an outer batch together for which :func:`_take_steps` is used. With
larger batches, a step takes so long that the branch makes no difference, and the second loop would only take time to
compile."""


class Record(NamedTuple):
    """One evaluation: the step, what ``evaluate`` returned, the norms of the directions, and the status.

    ``evaluations`` is None without ``evaluate``, and ``norms`` is () without ``measure``. The compiled program leaves
    the status out, and the host adds it.
    """

    step: Any
    evaluations: PyTree
    norms: tuple[Any, ...]
    status: Any = ()


@dataclass(frozen=True)
class Plan:
    """The constants of the compiled program. The numbers of the algorithm are arguments of the program instead."""

    problem: Problem
    structure: Any
    classes: tuple[type, ...]
    constants: tuple[Any, ...]
    placement: Placement
    sizes: tuple[int, ...]
    evaluate: Any
    evaluate_every: int
    measure: bool
    project: Any

    def algorithm(self, numbers: list[Any]) -> Any:
        """Return the algorithm with its numbers."""
        rest = iter(numbers)
        return jax.tree.unflatten(
            self.structure, [next(rest) if constant is None else constant for constant in self.constants]
        )

    def oracle(self, algorithm: Any, inner: PyTree, outer: PyTree) -> Oracle:
        """Return the oracle of one share."""
        whole = not is_mean_over_samples(self.problem.condition)
        inner_samples, outer_samples = (
            Samples(data, size, even_batch(size, batch), whole)
            for data, size, batch in zip(
                (inner, outer), self.sizes, (algorithm.inner_batch, algorithm.outer_batch), strict=True
            )
        )
        placement = self.placement
        return Oracle(self.problem, inner_samples, outer_samples, placement.axes, self.project, placement.local_shares)


def make_plan(
    problem: Problem,
    algorithm: Any,
    placement: Placement,
    inner: PyTree,
    outer: PyTree,
    evaluate: Any,
    evaluate_every: int,
    measure: bool,
    project: Any,
) -> tuple[list[float], Plan]:
    """Return the numbers of the algorithm, and the plan of the compiled program."""
    leaves, structure = jax.tree.flatten(algorithm)
    # An algorithm that is not registered as a pytree is one leaf: a constant.
    is_number = [isinstance(leaf, float | int | np.generic | np.ndarray | jax.Array) for leaf in leaves]
    numbers = [float(leaf) for leaf, number in zip(leaves, is_number, strict=True) if number]
    constants = tuple(None if number else leaf for leaf, number in zip(leaves, is_number, strict=True))
    sizes = tuple(tree.count_samples(samples, "samples") // placement.shares for samples in (inner, outer))
    classes = tuple(_classes(structure))
    plan = Plan(problem, structure, classes, constants, placement, sizes, evaluate, evaluate_every, measure, project)
    return numbers, plan


def _classes(structure: Any) -> Iterator[type]:
    """Yield the classes of the nodes of a tree structure.

    JAX compares the structures of two registered dataclasses as equal if their fields are equal, even if the classes
    differ. A class that is defined again in a notebook would then run the compiled program of the old class.
    """
    node = structure.node_data()
    if node is not None:
        yield node[0]
    for child in structure.children():
        yield from _classes(child)


@partial(jax.jit, static_argnames="plan")
def start(state: State, inner: PyTree, outer: PyTree, numbers: list[float], plan: Plan) -> State:
    """Return ``state`` with the memory and the tables that the algorithm's ``init`` makes."""
    algorithm, placement = plan.algorithm(numbers), plan.placement

    def init(state, inner, outer):
        state = algorithm.init(plan.oracle(algorithm, inner, outer), state)
        return replace(state, tables=()), state.tables

    divided = placement.divide(inner), placement.divide(outer)
    state, tables = placement.over_shares(init, "sdd", "sd")(state, *divided)
    return replace(state, tables=tables)


@partial(jax.jit, static_argnames="plan", donate_argnames="tables")
def advance(
    state: State, tables: PyTree, inner: PyTree, outer: PyTree, numbers: list[float], count: int, *, plan: Plan
) -> tuple[State, tuple[Record, jax.Array]]:
    """Take ``count`` steps, and evaluate.

    The buffers of ``tables`` are donated. Those of ``state`` are not, because the driver returns it if the
    chunk diverges.
    """
    placement = plan.placement

    def run(state, tables, inner, outer, numbers, count):
        algorithm = plan.algorithm(numbers)
        oracle = plan.oracle(algorithm, inner, outer)
        draws = _draws(state, oracle, algorithm, plan.evaluate_every)

        def step(oracle, k, state):
            moved = algorithm.step(oracle, state, jax.tree.map(lambda numbers: numbers[k], draws))
            return replace(moved, step=state.step + 1)

        state = replace(state, tables=tables)
        if _gains_from_full_batches(algorithm, oracle):
            state = _take_steps(step, oracle, draws, count, state)
        else:
            state = jax.lax.fori_loop(0, count, partial(step, oracle), state)
        norms = ()
        if plan.measure:
            norms = tuple(map(tree.norm, oracle.full(state.w, state.adjoint, state.theta)))
        return replace(state, tables=()), state.tables, norms

    over_shares = placement.over_shares(run, "sdddss", "sds")
    state, tables, norms = over_shares(state, tables, placement.divide(inner), placement.divide(outer), numbers, count)
    evaluated = None if plan.evaluate is None else plan.evaluate(state.theta, state.w)
    record = Record(state.step, evaluated, norms)
    return replace(state, tables=tables), (record, largest_entry(state))


def _gains_from_full_batches(algorithm, oracle):
    """Return whether the samples and the algorithm allow :func:`_take_steps`, and whether it saves time."""
    samples = oracle.inner_samples, oracle.outer_samples
    has_rest, size = any(part.rest for part in samples), sum(part.batch_bytes for part in samples)
    # The declaration is not inherited, because the step of a subclass may evaluate batches that are not drawn.
    declares = "evaluates_only_draws" in vars(type(algorithm)) and algorithm.evaluates_only_draws is True
    return has_rest and size <= SMALL_BATCHES and declares


def _take_steps(step, oracle, draws, count, state):
    """Return the state after ``count`` steps of an algorithm that evaluates only batches that are drawn.

    A step that draws a smaller last batch needs a branch for it, which costs some percent of the time of a cheap step.
    So the steps between two such draws are a loop of their own, without the branch.
    """
    smaller = oracle.inner_samples.is_smaller(draws.inner), oracle.outer_samples.is_smaller(draws.outer)
    is_smaller = jnp.any(jnp.concatenate(smaller, axis=1), axis=1)
    if oracle.axes:  # all shares take the same path
        is_smaller = jax.lax.pmax(is_smaller.astype(jnp.int32), oracle.axes) > 0
    steps, count = len(is_smaller), jnp.asarray(count, jnp.int32)
    next_smaller = jax.lax.cummin(jnp.where(is_smaller, jnp.arange(steps, dtype=jnp.int32), steps), reverse=True)

    def through_the_next_smaller_batch(at):
        k, state = at
        end = jnp.minimum(next_smaller[k], count)
        state = jax.lax.fori_loop(k, end, partial(step, oracle.on_full_batches()), state)
        # One step, or none at the end. A loop changes the state in place, and a branch would copy it.
        after = jnp.minimum(end + 1, count)
        return after, jax.lax.fori_loop(end, after, partial(step, oracle), state)

    return jax.lax.while_loop(lambda at: at[0] < count, through_the_next_smaller_batch, (jnp.int32(0), state))[1]


def _draws(state, oracle, algorithm, steps):
    """Return the indices of the batches of the next steps, ``[steps, draws]``."""
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    share = jax.lax.axis_index(oracle.axes) if oracle.axes else 0
    step = state.step.astype(jnp.uint32) + jnp.arange(steps, dtype=jnp.uint32)

    def sampler(stream, samples, count):
        numbers = step[:, None] * jnp.uint32(count) + jnp.arange(count, dtype=jnp.uint32)
        own = jax.random.fold_in(key, 2 * share + stream)
        return draw(samples, algorithm.sampling, own, numbers)

    inner, outer = algorithm.draws
    return Draws(sampler(0, oracle.inner_samples, inner), sampler(1, oracle.outer_samples, outer))


@jax.jit
def largest_entry(state: State) -> jax.Array:
    """Return the largest absolute entry of θ, w, the adjoint and the memory; it is not finite if an entry is not."""
    leaves = [leaf for leaf in jax.tree.leaves((state.theta, state.w, state.adjoint, state.memory)) if leaf.size]
    peaks = [jnp.max(jnp.abs(leaf)).astype(jnp.result_type(float)) for leaf in leaves if tree.is_floating(leaf)]
    return jnp.max(jnp.stack(peaks))
