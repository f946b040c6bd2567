"""A method's gradient beside the references: do they agree, and if not, which side is wrong, and how?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import Hypergradient, PyTree, Status
from bilevel.verify import oracles, suspects
from bilevel.verify.oracles import OracleError, Reference
from bilevel.verify.suspects import Answer
from bilevel.verify.tables import figure, table, wrapped


@dataclass(frozen=True)
class Comparison:
    """A method's derivatives beside those of one reference.

    Attributes:
        name: of the reference.
        reference: its numbers; None where it could not answer.
        note: why not, or what else is to be said.
        error: |method − reference| at ``worst``.
        tolerances: what was allowed to each derivative, ``[m]``.
        worst: the coordinate or direction that is furthest off, in units of what is allowed.
        allowed: its tolerance.
        ours, theirs: both numbers there.
        agrees: whether every derivative is within its tolerance.
        counts: whether it has a say in the verdict.
    """

    name: str
    reference: Reference | None
    note: str
    error: float | None = None
    tolerances: np.ndarray | None = None
    worst: str = ""
    allowed: float | None = None
    ours: float | None = None
    theirs: float | None = None
    agrees: bool = False
    counts: bool = False


@dataclass(frozen=True)
class HypergradientReport:
    """What :func:`check_hypergradient` found.

    Attributes:
        comparisons: one for each reference asked for.
        verdict: a sentence: who is right, what is wrong, what to do.
        ok: whether the gradient agrees with every reference that answers its question.
        out: the method's own report.
        derivatives: the method's, along the directions that were compared.
    """

    comparisons: tuple[Comparison, ...]
    verdict: str
    ok: bool
    out: Hypergradient
    derivatives: np.ndarray

    def __str__(self) -> str:
        header = ("reference", "verdict", "error", "allowed", "worst at", "method", "reference")
        rows = [_row(entry) for entry in self.comparisons]
        notes = [wrapped(f"{entry.name}: {entry.note}") for entry in self.comparisons if entry.note]
        lines = [table(header, rows), *notes, wrapped(f"{'ok' if self.ok else 'NOT OK'}: {self.verdict}")]
        return "\n".join(lines)


def _row(entry):
    verdict = "no answer" if entry.reference is None else "agrees" if entry.agrees else "differs"
    verdict += "" if entry.counts or entry.reference is None else " (no say)"
    theirs = [figure(number) for number in (entry.error, entry.allowed)]
    return entry.name, verdict, *theirs, entry.worst or "—", figure(entry.ours), figure(entry.theirs)


def check_hypergradient(
    problem: Problem,
    theta: PyTree,
    init: PyTree | Callable[[PyTree, PyTree], PyTree],
    data: PyTree,
    solver: Callable,
    method: Callable[..., Hypergradient],
    against: Sequence[str] = ("finite_differences", "unrolled", "dense"),
    directions: np.ndarray | None = None,
    rtol: float | None = None,
) -> HypergradientReport:
    """Compare a method's hypergradient with references that share no gradient code with it.

    Finite differences and the dense solve answer for the solution w*, carried through the solver's steps for what
    the solver computed: where the steps have not converged, the latter is another question and has no say. What is
    allowed, for each derivative, is the sum of ``rtol`` times the largest derivative, the rounding of its terms in
    the method's precision, the reference's own uncertainty, and, where a ``tol`` was set and met, what that leaves
    of the inner and of the linear residual.

    Args:
        problem: the condition and the outer function.
        theta, init, data: where.
        solver: finds the inner solution.
        method: called as ``method(problem, solver, theta, init, data)``.
        against: the references, of ``"finite_differences"``, ``"unrolled"``, ``"dense"``.
        directions: unit vectors ``[m, entries of θ]``; None for coordinates of a small θ and, for a large one, the
            method's own gradient and random directions.
        rtol: None for √eps of the method's dtype: 1.5e-8 in float64, 3.5e-4 in float32.

    Raises:
        ValueError: for an unknown reference, or none.

    Example:
        Three steps of gradient descent are not enough here, and the report says so:

        >>> from bilevel import CG, GradientDescent, Implicit, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.25 * w**4 - theta * w)
        >>> problem = Problem(condition, lambda w, theta, data: w)
        >>> report = check_hypergradient(problem, 2.0, 1.0, None, GradientDescent(0.1, 3), Implicit(CG(2)))
        >>> report.ok, report.verdict.split(":")[0]
        (False, 'the formula is right and the inner problem is not solved')
    """
    asked = oracles.chosen(against)
    theta, data = jax.tree.map(jnp.asarray, (theta, data))
    out = _run(method, problem, solver, theta, init, data)
    directions = _choose(directions, oracles.derivatives_of(out.gradient, theta))
    answer = Answer(problem, solver, theta, init, data, out, directions)
    found = {name: _ask(oracle, answer) for name, oracle in asked.items()}
    allowance = _allowance(answer, found.values(), rtol)
    comparisons = _judged([_compare(name, entry, answer.derivatives, allowance) for name, entry in found.items()])
    having_a_say = [entry for entry in comparisons if entry.counts]
    finite = bool(np.isfinite(answer.derivatives).all())
    ok = finite and bool(having_a_say) and all(entry.agrees for entry in having_a_say)
    if ok:
        verdict = f"the gradient agrees with {' and '.join(entry.name for entry in having_a_say)}."
    elif finite and not having_a_say:
        verdict = "no reference could answer here, so nothing is known; see the notes, and check_condition."
    else:
        verdict = _accusation(answer, allowance, comparisons)
    return HypergradientReport(tuple(comparisons), verdict, ok, out, answer.derivatives)


def _run(method, problem, solver, theta, init, data):
    if callable(init):
        return jax.jit(lambda theta, data: method(problem, solver, theta, init, data))(theta, data)
    init = jax.tree.map(jnp.asarray, init)
    return jax.jit(lambda theta, init, data: method(problem, solver, theta, init, data))(theta, init, data)


def _choose(directions, gradient):
    """Coordinates; for a large θ the gradient's own direction, which sees its length, and random ones."""
    if directions is not None:
        return np.asarray(directions, np.float64)
    if gradient.size <= oracles.COORDINATES:
        return np.eye(gradient.size)
    chosen = oracles.random_directions(gradient.size, oracles.DIRECTIONS)
    length = np.linalg.norm(gradient)
    if np.isfinite(length) and length > 0:
        chosen[0] = gradient / length
    return chosen


def _ask(oracle, answer):
    """The reference, or the reason why there is none."""
    try:
        return oracle(answer.problem, answer.solver, answer.theta, answer.init, answer.data, answer.directions)
    except OracleError as error:
        return str(error)


def _accusation(answer, allowance, comparisons):
    """One sentence: who is wrong, how, and what to do."""

    def explains(derivatives):
        return bool((np.abs(answer.derivatives - derivatives) <= allowance.of(derivatives)).all())

    cause = suspects.likely_cause(answer, explains, [entry.reference for entry in comparisons if entry.reference])
    if cause is not None:
        return f"{cause}."
    having_a_say = [entry for entry in comparisons if entry.counts]
    if not all(_agree(entry, having_a_say[0]) for entry in having_a_say):
        return "the references disagree with each other: a kink may be near; see check_condition."
    names = ", ".join(entry.name for entry in having_a_say)
    if answer.place is None:
        return (
            f"the gradient differs from {names}, and A cannot be written out or is singular: whether the formula or "
            f"the inner solution (‖F‖ = {figure(answer.residual_norm())}) is to blame is not known."
        )
    return f"the references ({names}) do not contradict each other, and the method does: its formula is wrong, or " + (
        "it is an approximation."
    )


@dataclass(frozen=True)
class _Allowance:
    """How far a derivative may be from another's.

    Attributes:
        rtol: of the largest derivative.
        rounding: of the terms that are added, in the method's dtype, ``[m]``.
        linear: what a linear residual leaves open that met its tol, ``[m]``.
        inner: what an inner residual leaves open that met its tol, ``[m]``.
    """

    rtol: float
    rounding: np.ndarray | float = 0.0
    linear: np.ndarray | float = 0.0
    inner: np.ndarray | float = 0.0

    def of(self, derivatives: np.ndarray) -> np.ndarray:
        """At the method's own w."""
        return self.rtol * np.abs(derivatives).max(initial=0) + self.rounding + self.linear

    def of_reference(self, found: Reference) -> np.ndarray:
        """At the reference's w."""
        return self.of(found.derivatives) + found.uncertainty + self.inner


def _allowance(answer, found, rtol):
    rtol = answer.eps**0.5 if rtol is None else rtol
    at, out = answer.place, answer.out
    if at is None:
        return _Allowance(rtol)
    solutions = [entry for entry in found if isinstance(entry, Reference) and entry.question == "the solution"]
    inner = linear = 0.0
    if solutions and _converged(out.inner.status):
        inner = np.abs(at.formula - min(solutions, key=lambda entry: entry.uncertainty.max()).derivatives)
    if out.linear is not None and _converged(out.linear.status) and suspects.tells_the_truth(answer):
        linear = np.abs(at.formula - at.parts.total(at.reported))
    return _Allowance(rtol, 100 * answer.eps * at.parts.size(at.v), linear, inner)


def _converged(status):
    """Whether a tol was set and met."""
    return int(np.max(status)) == Status.CONVERGED


def _compare(name, found, ours, allowance):
    if isinstance(found, str):
        return Comparison(name, None, found)
    if not np.isfinite(found.uncertainty).all() or not np.isfinite(found.derivatives).all():
        return Comparison(name, None, "its numbers are not finite or uncertain without bound: A may be singular")
    tolerance = allowance.of_reference(found)
    error = np.abs(ours - found.derivatives)
    ratio = np.where(np.isfinite(error), error / np.maximum(tolerance, np.finfo(float).tiny), np.inf)
    worst = int(ratio.argmax())
    note = "the solver's output was differenced, whether it has converged or not"
    return Comparison(
        name=name,
        reference=found,
        note=note if name == "finite_differences" and found.question == "the solver's output" else "",
        error=float(error[worst]),
        tolerances=tolerance,
        worst=found.labels[worst],
        allowed=float(tolerance[worst]),
        ours=float(ours[worst]),
        theirs=float(found.derivatives[worst]),
        agrees=bool((ratio <= 1).all()),
        counts=True,
    )


def _judged(comparisons):
    """What answers for the solver's output has no say where another answers for the solution and differs from it."""
    solved = [entry for entry in comparisons if entry.reference and entry.reference.question == "the solution"]

    def judge(entry):
        other = entry.reference is not None and entry.reference.question == "the solver's output"
        if not other or not solved or entry.agrees:
            return entry
        if all(_agree(entry, solution) for solution in solved):
            return entry
        note = "the solver's steps have not converged: their derivative is not the solution's"
        return replace(entry, counts=False, note=note)

    return [judge(entry) for entry in comparisons]


def _agree(one, other):
    """Whether two comparisons' references are equal within what was allowed to the method."""
    room = one.tolerances + other.tolerances
    return bool((np.abs(one.reference.derivatives - other.reference.derivatives) <= room).all())
