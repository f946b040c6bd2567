"""The linear solver Lineax, which runs a solver of the library Lineax."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import spectrum, tree
from bilevel.linear import diagnosis
from bilevel.linear.dense import lu, report_direct
from bilevel.linear.system import check_not_negative, denormalise, in_accumulation_dtype, normalise, square
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@dataclass(frozen=True)
class Lineax:
    """A solver of Lineax, for the adjoint system. Needs ``pip install lineax``.

    b is divided by its norm before the solve, so that ``atol`` of the solver is relative to ‖b‖, as its ``rtol`` is. A
    is divided by about ‖Ab‖/‖b‖, which costs one product. The unknowns are raveled into one vector, and products with A
    are all that the solver knows about A. For CG and Cholesky, A is tagged with ``positive_semidefinite_tag``, so they
    need a symmetric condition.

    The status follows from the true relative residual of x:

    - CG, GMRES, BiCGStab, LSMR, or Normal of one of them, with ``tol``: CONVERGED if the residual is at most ``tol``.
      If it is larger: STOPPED where Lineax met its own tolerance, STAGNATION or BREAKDOWN where Lineax reports one of
      them, and MAX_STEPS otherwise.
    - The same solvers without ``tol``: BUDGET_USED if the residual is below 1 or below that of ``init``, and MAX_STEPS
      otherwise. If Lineax reports a stagnation or a breakdown and the residual is above √eps, the status is STAGNATION
      or BREAKDOWN, or a status with a larger number.
    - LU, QR, SVD, Cholesky, AutoLinearSolver without ``tol``: as for :class:`LU`, by the backward error and an estimate
      of the condition number, which takes an LU factorisation of the matrix. SVD and
      ``AutoLinearSolver(well_posed=False)`` find the shortest solution of a singular system. With them, and with
      ``AutoLinearSolver(well_posed=None)``, a singular system is not reported as SINGULAR.
    - The same solvers with ``tol``: CONVERGED if the residual is at most ``tol``, and BREAKDOWN otherwise. If x is not
      finite, as after a division by zero, the status is SINGULAR.
    - CG and Cholesky: NEGATIVE_CURVATURE if x is not finite. CG, and Cholesky with ``tol``, have this status also if
      ⟨x, Ax⟩ ≤ 0.

    CG runs once more, from its x, if its budget ended with a residual of 1 or more.

    ``LinearInfo.iterations`` is the number of steps that Lineax counts; for GMRES they are cycles of ``restart``
    iterations. It is None for a factorisation.

    A layer or a hypergradient attaches the derivative of x. If this solver is called directly, JAX's derivative of x is
    zero. To differentiate a linear solve by itself, use ``lineax.linear_solve``.

    Args:
        solver: an instance of a solver of Lineax, such as ``lineax.CG(rtol=1e-6, atol=0.0)``.
        tol: the tolerance for the true relative residual ‖b − Ax‖ / ‖b‖. It decides the status only: the solver stops
            by its own ``rtol`` and ``atol``.
        ridge: solve (A + ridge·I)x = b instead.

    Raises:
        ImportError: if Lineax is not installed.
        TypeError: for a solver that is not an instance of a solver of Lineax.
        ValueError: for a negative tol or ridge, and for the solvers of diagonal, triangular and tridiagonal matrices,
            because products do not show that structure. When called, for an operator that is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> import lineax
        >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> x, info = Lineax(lineax.CG(rtol=1e-6, atol=0.0), tol=1e-5)(lambda v: matrix @ v, jnp.array([3.0, 3.0]))
        >>> [round(float(entry), 4) for entry in x], Status(int(info.status)).name
        ([1.0, 1.0], 'CONVERGED')
    """

    solver: Any
    tol: float | None = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        lineax = _import_lineax()
        if not isinstance(self.solver, lineax.AbstractLinearSolver):
            raise TypeError(
                "Lineax takes an instance of a solver of lineax, such as lineax.CG(rtol=1e-6, atol=0.0), got "
                f"{self.solver!r}"
            )
        if isinstance(self.solver, lineax.Diagonal | lineax.Triangular | lineax.Tridiagonal):
            raise ValueError(
                f"lineax.{type(self.solver).__name__} needs a matrix of known structure, but the operator is known by "
                "its products only: use lineax.LU(), lineax.AutoLinearSolver(well_posed=None), lineax.CG or "
                "lineax.GMRES"
            )
        check_not_negative("Lineax", tol=self.tol, ridge=self.ridge)

    @property
    def needs_symmetry(self) -> bool:
        """True for CG and Cholesky, which need a symmetric operator."""
        lineax = _import_lineax()
        return isinstance(self.solver, lineax.CG | lineax.Cholesky)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        operator = square(f"lineax.{type(self.solver).__name__}", matvec, self.ridge, b, init)
        size, b_scaled, init_scaled = normalise(b, init, target=1.0)
        flat, unravel = ravel_pytree(tree.widened(b_scaled))
        if not flat.size:  # without unknowns there is nothing to solve
            return denormalise(size, b_scaled, diagnosis.report(operator, b_scaled, b_scaled, tol=0.0))
        start = None if init is None else ravel_pytree(tree.widened(init_scaled))[0]
        wide = in_accumulation_dtype(operator, b)

        def flattened(v: jax.Array) -> jax.Array:
            return ravel_pytree(wide(unravel(v)))[0]

        def attempt(start: jax.Array | None) -> tuple[jax.Array, LinearInfo]:
            solution, steps, failure = _solve(self.solver, flattened, flat, start, definite=self.needs_symmetry)
            x, is_direct = tree.like(unravel(solution), b), steps is None
            if is_direct and self.tol is None:
                matrix = spectrum.matrix(flattened, flat)
                return solution, report_direct(
                    operator, b_scaled, x, matrix, solution, *lu(matrix), self._breakdown(True), self._needs_regular
                )
            info = diagnosis.report(
                operator,
                b_scaled,
                x,
                self.tol,
                iterations=steps,
                init=init_scaled,
                failure=Status.BREAKDOWN if is_direct else failure,
                breakdown=self._breakdown(is_direct),
                needs_definite=self.needs_symmetry,
            )
            if self.tol is None:  # a residual alone does not show that the solver stagnated or broke down
                failed = (failure == int(Status.BREAKDOWN)) | (failure == int(Status.STAGNATION))
                failed &= info.relative_residual > tree.eps(b) ** 0.5  # an exact x ends BiCGStab with a breakdown too
                info = replace(info, status=jnp.where(failed, jnp.maximum(info.status, failure), info.status))
            return solution, info

        if isinstance(self.solver, _import_lineax().CG):
            solution, residual, steps, status = _twice_if_lost(attempt, flat, start)
            info = LinearInfo(tree.like(unravel(solution), b), residual, steps, status)
        else:
            _, info = attempt(start)
        return denormalise(size, info.solution, info)

    @property
    def _needs_regular(self) -> bool:
        """False for SVD, and for AutoLinearSolver unless ``well_posed=True``: they may solve a singular system."""
        lineax = _import_lineax()
        finds_shortest = isinstance(self.solver, lineax.AutoLinearSolver) and self.solver.well_posed is not True
        return not (finds_shortest or isinstance(self.solver, lineax.SVD))

    def _breakdown(self, is_direct: bool) -> Status:
        """Return the status of an x that is not finite although A and b are finite."""
        if self.needs_symmetry:
            return Status.NEGATIVE_CURVATURE
        return Status.SINGULAR if is_direct else Status.BREAKDOWN


def _solve(
    solver: Any, matvec: MatVec, b: jax.Array, start: jax.Array | None, definite: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Return x, the steps taken (None for a factorisation), and the status of a residual above the tolerance."""
    lineax = _import_lineax()
    tags = lineax.positive_semidefinite_tag if definite else ()
    # b has norm 1, and A is scaled to about ‖Ab‖ = 1, because products of small or large numbers leave the range of
    # float32. The scale is a power of two, so the scaling changes no digit. The barrier keeps XLA from multiplying the
    # scales of both factors of AᵀA, because their product may leave that range.
    if isinstance(solver, lineax.LSMR):  # it mixes numbers of JAX's default dtype with those of b
        narrow, dtype = matvec, b.dtype
        matvec = lambda v: narrow(v.astype(dtype)).astype(float)  # noqa: E731
        b, start = b.astype(float), None if start is None else start.astype(float)
    product = jax.lax.stop_gradient(matvec(b))
    size = tree.norm(product)
    size = jnp.where((size > 0) & jnp.isfinite(size), jnp.exp2(jnp.round(jnp.log2(size))), 1) / _enlargement(solver, b)
    start = None if start is None else size * start
    operator = lineax.FunctionLinearOperator(
        lambda v: jax.lax.optimization_barrier(matvec(v) / size), jax.ShapeDtypeStruct(b.shape, b.dtype), tags
    )
    # Neither x nor the report needs a derivative here: bilevel.theorem attaches that of x. Lineax's own derivative rule
    # would stop the program where its linear solve fails.
    operator, b, start = jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, (operator, b, start)
    )
    options = {} if start is None else {"y0": start}
    found = lineax.linear_solve(operator, b, solver, options=options, throw=False)
    failure = jnp.int32(Status.MAX_STEPS)
    for result, status in (
        (lineax.RESULTS.successful, Status.STOPPED),
        (lineax.RESULTS.stagnation, Status.STAGNATION),
        (lineax.RESULTS.breakdown, Status.BREAKDOWN),
    ):
        failure = jnp.where(found.result == result, jnp.int32(status), failure)
    steps, budget = (found.stats.get(name) for name in ("num_steps", "max_steps"))
    if budget is not None:  # with rtol = 0 and atol = 0, Lineax reports the end of its budget as a success
        spent = (failure == int(Status.STOPPED)) & (jnp.asarray(steps) >= budget)
        failure = jnp.where(spent, jnp.int32(Status.MAX_STEPS), failure)
    nonzero = jnp.any(b != 0)  # BiCGStab divides zero by zero for b = 0
    failure = jnp.where(nonzero, failure, jnp.int32(Status.MAX_STEPS))
    # If Ab is a multiple of b, then so is x. BiCGStab divides zero by zero after it has found this x.
    product = product / size
    factor = tree.vdot(product, b) / tree.safe_divisor(tree.vdot(product, product))
    is_multiple = tree.norm(b - factor * product) <= 4 * jnp.finfo(b.dtype).eps
    x = jnp.where(is_multiple, factor * b, found.value) / size
    return jnp.where(nonzero, x, jnp.zeros_like(b)), steps, jnp.where(is_multiple, jnp.int32(Status.MAX_STEPS), failure)


def _twice_if_lost(
    attempt: Callable[[jax.Array], tuple[jax.Array, LinearInfo]], b: jax.Array, start: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Run a solver, and run it again from its solution if that is no better than zero.

    Lineax's CG goes on to the end of its budget if rounding keeps the residual above its tolerance. In float32, the
    rounding errors of these steps may move x far away from the solution that was found before.

    Returns:
        the solution, the relative residual, the steps of both runs, and the status.
    """

    def is_lost(carry: tuple[jax.Array, ...]) -> jax.Array:
        _, residual, _, status, runs = carry
        return (runs < 2) & (status == int(Status.MAX_STEPS)) & (residual >= 1)

    def run(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        solution, info = attempt(carry[0])
        assert info.iterations is not None
        return solution, info.relative_residual, carry[2] + info.iterations, info.status, carry[4] + 1

    # The loop contains the only copy of the solver, because Lineax's CG takes long to compile. It runs at least once.
    infinite = jnp.asarray(jnp.inf, b.dtype)
    first = jnp.zeros_like(b) if start is None else start, infinite, jnp.int32(0), jnp.int32(Status.MAX_STEPS)
    carry = tree.match_varying_axes((*first, jnp.int32(0)), b)[0]
    solution, residual, steps, status, _ = jax.lax.while_loop(is_lost, run, carry)
    return solution, residual, steps, status


def _enlargement(solver: Any, b: jax.Array) -> float:
    """Return the power of two by which A is multiplied for a solver of Lineax that compares A with an absolute number.

    Lineax's CG returns NaN for a direction p with ⟨p, Ap⟩ ≤ 100·n·eps·‖r‖², where n is the number of unknowns. In
    float32 with ‖A‖ = 1, this holds for every direction if n is above 1e5. For n = 10, it holds for directions that
    occur if the condition number is above 1e4. If A is multiplied by about 100·n, the limit is eps·‖A‖‖r‖² instead. For
    Normal(CG), AᵀA takes the place of A.
    """
    lineax = _import_lineax()
    is_normal = isinstance(solver, lineax.Normal)
    if not isinstance(solver.inner_solver if is_normal else solver, lineax.CG):
        return 1.0
    return 2.0 ** round(math.log2(100 * b.size) / (2 if is_normal else 1))


def _import_lineax() -> Any:
    try:
        import lineax
    except ImportError as error:
        raise ImportError("bl.Lineax needs the package lineax: pip install lineax") from error
    return lineax
