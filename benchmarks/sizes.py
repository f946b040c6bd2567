"""Measure the time of derivatives through an inner solution in bilevel, jaxopt and Optimistix, in one process.

    taskset -c 0 python -m benchmarks.sizes [--rounds 15] [--sizes 1 3 50 500 10000] [--no-record]

The inner problem is a ridge regression with one penalty exp(θⱼ) for each of n features, on min(n, 100) samples. By
default n goes from 1 to 10,000. All libraries evaluate 20 gradients for gradient descent; bilevel may evaluate one more
for its report. Optimistix evaluates its first gradient without an update of w, so its 20 gradients make 19 updates. CG
has the tolerance 1e-6. In Optimistix, this tolerance is relative and absolute, and is tested entry by entry. CG takes
at most 10 iterations in bilevel and jaxopt, and has lineax's own limit in Optimistix. The outer value is the validation
error, and its derivative in θ has n entries. Below, ``loss(theta, data)`` is the outer value at the inner solution.
These calls are timed:

- under jit: ``jax.jit`` of ``loss`` and of ``jax.value_and_grad(loss)``, and ``jax.jit`` of our hypergradient;
- vmap over 256 under jit: ``jax.value_and_grad(loss)`` under ``jax.vmap`` over 256 θ, for at most 50 unknowns;
- eagerly: ``loss`` and ``jax.value_and_grad(loss)`` without ``jit``;
- from Python: our hypergradient and our layer, called without ``jax.jit``. They compile themselves in the first call,
  and check the statuses in each call. The layer without a check has ``on_failure="ignore"``. The other libraries'
  functions, and the gradient of our layer, are compiled with ``jax.jit``.

A round times every contender once, and the order alternates between rounds. The table has the median time of a call in
microseconds. It also has the median over rounds of our time divided by that of the faster of the other two libraries in
the same round. A ratio below 1 means that ours is faster. The record is written to benchmarks/results/sizes.json,
unless ``--no-record`` is given.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx

import bilevel as bl
from benchmarks.children import ROOT
from benchmarks.speed.harness import machine
from benchmarks.speed.peers.linear_models import objective, validation

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg

STEPS, STEP_SIZE, ITERATIONS, TOL = 20, 0.5, 10, 1e-6
BATCH = 256
LIBRARIES = ("bilevel", "jaxopt", "optimistix")
Program = Callable[[], object]


def fit(w, theta, data):
    return objective("ridge", w, theta, data)


def arrays(n: int):
    """Return θ, data and start for n unknowns."""
    rng = np.random.default_rng(n)
    rows = min(n, 100)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    data = {"x": draw(rows, n) / n**0.5, "y": draw(rows), "x_val": draw(rows, n) / n**0.5, "y_val": draw(rows)}
    return 0.1 * draw(n), data, jnp.zeros(n, jnp.float32)


CONDITION = bl.Stationary(fit, positive_definite=True)
SOLVER, LINEAR = bl.GradientDescent(STEP_SIZE, STEPS), bl.CG(ITERATIONS, TOL)
LAYER = bl.implicit_layer(CONDITION, SOLVER, LINEAR)
UNCHECKED = bl.implicit_layer(CONDITION, SOLVER, LINEAR, on_failure="ignore")
HYPERGRADIENT = bl.value_and_hypergradient(
    bl.Problem(CONDITION, lambda w, theta, data: validation("ridge", w, data)), SOLVER, bl.Implicit(LINEAR)
)


def solvers(init) -> dict[str, Callable]:
    """Return, for each library, the inner solution as a differentiable function of θ and data."""
    slope = jax.grad(fit)

    @custom_root(slope, solve=lambda matvec, b: solve_cg(matvec, b, maxiter=ITERATIONS, tol=TOL))
    def descend(w, theta, data):
        return jax.lax.fori_loop(0, STEPS, lambda _, w: w - STEP_SIZE * slope(w, theta, data), w)

    # See benchmarks/speed/peers/optimistix_adjoint.py for the settings.
    solver = optx.GradientDescent(STEP_SIZE, rtol=0.0, atol=0.0)
    adjoint = optx.ImplicitAdjoint(lx.CG(rtol=TOL, atol=TOL, max_steps=None))
    tags = frozenset({lx.positive_semidefinite_tag})

    def minimise(theta, data):
        return optx.minimise(
            lambda w, arguments: fit(w, *arguments), solver, init, (theta, data),
            max_steps=STEPS, adjoint=adjoint, throw=False, tags=tags,
        ).value  # fmt: skip

    return {
        "bilevel": lambda theta, data: LAYER(theta, init, data),
        "jaxopt": lambda theta, data: descend(init, theta, data),
        "optimistix": minimise,
    }


def suites(n: int) -> dict[str, dict[str, Program]]:
    """Return the programs to time for n unknowns, by suite and contender."""
    theta, data, init = arrays(n)
    losses = {
        name: lambda theta, data, solve=solve: validation("ridge", solve(theta, data), data)
        for name, solve in solvers(init).items()
    }
    slopes = {name: jax.value_and_grad(loss) for name, loss in losses.items()}
    compiled = {name: jax.jit(slope) for name, slope in slopes.items()}
    values = {name: jax.jit(loss) for name, loss in losses.items()}
    compiled_hypergradient = jax.jit(lambda theta, data: HYPERGRADIENT(theta, init, data))

    def on(function: Callable) -> Program:
        return lambda: function(theta, data)

    found = {
        "gradient under jit": {name: on(function) for name, function in compiled.items()}
        | {"bilevel, hypergradient": on(compiled_hypergradient)},
        "value under jit": {name: on(function) for name, function in values.items()},
        "gradient from Python": {name: on(compiled[name]) for name in LIBRARIES[1:]}
        | {"bilevel, hypergradient": lambda: HYPERGRADIENT(theta, init, data), "bilevel": on(compiled["bilevel"])},
        "w from Python": {
            name: on(jax.jit(solve)) for name, solve in solvers(init).items() if name != "bilevel"
        } | {
            "bilevel": lambda: LAYER(theta, init, data),
            "bilevel, layer without a check": lambda: UNCHECKED(theta, init, data),
        },
        "gradient, eagerly": {name: on(slope) for name, slope in slopes.items()},
        "value, eagerly": {name: on(loss) for name, loss in losses.items()},
    }  # fmt: skip
    if n <= 50:
        many = theta + jnp.linspace(0, 1, BATCH)[:, None]
        mapped = {name: jax.jit(jax.vmap(slope, (0, None))) for name, slope in slopes.items()}
        found[f"vmap over {BATCH} under jit"] = {
            name: lambda function=function: function(many, data) for name, function in mapped.items()
        }
    return found


def measure(programs: dict[str, Program], rounds: int) -> dict:
    """Return the seconds of each contender by round, the medians, and the ratios to the faster other library."""
    repeats = {}
    for name, program in programs.items():
        jax.block_until_ready(program())  # compiles
        began = time.perf_counter()
        jax.block_until_ready(program())
        repeats[name] = int(np.clip(0.02 / (time.perf_counter() - began), 1, 500))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        for name in list(programs)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            for _ in range(repeats[name]):
                jax.block_until_ready(programs[name]())
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    faster = [min(times) for times in zip(*(seconds[name] for name in LIBRARIES[1:]), strict=True)]
    ratios = {
        name: statistics.median(time / of for time, of in zip(times, faster, strict=True))
        for name, times in seconds.items()
        if name.startswith("bilevel")
    }
    return {"seconds": seconds, "median": {k: statistics.median(v) for k, v in seconds.items()}, "ratios": ratios}


def table(record: dict) -> str:
    """Return a record as a Markdown table."""
    rows = ["| call | unknowns | jaxopt, µs | Optimistix, µs | bilevel, µs | ratio |", "|---|---|---|---|---|---|"]
    for n, found in record["sizes"].items():
        for suite, result in found.items():
            median = result["median"]
            for name, of in result["ratios"].items():
                label = suite + name.removeprefix("bilevel").replace(", ", ", of the ")
                times = (f"{1e6 * median[key]:,.0f}" for key in ("jaxopt", "optimistix", name))
                rows.append(f"| {label} | {int(n):,} | {' | '.join(times)} | {of:.2f} |")
    return "\n".join([*rows[:2], *sorted(rows[2:], key=lambda row: row.split("|")[1])])


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 50, 500, 10_000], help="numbers of unknowns")
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    parser.add_argument("--no-record", action="store_true", help="only print the table")
    options = parser.parse_args(arguments)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxopt", "optimistix", "lineax")}
    record: dict = {"rounds": options.rounds, "versions": versions, "machine": machine(), "sizes": {}}
    path = ROOT / "benchmarks" / "results" / "sizes.json"
    for n in options.sizes:
        record["sizes"][str(n)] = {}
        for suite, programs in suites(n).items():
            found = record["sizes"][str(n)][suite] = measure(programs, options.rounds)
            if not options.no_record:  # after each suite, so that an interrupted run leaves a record
                path.write_text(json.dumps(record, indent=1) + "\n")
            print(n, suite, {k: f"{v:.2f}" for k, v in found["ratios"].items()}, file=sys.stderr, flush=True)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
