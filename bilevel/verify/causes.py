"""Find the likely cause of a wrong gradient.

Each known mistake is a formula. The formulas are evaluated one after the other, and the first one that gives the same
numbers as the method is named. If A = ∂F/∂w at the method's w is singular, is not finite, or has more than 1000 rows,
the formulas with this A are left out.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bilevel.types import Hypergradient, PyTree
from bilevel.verify.flat import vector_of
from bilevel.verify.method_run import MethodRun, TheoremAtW
from bilevel.verify.precision import as_double, double_precision
from bilevel.verify.references import Reference, solve_adjoint
from bilevel.verify.tables import figure

Candidate = tuple[str, np.ndarray]
"""A mistake in words, and the derivatives ``[m]`` that a method with this mistake returns."""


def likely_cause(run: MethodRun, explains: Callable[[np.ndarray], bool], references: Sequence[Reference]) -> str | None:
    """Return the likely mistake as a phrase without a full stop, sometimes with a remedy; None if no mistake fits.

    Args:
        run: the run of a method whose derivatives are wrong.
        explains: returns True for derivatives that are close enough to the method's to explain them.
        references: all references, along the same directions. The method differs from at least one of them.
    """
    if not np.isfinite(run.derivatives).all():
        return f"the gradient is not finite: {_first_not_finite(run)}"
    theorem = run.theorem
    if theorem is not None and explains(theorem.derivatives):
        return _cause_of_wrong_w(run, explains)
    if theorem is not None and _is_unfinished_linear_solve(run, theorem, explains):
        return (
            f"the linear solve is not finished: its true residual is {figure(theorem.residual)}; allow more "
            "iterations, precondition, or use LU"
        )
    if any(entry.name == "unrolled" and explains(entry.derivatives) for entry in references):
        return (
            f"this is the derivative of the solver's steps, which have not converged (‖F‖ = "
            f"{figure(run.residual_norm())}): allow more steps to get the derivative of the solution, or compare with "
            "'unrolled' alone"
        )
    for cause, derivatives in _wrong_formulas(run, references):
        if explains(derivatives):
            return cause
    if theorem is None and run.linear is not None:
        residual = float(run.linear.relative_residual)
        if residual > run.eps**0.5:
            return (
                f"the linear solve is not finished: its relative residual is {figure(residual)}; allow more "
                "iterations, or precondition"
            )
    return None


def _first_not_finite(run: MethodRun) -> str:
    """Name the first quantity on the way to the gradient that is not finite."""
    with double_precision():
        theta, data, w = (as_double(tree) for tree in (run.theta, run.data, run.w))
        stages = {
            "θ": theta,
            "the inner solution": w,
            "the inner residual": run.problem.condition.residual(w, theta, data),
            "the outer value": run.problem.outer(w, theta, data),
        }
    if np.isnan(vector_of(data)).any():  # an infinity in the data may be a bound
        return "the data contain a NaN"
    for stage, value in stages.items():
        if not np.isfinite(vector_of(value)).all():
            return f"{stage} is not finite"
    return "θ, w, F and the outer value are finite, so a derivative or a solve is not; see check_condition"


# --- The formula is right, or one of its solves is not finished ----------------------------------------------------


def _cause_of_wrong_w(run: MethodRun, explains) -> str:
    """Explain a gradient that agrees with the implicit function theorem at the method's own w."""
    if _is_solver_output(run):
        return (
            f"the formula is right and the inner problem is not solved: ‖F‖ = {figure(run.residual_norm())} at w "
            "explains the error; allow more steps, lower tol, or compare with a larger rtol"
        )
    for cause, derivatives in _theorem_at_other_points(run):
        if explains(derivatives):
            return cause
    return "the formula is right, but it is evaluated at a w that the solver did not return"


def _is_unfinished_linear_solve(run: MethodRun, theorem: TheoremAtW, explains) -> bool:
    """Return True if the gradient follows from the reported adjoint vector, whose reported residual is the true one.

    The caller has already found that the exact adjoint vector does not explain the gradient. The error then comes from
    the unfinished solve.
    """
    return (
        theorem.reported is not None
        and explains(theorem.parts.total(theorem.reported))
        and run.reported_residual_is_true()
    )


def _is_solver_output(run: MethodRun) -> bool:
    """Return True if the method's w is what the solver returns."""
    expected, got = vector_of(run.solver_output()), vector_of(run.w)
    slack = 1e3 * run.eps**0.5  # iterates in float32 drift away from those in float64
    return bool(np.linalg.norm(expected - got) <= slack * (1 + np.linalg.norm(expected)))


# --- Wrong formulas ------------------------------------------------------------------------------------------------


def _wrong_formulas(run: MethodRun, references: Sequence[Reference]) -> Iterator[Candidate]:
    """Yield the derivatives that methods with known mistakes return, likelier mistakes first."""
    terms = list(_terms(run, references))
    for direct, through_w in terms:
        yield "the sign of the whole gradient is flipped", -direct - through_w
        yield "the sign of the term through w is flipped", direct - through_w
        yield "the term through w is missing: only ∂outer/∂θ is there", direct
        yield "the direct term ∂outer/∂θ is missing", through_w
    if run.theorem is not None:
        yield from _wrong_systems(run.theorem)
    yield from _theorem_at_other_points(run)
    if len(run.derivatives) == 1:  # any number is a multiple of another, so a factor explains nothing
        return
    for direct, through_w in terms:
        factor = _best_factor(run.derivatives, direct + through_w)
        yield f"the whole gradient is multiplied by {factor:.4g}", factor * (direct + through_w)
        factor = _best_factor(run.derivatives - direct, through_w)
        yield f"the term through w is multiplied by {factor:.4g}", direct + factor * through_w


def _terms(run: MethodRun, references: Sequence[Reference]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the direct term h·d and the term through w, from the theorem, the reported adjoint and each reference."""
    if run.theorem is not None:
        for adjoint in (run.theorem.adjoint, run.theorem.reported):
            if adjoint is not None:
                yield run.theorem.parts.h, -(adjoint @ run.theorem.parts.b)
    for entry in references:
        direct = run.direct_derivatives(entry.w)
        yield direct, entry.derivatives - direct


def _wrong_systems(theorem: TheoremAtW) -> Iterator[Candidate]:
    """Yield derivatives of the theorem with another matrix in place of Aᵀ."""
    parts, diagonal = theorem.parts, theorem.constant_diagonal
    adjoint, kappa = solve_adjoint(parts.a.T, parts.g)
    if kappa < np.inf:
        cause = "a transpose is dropped: the linear system is solved with ∂F/∂w in place of its transpose"
        yield cause, parts.total(adjoint)
    if diagonal is None:
        return
    adjoint, kappa = solve_adjoint(parts.a - np.diag(diagonal), parts.g)
    if kappa < np.inf:
        yield "the term λI (I for a mapping) is dropped from A", parts.total(adjoint)
    yield "second derivatives are left out of A: a first-order approximation", parts.total(parts.g / diagonal)


def _theorem_at_other_points(run: MethodRun) -> Iterator[Candidate]:
    """Yield derivatives of the theorem at points where a method may evaluate it by mistake."""
    for name, w in _other_points(run):
        derivatives = run.theorem_derivatives(w)
        if derivatives is not None:
            yield f"the formula is evaluated at {name}, not at the solver's w", derivatives


def _other_points(run: MethodRun) -> Iterator[tuple[str, PyTree]]:
    solver = run.solver
    yield "the initial point", run.start()
    fields = [field.name for field in dataclasses.fields(solver)] if dataclasses.is_dataclass(solver) else []
    budget = next((name for name in ("max_steps", "steps", "maxiter") if name in fields), None)
    if budget is None:
        return
    taken = run.out.inner.steps if isinstance(run.out, Hypergradient) else getattr(solver, budget)
    if (steps := int(np.max(taken))) > 0:
        one_less = dataclasses.replace(solver, **{budget: steps - 1})  # type: ignore[type-var]
        yield "the iterate before the last", run.solver_output(one_less)


def _best_factor(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the factor c that minimises ‖got − c·expected‖."""
    size = expected @ expected
    return float(got @ expected / size) if size > 0 else 0.0
