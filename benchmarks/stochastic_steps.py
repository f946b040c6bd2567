"""Time a step of `bl.stochastic.minimize` and of a hand-written scan, for several numbers of samples and parameters.

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \\
        taskset -c 0 python -m benchmarks.stochastic_steps [--rounds 7] [--out FILE]

The problem is a logistic regression in float32 with one penalty for all parameters, and a validation loss. SOBA and
SABA are timed next to the same arithmetic in a hand-written ``jax.lax.scan``. The scan reads contiguous batches. Their
numbers are drawn at random, with replacement, before the timing. The sizes are:

- batches of 64 out of 10³ to 10⁶ samples of 22 features;
- batches of 8 out of 64 samples of 10³ to 10⁶ features, with one parameter for each feature.

In each round, `minimize` and the hand-written scan are timed one after the other. The command prints the median time
of each, and the median of the ratio of both times in a round. Only calls after the compilation are timed. The exit
status is 1 if a step of SOBA takes more than 1.3 times as long as in the hand-written scan, for any size. In both, a
step on 10⁶ samples takes longer than a step on 10³ samples, because the samples no longer fit into the caches of the
processor.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bilevel as bl

RATE = 0.01
FEATURES, BATCH = 22, 64
FEW, SMALL_BATCH = 64, 8
"""Number of samples, and the size of a batch, in the runs whose number of parameters varies."""
LIMIT = 1.3
SIZES = (10**3, 10**4, 10**5, 10**6)


def loss(w: jax.Array, x: jax.Array) -> jax.Array:
    """Return the mean logistic loss of samples whose labels are in their last column."""
    return jnp.mean(jax.nn.softplus(-x[:, -1] * (x[:, :-1] @ w)))


def inner(w: jax.Array, theta: jax.Array, x: jax.Array) -> jax.Array:
    return loss(w, x) + 0.5 * jnp.exp(theta) * jnp.vdot(w, w)


PROBLEM = bl.Problem(bl.Stationary(inner), lambda w, theta, x: loss(w, x))


def samples(count: int, features: int, seed: int) -> jax.Array:
    """Return samples as rows.

    A row holds standard normal features, divided by the square root of the number of features, and then the label,
    which is the sign of the first feature.
    """
    x = jax.random.normal(jax.random.key(seed), (count, features), jnp.float32)
    return jnp.concatenate([x / features**0.5, jnp.sign(x[:, :1])], axis=1)


class Ours:
    """`bl.stochastic.minimize` on given samples."""

    def __init__(self, algorithm: Any, x: jax.Array, y: jax.Array, steps: int) -> None:
        self.arguments = PROBLEM, jnp.float32(0), jnp.zeros(x.shape[1] - 1, jnp.float32), x, y, algorithm
        self.steps = steps
        self.state = self.run(None)

    def run(self, state: Any) -> Any:
        found = bl.stochastic.minimize(*self.arguments, steps=self.steps, evaluate_every=self.steps, state=state)
        return jax.block_until_ready(found.state)

    def __call__(self) -> None:
        self.state = self.run(self.state)


class ByHand:
    """The same arithmetic in a scan: SABA with ``tables``, otherwise SOBA."""

    def __init__(self, tables: bool, x: jax.Array, y: jax.Array, steps: int, batch: int) -> None:
        w, batches = jnp.zeros(x.shape[1] - 1, jnp.float32), len(x) // batch
        self.carry: Any = jnp.float32(0), w, w
        if tables:
            mean = (w, w, self.carry[0], w, self.carry[0])
            rows = jax.tree.map(lambda row: jnp.zeros((batches, *row.shape), row.dtype), mean)
            self.carry = self.carry, rows, mean
        self.carry = jax.tree.map(jnp.copy, self.carry)  # each leaf is donated, so no two may be the same array
        order = jax.random.randint(jax.random.key(2), (steps, 2), 0, batches)
        scan = jax.jit(partial(_scan, tables, batch), donate_argnums=0)
        self.scan: Callable[[Any], Any] = lambda carry: scan(carry, order, x, y)
        self()

    def __call__(self) -> None:
        self.carry = jax.block_until_ready(self.scan(self.carry))


def _terms(carry, number, x, y, batch):
    theta, w, v = carry
    first, second = (jax.lax.dynamic_slice_in_dim(a, i * batch, batch) for a, i in zip((x, y), number, strict=True))
    residual, pull_back = jax.vjp(lambda w, theta: jax.grad(inner)(w, theta, first), w, theta)
    transposed, cross = pull_back(v)
    in_w = jax.grad(loss)(w, second)
    return residual, transposed, cross, in_w, jnp.zeros_like(theta)


def _moved(carry, terms):
    theta, w, v = carry
    residual, transposed, cross, in_w, in_theta = terms
    return theta - RATE * (in_theta - cross), w - RATE * residual, v - RATE * (transposed - in_w)


def _scan(tables, batch, carry, order, x, y):
    def soba(carry, number):
        return _moved(carry, _terms(carry, number, x, y, batch)), None

    def saba(carry, number):
        carry, rows, mean = carry
        new, numbers = _terms(carry, number, x, y, batch), (number[0],) * 3 + (number[1],) * 2
        old = [row[i] for row, i in zip(rows, numbers, strict=True)]
        moved = _moved(carry, [a - b + m for a, b, m in zip(new, old, mean, strict=True)])
        mean = tuple(m + (a - b) * batch / len(x) for a, b, m in zip(new, old, mean, strict=True))
        rows = tuple(row.at[i].set(a) for row, i, a in zip(rows, numbers, new, strict=True))
        return (moved, rows, mean), None

    return jax.lax.scan(saba if tables else soba, carry, order)[0]


def compare(name: str, count: int, features: int, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Return the microseconds of a step of `minimize` and of the scan, and the median of their ratio in a round."""
    x, y = samples(count, features, 0), samples(count, features, 1)
    algorithm = getattr(bl.stochastic, name)(RATE, RATE, RATE, inner_batch=batch, outer_batch=batch)
    sides = Ours(algorithm, x, y, steps), ByHand(name == "SABA", x, y, steps, batch)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for side, found in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            found.append((time.perf_counter() - began) / steps * 1e6)
    ratio = statistics.median(ours / hand for ours, hand in zip(*times, strict=True))
    return {"ours": statistics.median(times[0]), "by hand": statistics.median(times[1]), "ratio": ratio}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stochastic_steps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default: 7)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of samples and of parameters")
    parser.add_argument("--steps", type=int, default=30_000, help="steps of a timed call (default: 30000)")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args(arguments)
    record: list[dict[str, Any]] = []
    sizes: list[int] = list(options.sizes)
    for name, kind, size in itertools.product(("SOBA", "SABA"), ("samples", "parameters"), sizes):
        by_samples = kind == "samples"
        count, features, batch = (size, FEATURES, BATCH) if by_samples else (FEW, size, SMALL_BATCH)
        # A step on many parameters takes longer, so fewer steps are enough.
        steps = options.steps if by_samples else max(20, min(options.steps, 300 * options.steps // size))
        found = compare(name, count, features, batch, steps, options.rounds)
        record.append({"algorithm": name, kind: size, **found})
        times = f"{found['ours']:10.1f} µs a step, by hand {found['by hand']:10.1f}, ratio {found['ratio']:.2f}"
        print(f"{name}, {size:9,} {kind:10} {times}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    worst = max(found["ratio"] for found in record if found["algorithm"] == "SOBA")
    print(f"SOBA takes at most {worst:.2f} times the time of the hand-written scan; the limit is {LIMIT}")
    return 1 if worst > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
