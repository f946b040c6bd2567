"""Assertions on a hypergradient: each says where it failed, by how much, and the likely cause.

They take the method and the solver as arguments and share no gradient code with them. A reference that is not
sure enough to decide is a failure too: an assertion that cannot fail proves nothing.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import oracles
from bilevel.conditions import Problem
from bilevel.testing.cases import Case
from bilevel.testing.diagnosis import likely_cause
from bilevel.types import Hypergradient, PyTree, Status

ORACLES = {
    "finite_differences": oracles.finite_differences,
    "unrolled": oracles.unrolled,
    "dense": oracles.dense,
}


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
    names = (against,) if isinstance(against, str) else tuple(against)
    if not names or not set(names) <= set(ORACLES):
        raise ValueError(f"against takes {', '.join(ORACLES)}, got {against!r}")
    out = run(problem, solver, method, theta, init, data)
    gradient = _gradient(out, theta)
    for name in names:
        reference = ORACLES[name](problem, solver, theta, init, data)
        compared = _Comparison(
            reference.labels,
            reference.directions @ _vector(gradient),
            reference.derivatives,
            reference.uncertainty,
            *_tolerances(gradient, rtol, atol),
        )
        check = compared.check(describe(problem), abbreviate(method), f"{name}, of {reference.question}", out)
        if check.message and compared.decided:
            cause = likely_cause(problem, theta, init, data, out, reference, compared.rtol)
            check = replace(check, message=f"{check.message}\n  {cause}")
        judge(check, record)


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
        >>> assert_case(families.ridge(dtype="float32", seed=1), method=bl.Implicit(bl.CG(maxiter=10)))
    """
    __tracebackhide__ = True
    rtol = case.rtol if rtol is None else rtol
    solver, method = solver or case.solver, method or case.method
    out = run(case.problem, solver, method, case.theta, case.init, case.data)
    found = {"theta": (_gradient(out, case.theta), case.gradient)}
    if isinstance(out, Hypergradient):
        found = {"w": (out.inner.w, case.w), "value": (out.value, case.value)} | found
    for name, (got, expected) in found.items():
        expected, labels = _vector(expected), _labels(expected, name)
        compared = _Comparison(labels, _vector(got), expected, np.zeros_like(expected), rtol, 1e-3 * rtol)
        check = compared.check(repr(case), abbreviate(method), "closed form", out, _SUBJECTS[name])
        if check.message and name == "theta":
            with jax.enable_x64(True):
                reference = oracles.dense(case.problem, None, case.theta, None, case.data, w=case.w)
            cause = likely_cause(case.problem, case.theta, case.init, case.data, out, reference, rtol)
            check = replace(check, message=f"{check.message}\n  {cause}")
        judge(check, record)


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
    return f"{line}; linear solve: {_status(out.linear.status)}, residual {float(out.linear.residual_norm):.3g}"


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
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    eps = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=oracles.EPS)
    rtol = 10 * eps**0.5 if rtol is None else rtol
    return rtol, 1e-3 * rtol if atol is None else atol


def _vector(tree):
    """The inexact leaves in float64, as the oracles flatten them."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    inexact = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return np.concatenate([np.zeros(0), *[leaf.astype(np.float64).ravel() for leaf in inexact]])


def _labels(tree, name):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [
        f"{name}{jax.tree_util.keystr(path)}{list(index) if index else ''}"
        for path, leaf in paths
        for index in np.ndindex(np.shape(leaf))
    ]


def describe(problem: Problem) -> str:
    """A problem in a few words: its condition and the name of its outer function."""
    outer = getattr(problem.outer, "__name__", type(problem.outer).__name__)
    return f"{type(problem.condition).__name__}, {outer.strip('<>')}"


def abbreviate(value: object) -> str:
    """A method or solver as one would type it: a function by its name, a record without its defaults.

    Example:
        >>> import bilevel as bl
        >>> abbreviate(bl.Implicit(bl.CG(maxiter=5)))
        'Implicit(linear=CG(maxiter=5))'
    """
    if isinstance(value, functools.partial):
        return abbreviate(value.func)
    if not is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__name__", repr(value))
    told = {field.name: getattr(value, field.name) for field in fields(value)}
    told = {field.name: told[field.name] for field in fields(value) if told[field.name] != field.default}
    return f"{type(value).__name__}({', '.join(f'{name}={abbreviate(part)}' for name, part in told.items())})"


def judge(check: Check, record: Record | None) -> None:
    """Record a check, and raise where it failed."""
    __tracebackhide__ = True
    if record is not None:
        record(check)
    if not check.ok:
        raise AssertionError(check.message)
