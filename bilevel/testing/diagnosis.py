"""Why a hypergradient is wrong: known mistakes are made on purpose, and the one that gives the same number is named.

With A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w, h = ∂outer/∂θ, all written out at the solution, the gradient is
h − BᵀA⁻ᵀg. Only a number that fits to a hundredth of the error counts as an explanation.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from bilevel import oracles
from bilevel.conditions import Problem
from bilevel.types import Hypergradient, PyTree

FIT = 1e-2
"""How much of the error an explanation may leave over."""


def likely_cause(
    problem: Problem,
    theta: PyTree,
    init: PyTree | Callable,
    data: PyTree,
    out: object,
    reference: oracles.Reference,
    rtol: float,
) -> str:
    """One sentence on what a wrong gradient looks like, or that it looks like nothing known."""
    with oracles.double_precision():
        gradient = out.gradient if isinstance(out, Hypergradient) else out
        got = reference.directions @ np.asarray(oracles.flatten(oracles.as_double(gradient)).vector)
        if not np.isfinite(got).all():
            return "likely cause: a NaN or an infinity; " + _first_of(problem, theta, data, reference.w)
        error = np.linalg.norm(got - reference.derivatives)
        for sentence, mistake in _mistakes(problem, theta, init, data, out, reference, got):
            if np.linalg.norm(got - mistake) <= FIT * error:
                return f"likely cause: {sentence}"
    if isinstance(out, Hypergradient) and out.linear is not None and float(out.linear.residual_norm) > rtol:
        return (
            f"likely cause: the linear solve left {float(out.linear.residual_norm):.3g} of its right-hand side; "
            "allow it more iterations, or precondition"
        )
    return "likely cause: none that is known; it fits no flipped sign, lost transpose, lost term or unfinished solve"


def _first_of(problem, theta, data, w):
    """Where along the way numbers stop being finite, at the reference's solution."""
    theta, data, w = (oracles.as_double(tree) for tree in (theta, data, w))
    for stage, value in {
        "θ": theta,
        "the data": data,
        "the inner residual": problem.condition.residual(w, theta, data),
        "the outer value": problem.outer(w, theta, data),
    }.items():
        if not np.isfinite(np.asarray(oracles.flatten(oracles.as_double(value)).vector)).all():
            return f"{stage} has one already"
    return "θ, data, residual and outer value are finite at the solution: a solve diverged, or a derivative is singular"


def _mistakes(problem, theta, init, data, out, reference, got) -> Iterator[tuple[str, np.ndarray]]:
    """Sentences and the derivatives that the mistake in each would give, the plainest first."""
    exact = reference.derivatives
    yield "the sign of the whole gradient is flipped", -exact
    direct, through, untransposed = _terms(problem, theta, data, reference)
    yield "the sign of the term through w is flipped", direct - through
    yield "the term through w is missing: only ∂outer/∂θ is there", direct
    yield "the direct term ∂outer/∂θ is missing", through
    if untransposed is not None:
        yield "the linear system is solved with ∂F/∂w in place of its transpose", direct + untransposed
    factor = _factor(got - direct, through)
    yield f"the term through w is multiplied by {factor:.4g}", direct + factor * through
    factor = _factor(got, exact)
    yield f"the whole gradient is multiplied by {factor:.4g}", factor * exact
    if isinstance(out, Hypergradient):
        yield (
            f"the inner problem is not solved: ‖F‖ = {float(out.inner.residual_norm):.3g}, and this is the right "
            "answer for such a w; allow the solver more steps",
            _theorem(problem, theta, data, out.inner.w, reference),
        )
    start = init(theta, data) if callable(init) else init
    if start is not None:
        yield "it is taken at init, not at the inner solution", _theorem(problem, theta, data, start, reference)


def _theorem(problem, theta, data, w, reference):
    """The implicit function theorem at any w; NaN, which fits nothing, where A cannot be written out or inverted."""
    unknown = np.full_like(reference.derivatives, np.nan)
    try:
        found = oracles.dense(problem, None, theta, None, data, directions=reference.directions, w=w)
    except oracles.OracleError:
        return unknown
    return found.derivatives if np.isfinite(found.uncertainty).all() else unknown


def _terms(problem, theta, data, reference):
    """h and −BᵀA⁻ᵀg along the reference's directions, and −BᵀA⁻¹g, or None where A is too large or singular."""
    theta, data, w = (oracles.as_double(tree) for tree in (theta, data, reference.w))
    if oracles.flatten(w).vector.size > oracles.DENSE:
        direct = _direct(problem, theta, data, w, reference)
        return direct, reference.derivatives - direct, None
    a, b, g, direct = oracles.linearise(problem, w, theta, data, reference.directions)
    regular = np.isfinite(a).all() and np.linalg.cond(a) * oracles.EPS < 1
    return direct, reference.derivatives - direct, -np.linalg.solve(a, g) @ b if regular else None


def _direct(problem, theta, data, w, reference):
    """h along the reference's directions."""

    def outer(theta):
        value = problem.outer(w, theta, data)
        return value[0] if problem.has_aux else value

    slope = jax.grad(outer, allow_int=True)(theta)
    return reference.directions @ np.asarray(oracles.flatten(slope).vector)


def _factor(got, expected):
    size = expected @ expected
    return float(got @ expected / size) if size > 0 else 0.0
