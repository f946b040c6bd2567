"""Failed solves of a layer: errors and warnings, outside of ``jit``.

JAX runs the linear solve of a layer's derivative after the call of the layer, in a program that returns no status. A
callback in that program records a failed status. :meth:`LinearWatch.after_derivative` reports the worst recorded status
when JAX has computed the derivative.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bilevel import tree
from bilevel.errors import Policy, raise_or_warn
from bilevel.linear import run_linear
from bilevel.types import LinearInfo, LinearSolver, MatVec, PyTree, Solution, Status


def check_solution(solution: Solution, on_failure: Policy) -> None:
    """Raise an error or warn about a failed inner solve of a layer. A status that is traced is not checked."""
    number, residual_norm = solution.status, solution.residual_norm
    # Without a tracer, stop_gradient changes nothing and would take half of the time of this function.
    if isinstance(number, Tracer):
        number, residual_norm = jax.lax.stop_gradient((number, residual_norm))
    if isinstance(number, Tracer):
        return
    status = Status(int(number))
    if not status.ok:
        message = f"inner solve of a layer, {status.name}, ‖F‖ = {float(residual_norm):.3g}: {status.message}"
        raise_or_warn(message, solution, on_failure)


def is_concrete(variables: PyTree) -> bool:
    """Return whether every leaf has a value.

    An array has a value, and so has a tracer of a derivative that is taken outside of ``jit`` and ``vmap``.
    """
    tracers = (leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, Tracer))
    return not any(isinstance(jax.lax.stop_gradient(leaf), Tracer) for leaf in tracers)


@dataclass(frozen=True, eq=False)
class LinearWatch:
    """The record of the failed linear solves of a layer."""

    on_failure: Policy
    failures: list[tuple[int, float]] = field(default_factory=list)

    def over(self, linear: LinearSolver) -> LinearSolver:
        """Return the linear solver, with a callback that records each failure while the program runs."""

        def solve(matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
            x, info = run_linear(linear, matvec, b, init)
            limit = max(1e-5, tree.eps(b) ** 0.5)
            jax.debug.callback(partial(self._record, limit), info.status, info.relative_residual)
            return x, info

        return solve

    def _record(self, limit: float, status: Any, residual: Any) -> None:
        unjudged = int(status) == Status.BUDGET_USED and not float(residual) <= limit
        if unjudged or not Status(int(status)).ok:
            self.failures.append((int(status), float(residual)))

    def after_derivative(self, x: PyTree) -> PyTree:
        """Return ``x``. When JAX computes its tangent or cotangent, the worst failure recorded so far is reported."""
        return _watched(self, x) if tree.is_traced(x) else x

    def check(self) -> None:
        """Raise an error or warn about the worst of the recorded failures, and forget all of them."""
        jax.effects_barrier()
        failures = list(self.failures)
        self.failures.clear()
        if failures:
            number, residual = max(failures)
            status = Status(number)
            remedy = status.message
            if status.ok:
                remedy = (
                    "the linear solver has no tol, and its budget was too small for the derivative: allow more steps, "
                    "or set tol to a relative residual that you accept"
                )
            message = f"linear solve in the derivative of a layer, {status.name}, relative residual {residual:.3g}: "
            raise_or_warn(message + remedy, None, self.on_failure)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _watched(watch: LinearWatch, x: PyTree) -> PyTree:
    del watch
    return x


@_watched.defjvp
def _watch_tangents(watch: LinearWatch, primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
    def watched(tangent: Any) -> Any:
        is_float0 = jax.dtypes.result_type(tangent) == jax.dtypes.float0  # the tangent may be a Python number
        return tangent if is_float0 else _watched_p.bind(tangent, watch=watch)

    return _watched(watch, *primals), jax.tree.map(watched, tangents[0])


def _evaluate(tangent: Any, *, watch: LinearWatch) -> Any:
    watch.check()
    return tangent


# The identity on tangents and cotangents. Outside of jit its evaluation calls watch.check; in a compiled program it
# does nothing.
_watched_p = Primitive("watched_derivative")
_watched_p.def_impl(_evaluate)
_watched_p.def_abstract_eval(lambda tangent, watch: tangent)
mlir.register_lowering(_watched_p, lambda context, tangent, watch: [tangent])
ad.deflinear2(_watched_p, lambda cotangent, tangent, watch: [_watched_p.bind(cotangent, watch=watch)])
batching.defvectorized(_watched_p)
