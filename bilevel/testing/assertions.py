"""Assertions on a hypergradient and on a condition. Their messages say where the numbers are wrong and by how much.

The message on a wrong hypergradient also names the likely cause. The references share no gradient code with the method
under test. An assertion also fails if its reference is too inaccurate to tell a right number from a wrong one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._deprecation import renamed_field
from bilevel.conditions import Condition
from bilevel.problem import Problem
from bilevel.start import Start, StartFunction, choose_start
from bilevel.testing.cases import Case
from bilevel.types import Hypergradient, PyTree, Status
from bilevel.verify.causes import likely_cause
from bilevel.verify.comparison import Deviation, Tolerance
from bilevel.verify.condition import check_condition
from bilevel.verify.flat import flatten, vector_of
from bilevel.verify.method_run import MethodRun, run_method
from bilevel.verify.precision import as_double, double_precision, eps_of
from bilevel.verify.references import Reference, dense, select_references
from bilevel.verify.tables import label

MAX_UNEXPLAINED = 1e-2
"""Largest fraction of an error that a cause may leave unexplained and still be named."""


@renamed_field("oracle", "reference")
@dataclass(frozen=True)
class Check:
    """The result of one comparison or of one property of a condition.

    With ``--hypergradient-report``, the pytest plugin lists the worst check of each pair of method and reference.

    Attributes:
        problem: the problem, the case or the condition in a few words.
        method: the name of the method with its settings; empty for a condition.
        reference: the reference, ``closed form``, or the property of the condition.
        error: the largest error, relative to the largest entry of the reference, or to the absolute tolerance if that
            is larger. For the properties ``residual`` and ``symmetry`` of a condition, the measured number. For another
            property, 0 if it holds, else infinity.
        rtol: the relative tolerance.
        message: why the check failed; empty if it passed.
    """

    problem: str
    method: str
    reference: str
    error: float
    rtol: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.message


Record = Callable[[Check], None]


def assert_hypergradient(
    problem: Problem,
    theta: PyTree,
    init: Start,
    data: PyTree,
    solver: Callable,
    method: Callable,
    rtol: float | None = None,
    atol: float | None = None,
    against: str | Sequence[str] = "finite_differences",
    record: Record | None = None,
    *,
    start: StartFunction | None = None,
) -> None:
    """Assert that ``method`` returns the derivative of the outer value in θ.

    Each coordinate must satisfy |got − expected| ≤ rtol·max|expected| + atol + u, where u is the reference's own
    uncertainty. A θ of more than 64 entries is checked along 8 random directions instead. The method runs in the
    precision of its arguments, and the reference in float64.

    Args:
        problem: the condition and the outer function.
        theta: outer variables, any pytree.
        init: where the solver starts, a pytree like w; None with ``start``. A function, a method or a
            ``functools.partial`` is taken as ``start``.
        data: the third argument of the problem's functions.
        solver: the inner solver.
        method: called as ``method(problem, solver, theta, init, data)``. It returns a :class:`~bilevel.Hypergradient`
            or the bare gradient.
        rtol: None means 10·√eps of the gradient's dtype: 1.5e-7 for float64, 3.5e-3 for float32.
        atol: None means a thousandth of ``rtol``.
        against: one or several references. ``"finite_differences"`` and ``"dense"`` differentiate the exact inner
            solution, which Newton's method finds near the solver's output. If Newton's method fails, or for more than
            400 unknowns, they use the solver's output instead. ``"unrolled"`` differentiates the solver's output.
        record: called with each :class:`Check` before it is asserted.
        start: in place of ``init``, a function ``start(theta, data)`` that returns a pytree like w.

    Raises:
        AssertionError: for a wrong gradient, with the coordinate, both numbers, the reference and the likely cause;
            also if a reference is too inaccurate, or if the gradient is not a tree like ``theta``.
        ValueError: for an unknown reference, or for one that cannot be computed
            (:class:`~bilevel.verify.references.ReferenceUnavailable`).
        TypeError: if neither or both of ``init`` and ``start`` are given.

    Example:
        >>> import bilevel as bl
        >>> condition = bl.Stationary(lambda w, theta, data: 0.5 * (w - theta["a"] ** 2) ** 2)
        >>> problem = bl.Problem(condition, lambda w, theta, data: 0.5 * w**2)
        >>> method = bl.Implicit(bl.CG(1))
        >>> assert_hypergradient(problem, {"a": 2.0}, 0.0, None, bl.GradientDescent(0.5, 60), method, rtol=1e-5)
        >>> assert_hypergradient(problem, {"a": 2.0}, 0.0, None, bl.GradientDescent(0.5, 1), method, rtol=1e-5)
        Traceback (most recent call last):
          ...
        AssertionError: the hypergradient is wrong at theta['a']: got 8.0, ...
    """
    __tracebackhide__ = True
    selected = select_references(against)
    init = choose_start(init, start)
    out = run_method(problem, solver, method, theta, init, data)
    tolerance = _tolerance(_gradient(out, theta), rtol, atol)
    for name, evaluate in selected.items():
        reference = evaluate(problem, solver, theta, init, data)
        run = MethodRun(problem, solver, theta, init, data, out, reference.directions)
        expected, uncertainty = reference.derivatives, reference.uncertainty
        deviation = Deviation(reference.labels, run.derivatives, expected, uncertainty, tolerance)
        source = f"reference {name} for {reference.question}"
        check = _check(deviation, describe(problem), label(method), source, out)
        assert_check(_add_cause(check, run, reference) if deviation.decided else check, record)


def assert_case(
    case: Case,
    solver: Callable | None = None,
    method: Callable | None = None,
    rtol: float | None = None,
    record: Record | None = None,
) -> None:
    """Assert that a solver and a method find the exact solution, value and hypergradient of a case.

    A method that returns the bare gradient is checked for its hypergradient alone.

    Args:
        case: drawn by a strategy, or made by a family.
        solver: the solver under test; None means ``case.solver``.
        method: the method under test; None means ``case.method``.
        rtol: tolerance for each of the solution, the value and the hypergradient, relative to its largest entry; None
            means ``case.rtol``, 1000·eps·κ. The absolute tolerance is a thousandth of this number.
        record: called with each :class:`Check` before it is asserted.

    Raises:
        AssertionError: with the coordinate, both numbers and, for a wrong hypergradient, the likely cause; also if the
            gradient is not a tree like ``case.theta``.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.testing import families
        >>> assert_case(families.ridge(dtype="float32", seed=1), method=bl.Implicit(bl.CG(10)))
    """
    __tracebackhide__ = True
    rtol = case.rtol if rtol is None else rtol
    tolerance = Tolerance(rtol, 1e-3 * rtol)
    solver, method = solver or case.solver, method or case.method
    out = run_method(case.problem, solver, method, case.theta, case.init, case.data)
    results = {"theta": (_gradient(out, case.theta), case.gradient)}
    if isinstance(out, Hypergradient):
        # A wrong solution often makes the hypergradient wrong too, so the solution is asserted first.
        results = {"w": (out.inner.w, case.w), "value": (out.value, case.value)} | results
    for name, (got, exact) in results.items():
        expected = vector_of(exact)
        deviation = Deviation(_labels(exact, name), vector_of(got), expected, np.zeros_like(expected), tolerance)
        check = _check(deviation, repr(case), label(method), "closed form", out, _SUBJECTS[name])
        if check.message and name == "theta":
            reference = dense(case.problem, None, case.theta, None, case.data, w=case.w)
            arguments = case.problem, solver, case.theta, case.init, case.data
            check = _add_cause(check, MethodRun(*arguments, out, reference.directions), reference)
        assert_check(check, record)


def assert_condition(
    problem: Problem | Condition,
    theta: PyTree,
    w: PyTree,
    data: PyTree,
    solved: bool = True,
    rtol: float = 1e-5,
    record: Record | None = None,
) -> None:
    """Assert that a condition is finite and solved at w, and has the properties that it declares.

    The properties that a condition can declare are symmetry, positive definiteness and strong convexity. The assertions
    are rows of :func:`~bilevel.check_condition`. For more than 1000 unknowns the matrix A = ∂F/∂w is not written out.
    The checks can then disprove positive definiteness and strong convexity, but never prove them. A declared symmetry
    is checked on three random pairs of vectors, for any number of unknowns.

    Args:
        problem: a condition, or a problem that has one.
        theta: outer variables.
        w: the point, a tree like the inner variables.
        data: the third argument of the problem's functions.
        solved: if True, w must be the solution: the length ‖A⁻¹F‖ of Newton's step from w must be at most
            ``rtol·(1 + ‖w‖)``. With more than 1000 unknowns, or if A is singular, ‖F‖ replaces ‖A⁻¹F‖.
        rtol: the tolerance of ``solved``, and the allowed |⟨u, Av⟩ − ⟨Au, v⟩| relative to ‖u‖·max(‖Av‖, ‖Aᵀv‖).
        record: called with each :class:`Check` before it is asserted.

    Raises:
        AssertionError: with the property, what was found, and a remedy; also for a complex leaf, or for a residual that
            is not a tree like w.

    Example:
        >>> import jax.numpy as jnp
        >>> import bilevel as bl
        >>> twisted = bl.Root(lambda w, theta, data: jnp.array([[1.0, 5.0], [0.0, 1.0]]) @ w - theta, symmetric=True)
        >>> assert_condition(twisted, jnp.zeros(2), jnp.zeros(2), None)
        Traceback (most recent call last):
          ...
        AssertionError: Root, symmetry: declared symmetric and is not: ∂F/∂w is 5.0 at (w[0], w[1]) and 0.0 at ...
    """
    __tracebackhide__ = True
    if not isinstance(problem, Problem):
        problem = Problem(problem, lambda w, theta, data: jnp.zeros(()))
    condition = problem.condition
    asserted = ["finite", *["residual"] * solved, *["symmetry"] * condition.symmetric]
    asserted += [*["curvature"] * condition.positive_definite, "strong convexity"]
    name = type(condition).__name__
    for row in check_condition(problem, theta, w, data, rtol).checks:
        if row.name in asserted or (row.name in ("leaves", "structure") and not row.ok):
            error = row.value or 0.0 if row.name in ("residual", "symmetry") else 0.0 if row.ok else np.inf
            message = "" if row.ok else f"{name}, {row.name}: {row.found}\n  {row.remedy}"
            assert_check(Check(name, "", row.name, error, rtol, message), record)


_SUBJECTS = {"w": "the inner solution", "value": "the outer value", "theta": "the hypergradient"}


def _check(deviation: Deviation, problem: str, method: str, source: str, out, subject="the hypergradient") -> Check:
    """Turn a deviation into a check, which also fails if the reference is too inaccurate to decide."""
    message = ""
    if not deviation.decided:
        message = deviation.indecision(source)
    elif not deviation.agrees:
        message = f"{deviation.mismatch(subject, source)}\n  {_solve_report(out)}"
    return Check(problem, method, source, deviation.relative_error, deviation.tolerance.rtol, message)


def _solve_report(out) -> str:
    """Return a line with the status and the residual of the method's solves."""
    if not isinstance(out, Hypergradient):
        return "the method reported no solves"
    line = f"inner solve: {_status(out.inner.status)}, ‖F‖ = {float(out.inner.residual_norm):.3g}"
    if out.linear is None:
        return line
    residual = float(out.linear.relative_residual)
    return f"{line}; linear solve: {_status(out.linear.status)}, relative residual {residual:.3g}"


def _status(status) -> str:
    return Status(int(status)).name


def _gradient(out, theta: PyTree) -> PyTree:
    """Return the gradient from a method's result. Raise AssertionError if the gradient is not a tree like θ."""
    gradient = out.gradient if isinstance(out, Hypergradient) else out
    got, wanted = (jax.tree.structure(gradient), _shapes(gradient)), (jax.tree.structure(theta), _shapes(theta))
    if got != wanted:
        raise AssertionError(
            f"the gradient is not a tree like theta: got {got[0]} of shapes {got[1]}, expected {wanted[0]} of shapes "
            f"{wanted[1]}"
        )
    return gradient


def _shapes(tree):
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _tolerance(gradient: PyTree, rtol: float | None, atol: float | None) -> Tolerance:
    relative = 10 * eps_of(gradient) ** 0.5 if rtol is None else rtol
    return Tolerance(relative, 1e-3 * relative if atol is None else atol)


def _labels(tree: PyTree, name: str) -> Sequence[str]:
    with double_precision():
        return flatten(as_double(tree), name).labels


def _add_cause(check: Check, run: MethodRun, reference: Reference) -> Check:
    """Add the likely cause to the message of a failed check. Return any other check unchanged."""
    if check.ok:
        return check
    error = np.linalg.norm(run.derivatives - reference.derivatives)

    def explains(derivatives):
        return bool(np.linalg.norm(run.derivatives - derivatives) <= MAX_UNEXPLAINED * error)

    cause = likely_cause(run, explains, [reference]) or (
        "unknown; none of the known mistakes that were tried, such as a flipped sign, gives the method's numbers"
    )
    return replace(check, message=f"{check.message}\n  likely cause: {cause}")


def describe(problem: Problem) -> str:
    """Return the type of a problem's condition and the name of its outer function."""
    outer = getattr(problem.outer, "__name__", type(problem.outer).__name__)
    return f"{type(problem.condition).__name__}, {outer.strip('<>')}"


def assert_check(check: Check, record: Record | None) -> None:
    """Record a check, and raise AssertionError if it failed."""
    __tracebackhide__ = True
    if record is not None:
        record(check)
    if not check.ok:
        raise AssertionError(check.message)
