"""Assertions on a hypergradient and on a condition: each says where it failed, by how much, and the likely cause.

They take the method and the solver as arguments and share no gradient code with them. A reference that is not
sure enough to decide is a failure too: an assertion that cannot fail proves nothing.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.conditions import Condition
from bilevel.problem import Problem
from bilevel.testing.cases import Case
from bilevel.types import Hypergradient, PyTree, Status
from bilevel.verify import oracles
from bilevel.verify.examine import check_condition
from bilevel.verify.suspects import Answer, likely_cause
from bilevel.verify.tables import label

FIT = 1e-2
"""How much of the error an explanation may leave over."""


@dataclass(frozen=True)
class Check:
    """One comparison: a row of the report.

    Attributes:
        problem: what was checked, in a few words.
        method: what it was computed with.
        oracle: what it was compared with.
        error: the worst error, relative to the reference's largest entry.
        rtol: the tolerance on it.
        message: why it failed; empty where it did not.
    """

    problem: str
    method: str
    oracle: str
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
    init: PyTree | Callable,
    data: PyTree,
    solver: Callable,
    method: Callable,
    rtol: float | None = None,
    atol: float | None = None,
    against: str | Sequence[str] = "finite_differences",
    record: Record | None = None,
) -> None:
    """Assert that ``method`` returns the derivative of the outer value, in every coordinate of θ.

    |got − expected| ≤ rtol·max|expected| + atol, for each coordinate; where θ has more than 64 entries, for
    random directions. The method runs in the precision of its arguments, the oracle in float64.

    Args:
        problem: the condition and the outer function.
        theta: outer variables, any pytree.
        init: where the solver starts, a pytree like w or ``init(theta, data)``.
        data: of the problem.
        solver: finds the inner solution.
        method: called as ``method(problem, solver, theta, init, data)``; it returns a
            :class:`~bilevel.Hypergradient`, or the bare gradient.
        rtol: None for 10·√eps of the gradient's dtype, half of its digits.
        atol: None for a thousandth of ``rtol``.
        against: ``"finite_differences"`` and ``"dense"`` know the derivative at the solution, however far the
            solver came; ``"unrolled"`` that of the solver's output. Or several of them.
        record: called with each :class:`Check`, before it is asserted.

    Raises:
        AssertionError: naming the leaf, the coordinate, both numbers, the oracle and the likely cause.
        ValueError: for an oracle that does not exist.

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
    asked = oracles.chosen(against)
    out = run(problem, solver, method, theta, init, data)
    gradient = _gradient(out, theta)
    for name, oracle in asked.items():
        reference = oracle(problem, solver, theta, init, data)
        answer = Answer(problem, solver, theta, init, data, out, reference.directions)
        compared = _Comparison(
            reference.labels,
            answer.derivatives,
            reference.derivatives,
            reference.uncertainty,
            *_tolerances(gradient, rtol, atol),
        )
        check = compared.check(describe(problem), label(method), f"{name}, of {reference.question}", out)
        judge(_with_cause(check, answer, reference) if compared.decided else check, record)


def assert_case(
    case: Case,
    solver: Callable | None = None,
    method: Callable | None = None,
    rtol: float | None = None,
    record: Record | None = None,
) -> None:
    """Assert that a solver and a method find the exact solution, value and hypergradient of a drawn case.

    Args:
        case: drawn by a strategy, or made by a family.
        solver: yours; None for the one that the case suggests.
        method: yours; None for the one that the case suggests.
        rtol: relative to each tree's largest entry; None for ``case.rtol``, 1000·eps·κ.
        record: called with each :class:`Check`, before it is asserted.

    Raises:
        AssertionError: naming the leaf, the coordinate, both numbers and the likely cause.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.testing import families
        >>> assert_case(families.ridge(dtype="float32", seed=1), method=bl.Implicit(bl.CG(max_steps=10)))
    """
    __tracebackhide__ = True
    rtol = case.rtol if rtol is None else rtol
    solver, method = solver or case.solver, method or case.method
    out = run(case.problem, solver, method, case.theta, case.init, case.data)
    found = {"theta": (_gradient(out, case.theta), case.gradient)}
    if isinstance(out, Hypergradient):
        found = {"w": (out.inner.w, case.w), "value": (out.value, case.value)} | found
    for name, (got, expected) in found.items():
        labels, expected = _labels(expected, name), oracles.vector_of(expected)
        exact = np.zeros_like(expected)
        compared = _Comparison(labels, oracles.vector_of(got), expected, exact, rtol, 1e-3 * rtol)
        check = compared.check(repr(case), label(method), "closed form", out, _SUBJECTS[name])
        if check.message and name == "theta":
            reference = oracles.dense(case.problem, None, case.theta, None, case.data, w=case.w)
            question = case.problem, solver, case.theta, case.init, case.data
            check = _with_cause(check, Answer(*question, out, reference.directions), reference)
        judge(check, record)


def assert_condition(
    problem: Problem | Condition,
    theta: PyTree,
    w: PyTree,
    data: PyTree,
    solved: bool = True,
    rtol: float = 1e-5,
    record: Record | None = None,
) -> None:
    """Assert that a condition is what it says of itself at w: finite, solved, symmetric, positive definite.

    These are rows of :func:`~bilevel.check_condition`. A = ∂F/∂w is written out up to 1000 unknowns; beyond, products
    with it stand for it, which can disprove symmetry and definiteness, and prove neither.

    Args:
        problem: a condition, or a problem that has one.
        theta: outer variables.
        w: where to look, a tree like the inner variables.
        data: of the problem.
        solved: whether w is meant to be the solution: Newton's step from it, ‖A⁻¹F‖, is then at most
            ``rtol·(1 + ‖w‖)``; beyond 1000 unknowns ‖F‖ is.
        rtol: also what symmetry may be missed by, relative to ‖A‖.
        record: called with each :class:`Check`, before it is asserted.

    Raises:
        AssertionError: naming what was declared, the coordinates and the numbers.

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
            judge(Check(name, "", row.name, error, rtol, message), record)


_SUBJECTS = {"w": "the inner solution", "value": "the outer value", "theta": "the hypergradient"}


def run(problem: Problem, solver: Callable, method: Callable, theta: PyTree, init: PyTree, data: PyTree) -> object:
    """What the method returns, compiled once for each method, solver, problem and shape."""
    theta, data = jax.tree.map(jnp.asarray, (theta, data))
    start = None if callable(init) else jax.tree.map(jnp.asarray, init)
    arguments = (problem, solver, method, init if callable(init) else None)
    try:
        compiled = _compiled(*arguments)
    except TypeError:  # a solver of the user's own that cannot be hashed
        compiled = _compiled.__wrapped__(*arguments)
    return compiled(theta, start, data)


@functools.lru_cache(maxsize=128)
def _compiled(problem, solver, method, init):
    return jax.jit(lambda theta, start, data: method(problem, solver, theta, init or start, data))


@dataclass(frozen=True)
class _Comparison:
    labels: Sequence[str]
    got: np.ndarray
    expected: np.ndarray
    uncertainty: np.ndarray
    rtol: float
    atol: float

    @property
    def scale(self):
        return np.abs(self.expected).max(initial=0.0)

    @property
    def tolerance(self):
        return self.rtol * self.scale + self.atol

    @property
    def decided(self):
        """Whether the reference is sure enough to tell."""
        return bool(np.all(self.uncertainty <= self.tolerance))

    def check(self, problem, method, oracle, out, subject="the hypergradient"):
        missed = np.abs(self.got - self.expected)
        missed = np.where(np.isfinite(missed), missed, np.inf)
        worst = int(missed.argmax()) if missed.size else 0
        error = missed.max(initial=0.0) / max(self.scale, self.atol, np.finfo(float).tiny)
        check = functools.partial(Check, problem, method, oracle, float(error), self.rtol)
        if not self.decided:
            return check(self._undecided(oracle))
        off = missed > self.tolerance + self.uncertainty
        if not off.any():
            return check()
        return check(
            f"{subject} is wrong at {self.labels[worst]}: got {self.got[worst]:.8}, expected {self.expected[worst]:.8} "
            f"({oracle}), relative error {error:.3g} above rtol {self.rtol:.3g}; {off.sum()} of {off.size} are off\n"
            f"  {_endings(out)}"
        )

    def _undecided(self, oracle):
        worst = int(np.argmax(self.uncertainty))
        return (
            f"{oracle} cannot decide at {self.labels[worst]}: its own uncertainty, {self.uncertainty[worst]:.3g}, is "
            f"above the tolerance of {self.tolerance:.3g}. Is there a kink, or a singular system? Else take another "
            "oracle, or a larger rtol"
        )


def _endings(out):
    """How the solves ended, in a line."""
    if not isinstance(out, Hypergradient):
        return "the method reported no solves"
    line = f"inner solve: {_status(out.inner.status)}, ‖F‖ = {float(out.inner.residual_norm):.3g}"
    if out.linear is None:
        return line
    return f"{line}; linear solve: {_status(out.linear.status)}, residual {float(out.linear.relative_residual):.3g}"


def _status(status):
    return Status(int(status)).name


def _gradient(out, theta):
    """The gradient in what a method returned, which must be a tree like θ."""
    gradient = out.gradient if isinstance(out, Hypergradient) else out
    got, wanted = (jax.tree.structure(gradient), _shapes(gradient)), (jax.tree.structure(theta), _shapes(theta))
    if got != wanted:
        raise AssertionError(f"the gradient is no tree like theta: got {got}, expected {wanted}")
    return gradient


def _shapes(tree):
    return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _tolerances(gradient, rtol, atol):
    rtol = 10 * oracles.eps_of(gradient) ** 0.5 if rtol is None else rtol
    return rtol, 1e-3 * rtol if atol is None else atol


def _labels(tree, name):
    with oracles.double_precision():
        return oracles.flatten(oracles.as_double(tree), name).labels


def _with_cause(check, answer, reference):
    """The check, and where it failed what the mistake looks like."""
    if check.ok:
        return check
    error = np.linalg.norm(answer.derivatives - reference.derivatives)

    def explains(derivatives):
        return bool(np.linalg.norm(answer.derivatives - derivatives) <= FIT * error)

    cause = likely_cause(answer, explains, [reference]) or (
        "none that is known; it fits no flipped sign, lost transpose, lost term or unfinished solve"
    )
    return replace(check, message=f"{check.message}\n  likely cause: {cause}")


def describe(problem: Problem) -> str:
    """A problem in a few words: its condition and the name of its outer function."""
    outer = getattr(problem.outer, "__name__", type(problem.outer).__name__)
    return f"{type(problem.condition).__name__}, {outer.strip('<>')}"


def judge(check: Check, record: Record | None) -> None:
    """Record a check, and raise where it failed."""
    __tracebackhide__ = True
    if record is not None:
        record(check)
    if not check.ok:
        raise AssertionError(check.message)
