"""Recognise a run that diverged, and raise or warn about it."""

import math
from collections.abc import Sequence
from typing import Any

from bilevel.errors import Policy, raise_or_warn
from bilevel.stochastic.rates import RATES
from bilevel.types import Status

FIRST_GROWTH = 1e12
"""Limit of the largest entry of the state at any evaluation, relative to the larger of 1 and the largest entry at the
start."""
LATER_GROWTH = 1e4
"""Limit of the largest entry of the state after the first evaluation, relative to the largest of 1, the largest entry
at the start and the largest entry at the first evaluation."""
RESIDUAL_GROWTH = 1e4
"""Limit of the residual's norm over all samples after the first evaluation, relative to the larger of this norm at the
first evaluation and 1e-6 times the largest entry of the state."""


def judge(sizes: Sequence[float], residuals: Sequence[float], norms: Sequence[float]) -> Status:
    """Return the status of an evaluation: NONFINITE, BREAKDOWN above a limit of this module, or else BUDGET_USED.

    Args:
        sizes: the largest entry of the state at the start and at each evaluation up to this one.
        residuals: the norm of the residual over all samples at each evaluation; empty without ``measure``.
        norms: the measured norms at this evaluation; empty without ``measure``.
    """
    size = sizes[-1]
    if not all(map(math.isfinite, (size, *norms))):
        return Status.NONFINITE
    grew = size > FIRST_GROWTH * max(1.0, sizes[0])
    if len(sizes) > 2:
        grew = grew or size > LATER_GROWTH * max(1.0, *sizes[:2])
    if len(residuals) > 1:
        # At a converged first evaluation the residual is rounding noise, from which it may grow again.
        grew = grew or residuals[-1] > RESIDUAL_GROWTH * max(residuals[0], 1e-6 * size)
    return Status.BREAKDOWN if grew else Status.BUDGET_USED


def react(found: Any, status: Status, size: float, on_failure: Policy) -> None:
    """Raise or warn about a run that diverged.

    Args:
        found: the result, with the last state before the divergence.
        status: the status of the last evaluation.
        size: the largest entry of the state at that evaluation.
        on_failure: "raise", "warn" or "ignore".

    Raises:
        HypergradientError: with ``on_failure="raise"``.
    """
    names = [name for name in RATES if hasattr(found.algorithm, name)]
    rates = ", ".join(f"{name}={getattr(found.algorithm, name)!r}" for name in names)
    grown = f"the state has grown to {size:.1e}, or its residual has grown"
    fault = "the state or a measured norm is not finite" if status == Status.NONFINITE else grown
    before = "the start of this call" if len(found.history.step) == 1 else "the last evaluation before the divergence"
    message = (
        f"stochastic loop, {status.name}: after {int(found.history.step[-1])} steps {fault}: use smaller "
        f"rates{' than ' if rates else ''}{rates}, or larger batches; the result has the state of step "
        f"{int(found.state.step)}, {before}"
    )
    raise_or_warn(message, found, on_failure)
