"""What is wrong with a gradient: each suspicion a formula, tried in turn; the one that gives the same number is named.

All is judged at the w that the method itself returned, with A, B, g and h written out: an error of w, an unfinished
linear solve and a wrong formula then leave different traces. Where A is too large or singular, what is left are the
suspicions that need no more than a reference and ∂outer/∂θ.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import Hypergradient, LinearInfo, PyTree
from bilevel.verify import oracles
from bilevel.verify.tables import figure


@dataclass(frozen=True)
class Answer:
    """What a method was asked, what it returned, and the directions in θ along which that is judged."""

    problem: Problem
    solver: Callable
    theta: PyTree
    init: Any
    data: PyTree
    out: Hypergradient | PyTree
    directions: np.ndarray

    @cached_property
    def derivatives(self) -> np.ndarray:
        """The method's own, along the directions."""
        gradient = self.out.gradient if isinstance(self.out, Hypergradient) else self.out
        return self.directions @ oracles.derivatives_of(gradient, self.theta)

    @cached_property
    def w(self) -> PyTree:
        """The inner solution that the method reports; the solver's where it returned the bare gradient."""
        return self.out.inner.w if isinstance(self.out, Hypergradient) else self.solved()

    @property
    def linear(self) -> LinearInfo | None:
        """The linear solve that the method reports."""
        return self.out.linear if isinstance(self.out, Hypergradient) else None

    @property
    def eps(self) -> float:
        """Of the narrowest float in θ."""
        return oracles.eps_of(self.theta)

    @cached_property
    def place(self) -> "Place | None":
        """The theorem at ``w``; None where A is too large, singular or not finite."""
        found = self._theorem(self.w)
        if found is None:
            return None
        parts, v = found
        zeroth = _zeroth(self.problem.condition, self.w, self.theta, self.data)
        if self.linear is None:
            return Place(parts, v, zeroth, None, None)
        reported = oracles.vector_of(self.linear.solution)
        scale = np.ones_like(v) if zeroth is None else zeroth**-0.5
        size = np.linalg.norm(scale * parts.g)
        residual = float(np.linalg.norm(scale * (parts.g - parts.a.T @ reported)) / size) if size > 0 else 0.0
        return Place(parts, v, zeroth, reported, residual)

    def at(self, w: PyTree) -> np.ndarray | None:
        """The theorem's derivatives at ``w``; None where A is too large or singular."""
        found = self._theorem(w)
        return None if found is None else found[0].total(found[1])

    def _theorem(self, w) -> tuple[oracles.Linearised, np.ndarray] | None:
        try:
            parts = oracles.linearise(self.problem, w, self.theta, self.data, self.directions)
        except oracles.OracleError:
            return None
        v, kappa = oracles.adjoint(parts.a, parts.g)
        return (parts, v) if kappa < np.inf else None

    def direct(self, w: PyTree) -> np.ndarray:
        """h·d, the derivatives of outer in θ at ``w``."""
        with oracles.double_precision():
            w, theta, data = (oracles.as_double(part) for part in (w, self.theta, self.data))
            point = oracles.flatten(theta)

            def outer(vector):
                value = self.problem.outer(w, point.rebuild(vector), data)
                return value[0] if self.problem.has_aux else value  # type: ignore[index]

            return self.directions @ np.asarray(jax.grad(outer)(point.vector))

    def residual_norm(self) -> float:
        """‖F‖ at ``w``, in float64."""
        with oracles.double_precision():
            w, theta, data = (oracles.as_double(part) for part in (self.w, self.theta, self.data))
            return float(np.linalg.norm(oracles.vector_of(self.problem.condition.residual(w, theta, data))))

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


def tells_the_truth(answer: Answer) -> bool:
    """Whether the reported linear residual is the true one, up to a factor of two and rounding."""
    at, linear = answer.place, answer.linear
    if at is None or at.residual is None or linear is None:
        return False
    return at.residual <= 2 * float(linear.relative_residual) + 100 * answer.eps


def likely_cause(
    answer: Answer, explains: Callable[[np.ndarray], bool], references: Sequence[oracles.Reference]
) -> str | None:
    """What is wrong and what to do, without a full stop; None where nothing fits.

    Args:
        answer: one that is wrong.
        explains: whether other derivatives are so close to the answer's that they explain it.
        references: what it differs from, along the same directions.
    """
    if not np.isfinite(answer.derivatives).all():
        return f"a NaN or an infinity; {_not_finite(answer)}"
    at = answer.place
    if at is not None and explains(at.formula):
        return _about_the_solution(answer, explains)
    if at is not None and at.reported is not None and explains(at.parts.total(at.reported)) and tells_the_truth(answer):
        return (
            f"the linear solve is not finished: its true residual is {figure(at.residual)}; allow more iterations, "
            "precondition, or use LU"
        )
    if any(entry.name == "unrolled" and explains(entry.derivatives) for entry in references):
        return (
            f"this is the derivative of the solver's steps, which have not converged (‖F‖ = "
            f"{figure(answer.residual_norm())}): allow more steps for that of the solution, or compare with 'unrolled' "
            "alone"
        )
    for suspicion, derivatives in _suspicions(answer, references):
        if explains(derivatives):
            return suspicion
    if at is None and answer.linear is not None and (left := float(answer.linear.relative_residual)) > answer.eps**0.5:
        return f"the linear solve left {figure(left)} of its right-hand side; allow it more iterations, or precondition"
    return None


def _about_the_solution(answer, explains):
    """The formula is right at the method's w."""
    if _is_the_solvers(answer):
        return (
            f"the formula is right and the inner problem is not solved: ‖F‖ = {figure(answer.residual_norm())} at w, "
            "whose error this is; allow more steps, lower tol, or compare with a larger rtol"
        )
    for suspicion, derivatives in _elsewhere(answer):
        if explains(derivatives):
            return suspicion
    return "the formula is right, at a w that is not the solver's"


def _not_finite(answer):
    """Where along the way numbers stop being finite."""
    with oracles.double_precision():
        theta, data, w = (oracles.as_double(tree) for tree in (answer.theta, answer.data, answer.w))
        stages = {
            "θ": theta,
            "the inner solution": w,
            "the inner residual": answer.problem.condition.residual(w, theta, data),
            "the outer value": answer.problem.outer(w, theta, data),
        }
    if np.isnan(oracles.vector_of(data)).any():  # an infinity may be a bound
        return "the data have one already"
    for stage, value in stages.items():
        if not np.isfinite(oracles.vector_of(value)).all():
            return f"{stage} has one already"
    return "θ, data, w, residual and outer value are finite: a derivative or a solve is not; see check_condition"


def _suspicions(answer: Answer, references) -> Iterator[tuple[str, np.ndarray]]:
    """What may have been computed instead, the likelier first."""
    at = answer.place
    terms = list(_terms(answer, references))
    for direct, through in terms:
        yield "the sign of the whole gradient is flipped", -direct - through
        yield "the sign of the term through w is flipped", direct - through
        yield "the term through w is missing: only ∂outer/∂θ is there", direct
        yield "the direct term ∂outer/∂θ is missing", through
    if at is not None:
        yield from _other_systems(at)
    yield from _elsewhere(answer)
    if len(answer.derivatives) > 1:  # any one number is a multiple of another
        for direct, through in terms:
            factor = _factor(answer.derivatives, direct + through)
            yield f"the whole gradient is multiplied by {factor:.4g}", factor * (direct + through)
            factor = _factor(answer.derivatives - direct, through)
            yield f"the term through w is multiplied by {factor:.4g}", direct + factor * through


def _terms(answer, references):
    """h·d and what is added to it: by the theorem, by the reported adjoint, and in each reference."""
    at = answer.place
    if at is not None:
        for v in (at.v, at.reported):
            if v is not None:
                yield at.parts.h, -(v @ at.parts.b)
    for entry in references:
        direct = answer.direct(entry.w)
        yield direct, entry.derivatives - direct


def _other_systems(at):
    """Another matrix in place of Aᵀ."""
    parts = at.parts
    transposed, kappa = oracles.adjoint(parts.a.T, parts.g)
    if kappa < np.inf:
        sentence = "a transpose is dropped: the linear system is solved with ∂F/∂w in place of its transpose"
        yield sentence, parts.total(transposed)
    if at.zeroth is not None:
        without, kappa = oracles.adjoint(parts.a - np.diag(at.zeroth), parts.g)
        if kappa < np.inf:
            yield "the term λI (or I, of a mapping) is dropped from A", parts.total(without)
        yield "second derivatives are left out of A: a first-order approximation", parts.total(parts.g / at.zeroth)


def _elsewhere(answer):
    """The theorem at another w."""
    for where, w in _other_points(answer):
        derivatives = answer.at(w)
        if derivatives is not None:
            yield f"it is taken at {where}, not at the solver's w", derivatives


def _other_points(answer):
    solver = answer.solver
    yield "the initial point", answer.start()
    fields = [field.name for field in dataclasses.fields(solver)] if dataclasses.is_dataclass(solver) else []
    budget = next((name for name in ("steps", "maxiter") if name in fields), None)
    if budget is None:
        return
    taken = answer.out.inner.steps if isinstance(answer.out, Hypergradient) else getattr(solver, budget)
    if (steps := int(np.max(taken))) > 0:
        earlier = dataclasses.replace(solver, **{budget: steps - 1})  # type: ignore[type-var]
        yield "the iterate before the last", answer.solved(earlier)


def _is_the_solvers(answer):
    """Whether the method's w is what the solver returns: else its error is no fault of the solver's."""
    theirs, ours = oracles.vector_of(answer.solved()), oracles.vector_of(answer.w)
    slack = 1e3 * answer.eps**0.5  # float32 iterates drift from float64 ones
    return np.linalg.norm(theirs - ours) <= slack * (1 + np.linalg.norm(theirs))


def _factor(ours, theirs):
    size = theirs @ theirs
    return float(ours @ theirs / size) if size > 0 else 0.0


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
