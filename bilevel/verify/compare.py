"""Methods side by side: how far off, how long, how much memory, how many products with the inner Jacobian."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import linear_call

from bilevel.conditions import Condition
from bilevel.problem import Problem
from bilevel.types import Hypergradient, PyTree, Status
from bilevel.verify import oracles, tables


@dataclass(frozen=True)
class MethodReport:
    """One method's row.

    Attributes:
        label: the method.
        error: ‖gradient − reference‖ / ‖reference‖, along the directions of the comparison; None without a
            reference, the absolute error where the reference is zero.
        seconds: the median of the timed runs, after compilation.
        compile_seconds: to trace and compile.
        temporary_bytes: XLA's own count of what the compiled program needs beside its arguments and results.
        products: with ∂F/∂w or its transpose, when run; None for a method or solver that writes the matrix out,
            which asks for all of its columns at once.
        steps: of the inner solver, as reported.
        status: the worse of both solves.
        out: the method's own report.
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
    """What :func:`compare_methods` measured, in the order of the methods.

    Attributes:
        methods: a row each.
        reference: what errors are measured against, in words.
    """

    methods: tuple[MethodReport, ...]
    reference: str

    @property
    def ok(self) -> bool:
        """Whether every method ended well and with a finite error; how small is for the reader to judge."""
        return all(row.status.ok and row.error is not None and np.isfinite(row.error) for row in self.methods)

    def __str__(self) -> str:
        header = ("method", "error", "seconds", "compile", "KiB", "products", "steps", "status")
        rows = [
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
        return f"{tables.table(header, rows)}\nerror: relative to {self.reference}"


def compare_methods(
    problem: Problem,
    theta: PyTree,
    init: PyTree | Callable[[PyTree, PyTree], PyTree],
    data: PyTree,
    solver: Callable,
    methods: Sequence[Callable[..., Hypergradient]],
    runs: int = 5,
) -> MethodComparison:
    """Run each method on one problem, and measure.

    The reference is the dense solve at the inner solution (:func:`bilevel.verify.oracles.dense`), or finite differences
    where A is too large; its own uncertainty is said beside it. Each method is compiled once and timed ``runs``
    times; products are counted in a run of their own, by a tick in the tangent of w wherever the residual is
    differentiated. A method that takes other derivatives (of ``potential``) is counted as far as it asks F.

    Args:
        problem, theta, init, data, solver: as for :func:`bilevel.value_and_hypergradient`.
        methods: called as ``method(problem, solver, theta, init, data)``.
        runs: timed runs of each.

    Raises:
        ValueError: for no methods, or fewer than one run.

    Example:
        >>> from bilevel import CG, GradientDescent, Implicit, Stationary, Unrolled
        >>> condition = Stationary(lambda w, theta, data: 0.5 * jnp.sum(data * w**2) - w @ theta)
        >>> problem = Problem(condition, lambda w, theta, data: jnp.sum(w**2))
        >>> arguments = jnp.ones(2), jnp.zeros(2), jnp.array([1.0, 2.0])
        >>> found = compare_methods(problem, *arguments, GradientDescent(0.5, 3), [Implicit(CG(2)), Unrolled()])
        >>> [(row.label, row.products) for row in found.methods]  # CG: two steps, the true residual
        [('Implicit(CG(2))', 3), ('Unrolled()', 3)]
    """
    if not methods or runs < 1:
        raise ValueError(f"compare_methods needs at least one method and one run, got {len(methods)} and {runs}")
    theta, data = jax.tree.map(jnp.asarray, (theta, data))
    reference = _reference(problem, solver, theta, init, data)
    rows = tuple(_measure(problem, solver, theta, init, data, method, reference, runs) for method in methods)
    words = "nothing: no reference could answer here"
    if reference is not None:
        words = f"{reference.name} at {reference.question}, itself uncertain by {reference.uncertainty.max():.1g}"
    return MethodComparison(rows, words)


def _reference(problem, solver, theta, init, data):
    for oracle in (oracles.dense, oracles.finite_differences):
        try:
            found = oracle(problem, solver, theta, init, data)
        except oracles.OracleError:
            continue
        if np.isfinite(found.uncertainty).all():
            return found
    return None


def _measure(problem, solver, theta, init, data, method, reference, runs):
    program, arguments = _program(problem, solver, theta, init, data, method)
    begin = time.perf_counter()
    compiled = jax.jit(program).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - begin
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


def _program(problem, solver, theta, init, data, method):
    if callable(init):
        return lambda theta, data: method(problem, solver, theta, init, data), (theta, data)
    start = jax.tree.map(jnp.asarray, init)
    return lambda theta, start, data: method(problem, solver, theta, start, data), (theta, start, data)


def _error(gradient, theta, reference):
    difference = reference.directions @ oracles.derivatives_of(gradient, theta) - reference.derivatives
    size = np.linalg.norm(reference.derivatives)
    return float(np.linalg.norm(difference) / (size if size > 0 else 1.0))


# --- Counting ------------------------------------------------------------------------------------------------------


def _count_products(problem, solver, theta, init, data, method):
    """Products with ∂F/∂w or its transpose in one run; None where they cannot be told."""
    ticks = []
    condition: Any = _Counted(problem.condition, ticks)
    program, arguments = _program(Problem(condition, problem.outer, problem.has_aux), solver, theta, init, data, method)
    try:
        jax.block_until_ready(jax.jit(program)(*arguments))
    except NotImplementedError:  # the tick cannot be batched, as a matrix that is written out would have it
        return None
    jax.effects_barrier()
    return len(ticks)


class _Counted:
    """A condition whose residual ticks whenever its derivative in w is applied."""

    def __init__(self, condition: Condition, ticks: list[None]):
        self._condition = condition
        self._ticking = _ticking(ticks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._condition, name)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return self._condition.residual(self._ticking(w), theta, data)


def _ticking(ticks):
    """The identity on trees, with a tick for each use of its (linear) derivative, forwards or backwards."""

    def product(_, tangent):
        jax.debug.callback(lambda: ticks.append(None))
        return tangent

    @jax.custom_jvp
    def identity(w):
        return w

    @identity.defjvp
    def push(primals, tangents):
        return primals[0], linear_call(product, product, (), tangents[0])

    return identity
