"""Measure methods on one problem: error, time, memory, and products with the inner Jacobian."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import linear_call

from bilevel import tree
from bilevel.conditions import Condition
from bilevel.notebook import html_table
from bilevel.problem import Problem
from bilevel.start import Start, StartFunction, choose_start, starting_point
from bilevel.types import Hypergradient, PyTree, Status
from bilevel.verify import tables
from bilevel.verify.flat import gradient_vector
from bilevel.verify.method_run import method_arguments, method_program, start_function
from bilevel.verify.programs import kept
from bilevel.verify.references import Reference, ReferenceUnavailable, dense, finite_differences


@dataclass(frozen=True)
class MethodReport:
    """The measurements of one method.

    Attributes:
        label: the method with its settings.
        error: ‖gradient − reference‖ / ‖reference‖, along the directions of the reference. It is absolute if the
            reference is zero, and None without a reference.
        seconds: the median of the timed runs, after compilation.
        compile_seconds: the time to trace and compile, in the first call with this problem, solver, method and shapes.
        temporary_bytes: the memory that the compiled program needs besides its arguments and results, by XLA's own
            count; None if XLA does not tell.
        products: products with ∂F/∂w or its transpose in one run. None if the method or the solver computes the whole
            matrix, because a batch of products cannot be counted.
        steps: the iterations that the inner solver reports.
        status: the worst status of the inner and the linear solve; NONFINITE if the value or gradient is not finite.
        out: what the method returned.
    """

    label: str
    error: float | None
    seconds: float
    compile_seconds: float
    temporary_bytes: int | None
    products: int | None
    steps: int
    status: Status
    out: Hypergradient


@dataclass(frozen=True)
class MethodComparison:
    """The result of :func:`compare_methods`; it prints as a table.

    Attributes:
        methods: one report for each method, in the order of the argument ``methods``.
        reference: the reference of the errors, in words.
    """

    methods: tuple[MethodReport, ...]
    reference: str

    @property
    def ok(self) -> bool:
        """True if every method has an ok status and a finite error; the size of the error is not judged."""
        return all(row.status.ok and row.error is not None and np.isfinite(row.error) for row in self.methods)

    def __str__(self) -> str:
        return f"{tables.table(_HEADER, self._rows())}\n{self._note()}"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), [self._note()])

    def _note(self):
        return f"error: relative to {self.reference}"

    def _rows(self):
        return [
            (
                row.label if len(row.label) <= 32 else f"{row.label[:31]}…",
                tables.figure(row.error),
                tables.figure(row.seconds),
                f"{row.compile_seconds:.1f}",
                "—" if row.temporary_bytes is None else f"{row.temporary_bytes / 1024:.1f}",
                "—" if row.products is None else str(row.products),
                str(row.steps),
                row.status.name,
            )
            for row in self.methods
        ]


_HEADER = ("method", "error", "seconds", "compile", "KiB", "products", "steps", "status")


def compare_methods(
    problem: Problem,
    theta: PyTree,
    init: Start,
    data: PyTree,
    solver: Callable,
    methods: Sequence[Callable[..., Hypergradient]],
    runs: int = 5,
    *,
    start: StartFunction | None = None,
) -> MethodComparison:
    """Run each method on one problem and measure its error, time, memory and products.

    Errors are relative to the dense solve at the inner solution (:func:`bilevel.verify.references.dense`), or to finite
    differences if A is singular or has more than 1000 rows. If Newton's method does not find the inner solution, both
    references use the solver's output. Each method is timed ``runs`` times. It is compiled once: a further call with
    the same problem, solver, method and shapes compiles nothing.

    Products are counted in a separate run, in which a callback counts each use of the derivative of F in w. Derivatives
    of ``potential``, which some methods take, are not counted.

    Args:
        problem, theta, init, data, solver: as for :func:`bilevel.value_and_hypergradient`.
        methods: each is called as ``method(problem, solver, theta, init, data)``.
        runs: the number of timed runs of each method.
        start: in place of ``init``, a function ``start(theta, data)`` that returns a pytree like w.

    Raises:
        ValueError: for no methods, or fewer than one run.
        TypeError: if neither or both of init and start are given, for a leaf of θ, init or data that is neither an
            array nor a number, for a complex leaf of θ, and for a leaf of init that is not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import CG, GradientDescent, Implicit, Stationary, Unrolled
        >>> condition = Stationary(lambda w, theta, data: 0.5 * jnp.sum(data * w**2) - w @ theta)
        >>> problem = Problem(condition, lambda w, theta, data: jnp.sum(w**2))
        >>> arguments = jnp.ones(2), jnp.zeros(2), jnp.array([1.0, 2.0])
        >>> found = compare_methods(problem, *arguments, GradientDescent(0.5, 3), [Implicit(CG(2)), Unrolled()])
        >>> [(row.label, row.products) for row in found.methods]  # CG: two steps, and one product for the residual
        [('Implicit(CG(2))', 3), ('Unrolled()', 3)]
    """
    if not methods or runs < 1:
        raise ValueError(f"compare_methods needs at least one method and one run, got {len(methods)} and {runs}")
    init = choose_start(init, start)
    theta, data = tree.real_arrays(tree.numbers_as_floats(theta), "theta"), tree.arrays(data, "data")
    starting_point(init, theta, data)  # raises an error for a leaf that is not floating point
    reference = _reference(problem, solver, theta, init, data)
    rows = tuple(_measure(problem, solver, theta, init, data, method, reference, runs) for method in methods)
    words = "nothing: no reference is available here"
    if reference is not None:
        words = f"{reference.name} at {reference.question}, itself uncertain by {reference.uncertainty.max():.1g}"
    return MethodComparison(rows, words)


def _reference(problem, solver, theta, init, data) -> Reference | None:
    """Return the dense reference or else finite differences; None if neither has a finite uncertainty."""
    for reference in (dense, finite_differences):
        try:
            found = reference(problem, solver, theta, init, data)
        except ReferenceUnavailable:
            continue
        if np.isfinite(found.uncertainty).all():
            return found
    return None


def _measure(problem, solver, theta, init, data, method, reference, runs):
    arguments, structure = jax.tree.flatten(method_arguments(theta, init, data))
    program, compiled_before = _program(problem, solver, method, start_function(init), structure)
    form = tuple((jax.typeof(leaf), leaf.sharding) for leaf in arguments)
    if form not in compiled_before:
        begin = time.perf_counter()
        compiled_before[form] = program.lower(*arguments).compile(), time.perf_counter() - begin
    compiled, compile_seconds = compiled_before[form]
    out = jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - begin)
    memory = compiled.memory_analysis()
    return MethodReport(
        label=tables.label(method),
        error=None if reference is None else _error(out.gradient, theta, reference),
        seconds=statistics.median(seconds),
        compile_seconds=compile_seconds,
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
        products=_count_products(problem, solver, theta, init, data, method),
        steps=int(np.max(out.inner.steps)),
        status=Status(int(np.max(out.status))),
        out=out,
    )


@kept
def _program(problem, solver, method, function, structure):
    """Return the method as a jitted function of leaves, and a dictionary for its compiled programs.

    The leaves are those of trees of this structure. ``lower`` would put descriptions of arrays in place of arrays into
    the trees themselves, which a user's class may refuse.
    """
    program = method_program(problem, solver, method, function)
    return jax.jit(lambda *leaves: program(*jax.tree.unflatten(structure, leaves))), {}


def _error(gradient, theta, reference):
    difference = reference.directions @ gradient_vector(gradient, theta) - reference.derivatives
    size = np.linalg.norm(reference.derivatives)
    return float(np.linalg.norm(difference) / (size if size > 0 else 1.0))


# --- Counting products ---------------------------------------------------------------------------------------------


def _count_products(problem, solver, theta, init, data, method) -> int | None:
    """Count products with ∂F/∂w or its transpose in one run; return None if they cannot be counted."""
    program, calls, uncountable = _counting_program(problem, solver, method, start_function(init))
    arguments = method_arguments(theta, init, data)
    types = tuple(map(jax.typeof, jax.tree.leaves(arguments)))
    if types in uncountable:
        return None
    calls.clear()
    try:
        jax.block_until_ready(program(*arguments))
    except NotImplementedError:  # `linear_call` has no batching rule, which computing the whole matrix needs
        uncountable.add(types)
        return None
    jax.effects_barrier()
    return len(calls)


@kept
def _counting_program(problem, solver, method, function):
    """Return the method as a jitted function, and a list to which each run appends an entry for each product.

    The third result is a set for the types of arguments whose products cannot be counted.
    """
    calls: list[None] = []
    condition: Any = _CountingCondition(problem.condition, calls)
    problem = Problem(condition, problem.outer, problem.has_aux)
    return jax.jit(method_program(problem, solver, method, function)), calls, set()


class _CountingCondition:
    """A condition that appends to ``calls`` whenever the derivative of its residual in w is applied."""

    def __init__(self, condition: Condition, calls: list[None]):
        self._condition = condition
        self._counting_identity = _counting_identity(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._condition, name)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return self._condition.residual(self._counting_identity(w), theta, data)


def _counting_identity(calls: list[None]) -> Callable[[PyTree], PyTree]:
    """Return the identity on trees whose derivative, forwards or backwards, appends to ``calls`` when it runs."""

    def derivative(_, tangent):
        jax.debug.callback(lambda: calls.append(None))
        return tangent

    @jax.custom_jvp
    def identity(w):
        return w

    @identity.defjvp
    def jvp(primals, tangents):
        return primals[0], linear_call(derivative, derivative, (), tangents[0])

    return identity
