"""The contenders of each problem: algorithms, blocks of steps, grids of rates, and oracle calls of a step."""

import itertools
from dataclasses import dataclass

from benchmarks.bilevel.race import Contender

BATCH = 64
INNER_STEPS = 10
"""Steps of w, and steps of the adjoint, in one step of AmIGO: the peer's default."""
PERIOD_FRACTION = 0.5
"""SRBA's period, divided by the number of inner and outer batches together: the peer's default."""
EXTRA = {"AmIGO": {"n_inner_steps": INNER_STEPS}, "SRBA": {"period_frac": PERIOD_FRACTION}}


@dataclass(frozen=True)
class Plan:
    """The algorithms and the grids of rates for one problem.

    Args:
        blocks: number of steps between two looks at the clock, by algorithm.
        step_sizes: the grid's inner rates.
        outer_ratios: the grid's ratios of the inner to the outer rate.
        metric: the measure that chooses the rates, and that the tables show first.
        full_batch: the settings that are tried for our full-batch methods.
    """

    blocks: dict[str, int]
    step_sizes: tuple[float, ...]
    outer_ratios: tuple[float, ...]
    metric: str = "gap"
    full_batch: tuple[dict, ...] = ()


FULL_BATCH = tuple(
    {"optimizer": optimizer, "rate": rate, "newton_steps": steps}
    for steps in (1, 2)
    for optimizer, rates in (("adam", (0.03, 0.1, 0.3, 1.0)), ("lbfgs", (0.3, 1.0)))
    for rate in rates
)
QUADRATIC = Plan({"SOBA": 64, "SABA": 64, "SRBA": 32, "AmIGO": 8}, (0.1, 0.3, 1.0), (0.1, 0.3, 1.0))
PLANS = {
    "quadratic": QUADRATIC,
    "quadratic-32768": QUADRATIC,
    "logistic": Plan(
        {"SOBA": 16384, "SABA": 4096, "SRBA": 8192, "AmIGO": 1024},
        (0.01, 0.03, 0.1, 0.3, 1.0), (0.003, 0.01, 0.1, 1.0),
        full_batch=FULL_BATCH,
    ),
    "cleaning": Plan(
        {"SOBA": 256, "SABA": 16, "SRBA": 128, "AmIGO": 32}, (0.03, 0.1, 0.3), (1e-5, 1e-4, 1e-3),
        metric="validation_loss",
    ),
}  # fmt: skip


def grid(plan: Plan) -> list[dict]:
    """Return the rates that are tried for each stochastic algorithm."""
    pairs = itertools.product(plan.step_sizes, plan.outer_ratios)
    return [{"step_size": step, "outer_ratio": ratio} for step, ratio in pairs]


def contender(problem: str, algorithm: str, rates: dict, ours: bool, block: int | None = None) -> Contender:
    """Return a contender of this library (``ours``) or of the peer; its label names the library and the algorithm.

    ``block`` is the number of steps in a block of a stochastic algorithm; None takes that of the problem's plan.
    """
    label = f"{algorithm}, {'bilevel' if ours else 'benchmark_bilevel'}"
    if algorithm == "full batch":
        return Contender(f"full batch {rates['optimizer']}, bilevel", algorithm, rates, 1, ours)
    options = {"batch_size": BATCH} | EXTRA.get(algorithm, {}) | rates
    return Contender(label, algorithm, options, block or PLANS[problem].blocks[algorithm], ours)


def oracles_of_a_step(algorithm: str, inner_samples: int, outer_samples: int) -> float:
    """Return the mean number of oracle calls of one step.

    G_i and F_j are the inner and the outer function of one sample. An oracle call is, for one sample, a gradient ∇₁G_i,
    a product ∇²₁₁G_i v, a product ∇²₂₁G_i v, or the gradient of F_j in one of its two arguments.
    """
    single = 5 * BATCH
    if algorithm == "SRBA":
        period = int(PERIOD_FRACTION * (inner_samples + outer_samples) / BATCH)
        return ((period - 1) * 2 * single + 3 * inner_samples + 2 * outer_samples) / period
    if algorithm == "AmIGO":
        return (2 * INNER_STEPS + 3) * BATCH
    return single
