"""What is wrong with a gradient that differs from its references: each suspicion a formula, tried in turn.

All is judged at the w that the method itself returned, with A, B, g and h written out: an error of w, an
unfinished linear solve and a wrong formula then leave different traces.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import oracles
from bilevel.conditions import Problem
from bilevel.tables import figure
from bilevel.types import Hypergradient, PyTree, Status


@dataclass(frozen=True)
class Setting:
    """What the method was called with, and the directions in θ that are compared."""

    problem: Problem
    solver: Callable
    theta: PyTree
    init: Any
    data: PyTree
    directions: np.ndarray

    def at(self, w: PyTree) -> np.ndarray | None:
        """The theorem's derivatives at ``w``; None where A is too large or singular."""
        try:
            parts = oracles.linearise(self.problem, w, self.theta, self.data, self.directions)
        except oracles.OracleError:
            return None
        v, kappa = oracles.adjoint(parts.a, parts.g)
        return parts.total(v) if kappa < np.inf else None

    def solved(self, solver: Callable | None = None) -> PyTree:
        """What the solver returns in float64; or another solver."""
        with oracles.double_precision():
            theta, data, start = (oracles.as_double(part) for part in (self.theta, self.data, self.start()))
            condition = self.problem.condition
            return jax.jit(lambda t, d: oracles.solve(condition, solver or self.solver, t, start, d))(theta, data)

    def start(self) -> PyTree:
        """Where the solver starts."""
        with oracles.double_precision():
            theta, data = oracles.as_double(self.theta), oracles.as_double(self.data)
            return oracles.as_double(self.init(theta, data) if callable(self.init) else self.init)


@dataclass(frozen=True)
class Place:
    """The method's own w, and what the theorem says there.

    Attributes:
        parts: A, Bd, g and h·d.
        v: A⁻ᵀg.
        zeroth: the part of A without second derivatives: D⁻² of a condition with a scaling, one of a mapping; or
            None.
        reported: the adjoint that the method reports, flat; None where it solves no system.
        residual: ‖D(g − Aᵀ reported)‖ / ‖Dg‖, the true one; None likewise.
    """

    parts: oracles.Linearised
    v: np.ndarray
    zeroth: np.ndarray | None
    reported: np.ndarray | None
    residual: float | None

    @property
    def formula(self) -> np.ndarray:
        """h·d − v·Bd."""
        return self.parts.total(self.v)


def place(setting: Setting, out: Hypergradient) -> Place | None:
    """The theorem at ``out.inner.w``; None where A is too large, singular or not finite."""
    problem, theta, data, w = setting.problem, setting.theta, setting.data, out.inner.w
    try:
        parts = oracles.linearise(problem, w, theta, data, setting.directions)
    except oracles.OracleError:
        return None
    v, kappa = oracles.adjoint(parts.a, parts.g)
    if not kappa < np.inf:
        return None
    zeroth = _zeroth(problem.condition, w, theta, data)
    if out.linear is None:
        return Place(parts, v, zeroth, None, None)
    reported = oracles.vector_of(out.linear.solution)
    scale = np.ones_like(v) if zeroth is None else zeroth**-0.5
    size = np.linalg.norm(scale * parts.g)
    residual = float(np.linalg.norm(scale * (parts.g - parts.a.T @ reported)) / size) if size > 0 else 0.0
    return Place(parts, v, zeroth, reported, residual)


def tells_the_truth(at: Place, out: Hypergradient, eps: float) -> bool:
    """Whether the reported linear residual is the true one, up to a factor of two and rounding."""
    return at.residual is not None and at.residual <= 2 * float(out.linear.residual_norm) + 100 * eps  # type: ignore


def name(
    setting: Setting, at: Place | None, ours: np.ndarray, close: Callable[[np.ndarray], bool], comparisons, out, eps
) -> str:
    """One sentence: who is wrong, how, and what to do.

    Args:
        setting: of the comparison.
        at: the theorem at the method's w.
        ours: the method's derivatives.
        close: whether ``ours`` is within what is allowed of some other derivatives.
        comparisons: with the references.
        out: the method's report.
        eps: of its dtype.
    """
    if not np.isfinite(ours).all():
        return "the gradient is not finite: see check_condition at the inner solution."
    having_a_say = [entry for entry in comparisons if entry.counts]
    if not having_a_say:
        return "no reference could answer here, so nothing is known; see the notes, and check_condition."
    residual = float(np.max(out.inner.residual_norm))
    if at is not None:
        if close(at.formula) and _is_the_solvers(setting, out, eps):
            return (
                f"the formula is right and the inner problem is not solved: ‖F‖ = {figure(residual)} at w, whose error "
                "this is; allow more steps, lower tol, or compare with a larger rtol."
            )
        if at.reported is not None and close(at.parts.total(at.reported)) and tells_the_truth(at, out, eps):
            return (
                f"the linear solve is not finished: its true residual is {figure(at.residual)}; allow more "
                "iterations, precondition, or use LU."
            )
    steps = [entry for entry in comparisons if entry.name == "unrolled" and entry.reference]
    if steps and steps[0].agrees:
        return (
            f"this is the derivative of the solver's steps, which have not converged (‖F‖ = {figure(residual)}): allow "
            "more steps for that of the solution, or compare with 'unrolled' alone."
        )
    if at is not None:
        for suspicion, derivatives in _suspicions(setting, at, out):
            if close(derivatives) and not _near(derivatives, at.formula):
                return f"the formula is wrong: {suspicion}."
    if len(having_a_say) > 1 and not all(agree(entry, having_a_say[0]) for entry in having_a_say[1:]):
        return "the references disagree with each other: a kink may be near; see check_condition."
    names = ", ".join(entry.name for entry in having_a_say)
    if at is None:
        return (
            f"the gradient differs from {names}, and A cannot be written out or is singular: whether the formula or "
            f"the inner solution (‖F‖ = {figure(residual)}) is to blame is not known."
        )
    return f"the references ({names}) do not contradict each other, and the method does: its formula is wrong, or " + (
        "it is an approximation."
    )


def agree(one, other) -> bool:
    """Whether two comparisons' references are equal within what was allowed to the method."""
    a, b = one.reference, other.reference
    room = one.tolerances + other.tolerances
    return bool((np.abs(a.derivatives - b.derivatives) <= room).all())


def _suspicions(setting: Setting, at: Place, out: Hypergradient) -> Iterator[tuple[str, np.ndarray]]:
    """What may have been computed instead, the likelier first."""
    parts = at.parts
    adjoints = [at.v] if at.reported is None else [at.v, at.reported]
    for v in adjoints:
        implicit = v @ parts.b
        yield "the sign of the implicit term is flipped (it is h − Bᵀv)", parts.h + implicit
        yield "its sign is flipped", implicit - parts.h
        yield "the direct term ∂outer/∂θ is missing", -implicit
    yield "the implicit term is missing: only ∂outer/∂θ is there", parts.h
    transposed, kappa = oracles.adjoint(parts.a.T, parts.g)
    if kappa < np.inf:
        yield "a transpose is dropped: it solves Av = g, where the adjoint system is Aᵀv = g", parts.total(transposed)
    if at.zeroth is not None:
        without, kappa = oracles.adjoint(parts.a - np.diag(at.zeroth), parts.g)
        if kappa < np.inf:
            yield "the term λI (or I, of a mapping) is dropped from A", parts.total(without)
        yield "second derivatives are left out of A: a first-order approximation", parts.total(parts.g / at.zeroth)
    for where, w in _other_points(setting, out):
        derivatives = setting.at(w)
        if derivatives is not None:
            yield f"it is taken at {where}, not at the solver's w", derivatives
    yield from _factor(at, out, setting)


def _factor(at, out, setting):
    """A constant multiple, where there is more than one derivative to tell it by."""
    ours = setting.directions @ oracles.derivatives_of(out.gradient, setting.theta)
    formula = at.formula
    if len(ours) > 1 and (length := formula @ formula) > 0:
        factor = float(ours @ formula / length)
        yield f"it is off by a constant factor of {factor:.6g}", factor * formula


def _other_points(setting, out):
    solver = setting.solver
    yield "the initial point", setting.start()
    budget = next((field for field in ("steps", "maxiter") if hasattr(solver, field)), None)
    if dataclasses.is_dataclass(solver) and budget and (steps := int(np.max(out.inner.steps))) > 0:
        earlier = dataclasses.replace(solver, **{budget: steps - 1})  # type: ignore[type-var]
        yield "the iterate before the last", setting.solved(earlier)


def _is_the_solvers(setting, out, eps):
    """Whether the method's w is what the solver returns: else its error is no fault of the solver's."""
    theirs, ours = oracles.vector_of(setting.solved()), oracles.vector_of(out.inner.w)
    condition_slack = 1e3 * eps**0.5  # float32 iterates drift from float64 ones
    return np.linalg.norm(theirs - ours) <= condition_slack * (1 + np.linalg.norm(theirs))


def _near(one, other):
    return np.abs(one - other).max(initial=0) <= 1e-12 * np.abs(other).max(initial=0)


def _zeroth(condition, w, theta, data):
    with oracles.double_precision():
        w, theta, data = (oracles.as_double(part) for part in (w, theta, data))
        scaling = condition.scaling(theta, data)
        if scaling is None:
            return np.ones(oracles.flatten(w).vector.size) if hasattr(condition, "mapping") else None
        if jax.tree.structure(scaling) != jax.tree.structure(w):
            scaling = jax.tree.map(lambda _: scaling, w)
        full = jax.tree.map(lambda factor, leaf: jnp.asarray(factor, jnp.float64) * jnp.ones_like(leaf), scaling, w)
        return oracles.vector_of(full) ** -2.0


def converged(status) -> bool:
    """Whether a tol was set and met."""
    return int(np.max(status)) == Status.CONVERGED
