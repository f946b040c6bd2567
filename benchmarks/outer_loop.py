"""Measure what `bilevel.minimize` adds to the time of an outer step.

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \\
        taskset -c 0 python -m benchmarks.outer_loop [--steps 3000] [--rounds 7] [--out FILE]

The problem is a ridge regression on 64 samples of 22 features with one penalty for each feature. An outer step takes
one inner step, one term of the Neumann series and one step of Adam. Each round times, one after the other:

- a hand-written loop that calls one jitted step, on constant data and on an iterator of NumPy batches;
- `minimize` with the same solver, method and optimiser: with the default arguments on both kinds of data, and with a
  callback after each step on constant data.

The command prints the medians over rounds, and the median difference from the hand-written loop in the same round. It
then runs 20,000 steps on an iterator and prints the seconds between the last batch and the result. Last, it prints the
number of traces of the inner objective in a second call of `minimize` with the same objects.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

SAMPLES, FEATURES = 64, 22
LONG = 20_000


class Workload:
    """The problem, its data, and the two loops that solve the problem."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.data = rng.normal(size=(SAMPLES, FEATURES)).astype(np.float32), rng.normal(size=SAMPLES).astype(np.float32)
        self.traces = 0
        self.problem = bl.Problem(
            bl.Stationary(self.objective), lambda w, theta, data: jnp.mean((data[0] @ w - data[1]) ** 2)
        )
        self.solver, self.method = bl.GradientDescent(0.1, 1), bl.Implicit(bl.Neumann(1, 0.1))
        self.optimizer = optax.adam(0.01)
        self.start = jnp.zeros(FEATURES), jnp.zeros(FEATURES)
        self.step = jax.jit(self.one_step)

    def objective(self, w: jax.Array, theta: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        self.traces += 1
        return 0.5 * jnp.mean((data[0] @ w - data[1]) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)

    def one_step(self, theta, state, w, adjoint, data):
        out = self.method(self.problem, self.solver, theta, w, data, adjoint)
        updates, state = self.optimizer.update(out.gradient, state, theta)
        return optax.apply_updates(theta, updates), state, out.inner.w, out.linear.solution, out.value, out.status

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            yield tuple(array.copy() for array in self.data)

    def by_hand(self, batches: Iterator, steps: int) -> None:
        theta, w = self.start
        state, adjoint = self.optimizer.init(theta), w
        for data in itertools.islice(batches, steps):
            theta, state, w, adjoint, *_ = self.step(theta, state, w, adjoint, data)
        jax.block_until_ready(theta)

    def minimize(self, data: object, steps: int, **options: object) -> bl.Minimum:
        return bl.minimize(self.problem, *self.start, data, self.solver, self.method, self.optimizer, steps, **options)


def times(workload: Workload, steps: int, rounds: int) -> dict[str, list[float]]:
    """Return, for each loop, the microseconds of a step in each round."""
    on_device = jax.tree.map(jnp.asarray, workload.data)
    loops: dict[str, Callable[[], object]] = {
        "by hand, constant data": lambda: workload.by_hand(itertools.repeat(on_device), steps),
        "minimize, constant data": lambda: workload.minimize(workload.data, steps),
        "by hand, iterator": lambda: workload.by_hand(workload.batches(), steps),
        "minimize, iterator": lambda: workload.minimize(workload.batches(), steps),
        "minimize, callback": lambda: workload.minimize(workload.data, steps, callback=lambda *_: None),
    }
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):  # the first round compiles
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            if number:
                found[name].append((time.perf_counter() - began) / steps * 1e6)
    return found


def seconds_after_the_last_step(workload: Workload) -> float:
    """Return the seconds between the last of 20,000 batches and the return of ``minimize``."""
    last = 0.0

    def timed() -> Iterator:
        nonlocal last
        for batch in itertools.islice(workload.batches(), LONG):
            last = time.perf_counter()
            yield batch

    workload.minimize(timed(), LONG)
    return time.perf_counter() - last


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outer_loop", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="outer steps of each timed loop (default: 3000)")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default: 7)")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args(arguments)
    workload = Workload()
    found = times(workload, options.steps, options.rounds)
    record: dict[str, object] = {"steps": options.steps, "rounds": options.rounds, "microseconds": {}, "added": {}}
    for name, values in found.items():
        hand = found["by hand, iterator" if "iterator" in name else "by hand, constant data"]
        added = statistics.median(ours - theirs for ours, theirs in zip(values, hand, strict=True))
        record["microseconds"][name], record["added"][name] = statistics.median(values), added
        print(f"{name:24} {statistics.median(values):7.1f} µs a step  {added:+7.1f} µs against the loop by hand")
    record["seconds_after_last_step"] = seconds_after_the_last_step(workload)
    print(f"{LONG} steps: the result came {record['seconds_after_last_step']:.2f} s after the last batch")
    before = workload.traces
    workload.minimize(workload.data, options.steps + 1)
    record["traces_of_second_call"] = workload.traces - before
    print(f"traces of a second call: {record['traces_of_second_call']}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
