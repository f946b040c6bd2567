"""Compare a method's hypergradient with the references; if they differ, name the likely cause."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bilevel import tree
from bilevel.notebook import html_table
from bilevel.problem import Problem
from bilevel.start import Start, StartFunction, choose_start
from bilevel.types import Hypergradient, PyTree, Status
from bilevel.verify.causes import likely_cause
from bilevel.verify.comparison import Deviation, Tolerance
from bilevel.verify.flat import gradient_vector
from bilevel.verify.method_run import MethodRun, run_method
from bilevel.verify.references import (
    MAX_COORDINATES,
    RANDOM_DIRECTIONS,
    Reference,
    ReferenceUnavailable,
    random_directions,
    select_references,
)
from bilevel.verify.tables import figure, table, wrapped


@dataclass(frozen=True)
class Comparison:
    """A method's derivatives in θ against those of one reference.

    Attributes:
        name: the reference's name.
        reference: the reference's derivatives; None if the reference is not available or not finite.
        note: why the reference is not available or does not count, or what it differentiated; often empty.
        error: |method − reference| at ``worst``.
        tolerances: the error allowed to each of the m derivatives, ``[m]``.
        worst: the name of the coordinate or direction whose error is largest in units of its tolerance.
        allowed: the tolerance at ``worst``.
        ours, theirs: the method's and the reference's derivative at ``worst``.
        agrees: whether every error is within its tolerance.
        counts: whether the comparison decides about the method. A reference that is not available does not count.
            Neither does the derivative of solver steps that have not converged, unless the method agrees with it.
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
    """The result of :func:`check_hypergradient`, which prints as a table.

    Attributes:
        comparisons: one for each reference.
        verdict: whether the gradient agrees with the references that count; if not, the likely cause where one is
            found.
        ok: True if the gradient is finite, at least one reference counts, and the gradient agrees with all that count.
        out: what the method returned.
        derivatives: the method's derivatives along the m directions that were compared, ``[m]``.
    """

    comparisons: tuple[Comparison, ...]
    verdict: str
    ok: bool
    out: Hypergradient
    derivatives: np.ndarray

    def __str__(self) -> str:
        rows = [_row(entry) for entry in self.comparisons]
        return "\n".join([table(_HEADER, rows), *map(wrapped, self._notes())])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, map(_row, self.comparisons), self._notes())

    def _notes(self):
        notes = [f"{entry.name}: {entry.note}" for entry in self.comparisons if entry.note]
        return [*notes, f"{'ok' if self.ok else 'NOT OK'}: {self.verdict}"]


_HEADER = ("reference", "verdict", "error", "allowed", "worst at", "method", "reference")


def _row(entry):
    verdict = "not available" if entry.reference is None else "agrees" if entry.agrees else "differs"
    verdict += "" if entry.counts or entry.reference is None else " (not counted)"
    errors = [figure(number) for number in (entry.error, entry.allowed)]
    return entry.name, verdict, *errors, entry.worst or "—", figure(entry.ours), figure(entry.theirs)


def check_hypergradient(
    problem: Problem,
    theta: PyTree,
    init: Start,
    data: PyTree,
    solver: Callable,
    method: Callable[..., Hypergradient],
    against: Sequence[str] = ("finite_differences", "unrolled", "dense"),
    directions: np.ndarray | None = None,
    rtol: float | None = None,
    *,
    start: StartFunction | None = None,
) -> HypergradientReport:
    """Compare a method's hypergradient with references that share no gradient code with it.

    ``finite_differences`` and ``dense`` differentiate the inner solution w*, which Newton's method computes from the
    solver's output. ``unrolled`` differentiates the solver's output. If the solver's steps have not converged, the two
    derivatives differ. ``unrolled`` then does not count, unless the method agrees with it.

    If Newton's method fails, or for more than 400 unknowns, ``finite_differences`` differentiates the solver's output
    instead, and ``dense`` evaluates the implicit function theorem there.

    The tolerance of each derivative is a sum:

    - ``rtol`` times the reference's largest derivative,
    - the reference's own uncertainty,
    - the rounding, in θ's precision, of the terms that make up the derivative,
    - the effect of the inner residual and of the linear residual, each if that solve met its ``tol`` or is an accepted
      factorisation.

    The last two items need the inner Jacobian as a matrix. They are zero if this matrix is singular or has more than
    1000 rows.

    A further call with the same problem, solver and method and the same shapes compiles nothing.

    Args:
        problem: the condition and the outer function.
        theta: outer variables, any pytree; the hypergradient is computed there.
        init: where the solver starts, a pytree like w; None with ``start``. A function, a method or a
            ``functools.partial`` is taken as ``start``.
        data: the third argument of the problem's functions.
        solver: the inner solver.
        method: called as ``method(problem, solver, theta, init, data)``.
        against: names of the references to use, from ``"finite_differences"``, ``"unrolled"`` and ``"dense"``.
        directions: unit vectors ``[m, entries of θ]``. None means every coordinate of a θ with at most 64 entries, and
            8 directions in a larger θ: the method's own gradient and 7 random ones.
        rtol: None means √eps of the narrowest dtype in θ: 1.5e-8 for float64, 3.5e-4 for float32.
        start: in place of ``init``, a function ``start(theta, data)`` that returns a pytree like w.

    Raises:
        ValueError: for an unknown reference, for an empty ``against``, or for directions that do not have the shape
            ``[m, entries of θ]``.
        TypeError: if neither or both of init and start are given, for a leaf of θ, init or data that is neither an
            array nor a number, and for a complex leaf of θ.

    Example:
        Three steps of gradient descent do not solve this inner problem, and the verdict says so:

        >>> from bilevel import CG, GradientDescent, Implicit, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.25 * w**4 - theta * w)
        >>> problem = Problem(condition, lambda w, theta, data: w)
        >>> report = check_hypergradient(problem, 2.0, 1.0, None, GradientDescent(0.1, 3), Implicit(CG(2)))
        >>> report.ok, report.verdict.split(":")[0]
        (False, 'the formula is right and the inner problem is not solved')
    """
    selected = select_references(against)
    init = choose_start(init, start)
    theta, data = tree.real_arrays(tree.numbers_as_floats(theta), "theta"), tree.arrays(data, "data")
    out = run_method(problem, solver, method, theta, init, data)
    directions = _directions(directions, gradient_vector(out.gradient, theta))
    run = MethodRun(problem, solver, theta, init, data, out, directions)
    references = {name: _evaluate(reference, run) for name, reference in selected.items()}
    tolerance = _derive_tolerance(run, references.values(), rtol)
    comparisons = [_compare(name, found, run.derivatives, tolerance) for name, found in references.items()]
    comparisons = _without_unconverged_steps(comparisons)
    counted = [entry for entry in comparisons if entry.counts]
    finite = bool(np.isfinite(run.derivatives).all())
    ok = finite and bool(counted) and all(entry.agrees for entry in counted)
    if ok:
        verdict = f"the gradient agrees with {' and '.join(entry.name for entry in counted)}."
    elif finite and not counted:
        verdict = "no reference is available here, so the gradient is not verified; see the notes, and check_condition."
    else:
        verdict = _diagnosis(run, tolerance, comparisons)
    return HypergradientReport(tuple(comparisons), verdict, ok, out, run.derivatives)


def _directions(directions, gradient):
    """Return the caller's directions, else the coordinates of a small θ, else the gradient's and random directions.

    A gradient of many entries is also compared along its own direction, because random directions are nearly orthogonal
    to it. A gradient that is zero or not finite has no direction and is left out.
    """
    if directions is not None:
        return np.asarray(directions, np.float64)
    if gradient.size <= MAX_COORDINATES:
        return np.eye(gradient.size)
    directions = random_directions(gradient.size, RANDOM_DIRECTIONS)
    length = np.linalg.norm(gradient)
    if np.isfinite(length) and length > 0:
        directions[0] = gradient / length
    return directions


def _evaluate(reference: Callable[..., Reference], run: MethodRun) -> Reference | str:
    """Evaluate a reference at the run's arguments. If it is not available, return the reason as a string."""
    try:
        return reference(run.problem, run.solver, run.theta, run.init, run.data, run.directions)
    except ReferenceUnavailable as error:
        return str(error)


def _derive_tolerance(run: MethodRun, found: Iterable[Reference | str], rtol: float | None) -> Tolerance:
    """Derive the method's tolerance from its precision and from the residuals of the solves that met their ``tol``."""
    relative = run.eps**0.5 if rtol is None else rtol
    theorem, out = run.theorem, run.out
    if theorem is None:
        return Tolerance(relative)
    solutions = [entry for entry in found if isinstance(entry, Reference) and entry.question == "the solution"]
    inner = linear = 0.0
    if solutions and _converged(out.inner.status):
        best = min(solutions, key=lambda entry: entry.uncertainty.max())
        inner = np.abs(theorem.derivatives - best.derivatives)
    if run.linear is not None and _converged(run.linear.status) and run.reported_residual_is_true():
        linear = np.abs(theorem.derivatives - theorem.parts.total(theorem.reported))  # type: ignore[arg-type]
    rounding = 100 * run.eps * theorem.parts.size(theorem.adjoint)
    return Tolerance(relative, rounding=rounding, linear=linear, inner=inner)


def _converged(status) -> bool:
    """Return True if a ``tol`` was set and met, or if a factorisation was accepted. A used-up budget is not enough."""
    return int(np.max(status)) in (Status.CONVERGED, Status.ILL_CONDITIONED)


def _compare(name: str, found: Reference | str, derivatives: np.ndarray, tolerance: Tolerance) -> Comparison:
    if isinstance(found, str):
        return Comparison(name, None, found)
    if not np.isfinite(found.uncertainty).all() or not np.isfinite(found.derivatives).all():
        return Comparison(name, None, "its numbers are not finite, or their uncertainty is not: A may be singular")
    deviation = Deviation(found.labels, derivatives, found.derivatives, found.uncertainty, tolerance)
    worst = deviation.worst
    note = ""
    if name == "finite_differences" and found.question == "the solver's output":
        note = (
            "Newton's method failed, or there are too many unknowns for it, so the solver's output, converged or not, "
            "was differenced"
        )
    return Comparison(
        name=name,
        reference=found,
        note=note,
        error=float(deviation.error[worst]),
        tolerances=deviation.allowed,
        worst=found.labels[worst],
        allowed=float(deviation.allowed[worst]),
        ours=float(derivatives[worst]),
        theirs=float(found.derivatives[worst]),
        agrees=deviation.agrees,
        counts=True,
    )


def _without_unconverged_steps(comparisons: list[Comparison]) -> list[Comparison]:
    """Set ``counts`` to False for a derivative of the solver's output that differs from the solution's derivative.

    It stays True if the method agrees with the derivative of the output. The method then differs from the solution's
    derivative, and the verdict names the unconverged steps as the cause.
    """
    solved = [entry for entry in comparisons if entry.reference and entry.reference.question == "the solution"]

    def judge(entry):
        of_output = entry.reference is not None and entry.reference.question == "the solver's output"
        if not of_output or not solved or entry.agrees:
            return entry
        if all(_consistent(entry, solution) for solution in solved):
            return entry
        note = "the solver's steps have not converged, so their derivative is not that of the solution"
        return replace(entry, counts=False, note=note)

    return [judge(entry) for entry in comparisons]


def _consistent(one, other) -> bool:
    """Return True if the derivatives of two references differ by at most the sum of both comparisons' tolerances."""
    tolerance = one.tolerances + other.tolerances
    return bool((np.abs(one.reference.derivatives - other.reference.derivatives) <= tolerance).all())


def _diagnosis(run: MethodRun, tolerance: Tolerance, comparisons: list[Comparison]) -> str:
    """Return the likely cause of a wrong gradient; if there is none, how the gradient and the references differ."""

    def explains(derivatives):
        return bool((np.abs(run.derivatives - derivatives) <= tolerance.at_same_w(derivatives)).all())

    cause = likely_cause(run, explains, [entry.reference for entry in comparisons if entry.reference])
    if cause is not None:
        return f"{cause}."
    counted = [entry for entry in comparisons if entry.counts]
    if not all(_consistent(entry, counted[0]) for entry in counted):
        return "the references disagree with each other: a kink may be near; see check_condition."
    names = ", ".join(entry.name for entry in counted)
    if run.theorem is None:
        return (
            f"the gradient differs from {names}. A is too large to be written out, singular or not finite, so a wrong "
            f"formula cannot be told from an inaccurate inner solution (‖F‖ = {figure(run.residual_norm())})."
        )
    return (
        f"the gradient differs from the references ({names}), which agree with each other: its formula is wrong, or "
        "it is an approximation."
    )
