"""The Krylov solvers of linear systems: CG, NormalCG, GMRES and BiCGStab.

Each class holds the options. The recursions are in ``watched_cg``, ``cgls``, ``gmres`` and ``bicgstab``. Only the
default engine of CG is jaxopt's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel._deprecation import renamed_field
from bilevel.linear import diagnosis
from bilevel.linear.bicgstab import bicgstab
from bilevel.linear.cgls import cgls
from bilevel.linear.gmres import gmres
from bilevel.linear.system import (
    Recursion,
    check_not_negative,
    denormalise,
    in_accumulation_dtype,
    normalise,
    recursive_tol,
    square,
)
from bilevel.linear.watched_cg import conjugate_gradients
from bilevel.types import LinearInfo, MatVec, PyTree, Status

ENGINES = ("jaxopt", "watched")


@renamed_field("maxiter", "max_steps")
@dataclass(frozen=True)
class CG:
    """Conjugate gradients, for a symmetric positive definite operator.

    Two engines run the same recursion. ``"jaxopt"`` is jaxopt's ``solve_cg``. Its report is computed from the result x
    alone. It holds the true residual, and its status is NEGATIVE_CURVATURE if ⟨x, Ax⟩ ≤ 0 or if the recursion divided
    by zero. A search direction p with ⟨p, Ap⟩ < 0 is not reported if ⟨x, Ax⟩ > 0. On a singular system whose nonzero
    eigenvalues span many orders of magnitude, further iterations of this engine may move x along the null space of A.
    ``"watched"`` is a loop of this library. It also reports the iterations taken and the least curvature among the
    search directions. Its status is NEGATIVE_CURVATURE if a direction has ⟨p, Ap⟩ < 0. It is SINGULAR if A maps a
    direction to zero and the relative residual stays above √eps and ``tol``. It is STAGNATION if the recursion ended
    before ``max_steps`` and the true residual is above ``tol``. The loop computes three more vector norms in each
    iteration.

    Args:
        max_steps: the budget, in iterations. Each iteration takes one product with A. The error after k iterations is
            of order ((√κ − 1)/(√κ + 1))^k, with the condition number κ of A.
        tol: stop at ‖b − Ax‖ ≤ tol·‖b‖. With None, the solver takes up to ``max_steps`` iterations. The status is then
            BUDGET_USED if ‖b − Ax‖ is below ‖b‖ or below ‖b − A·init‖, and MAX_STEPS otherwise. A worse status, such as
            SINGULAR, takes precedence.
        ridge: solve (A + ridge·I)x = b instead; the residual reported is that of this system.
        preconditioner: a function r ↦ M⁻¹r with a symmetric positive definite M; None for the identity.
        engine: ``"jaxopt"`` or ``"watched"``.

    Raises:
        ValueError: for a budget below one, a negative tolerance or ridge, or an unknown engine, and, when called, for
            an operator that is not square.

    Source: Hestenes and Stiefel (1952).

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = CG(max_steps=2)(lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 2.0]))
        >>> [round(float(entry), 5) for entry in x]
        [1.0, 0.5]
        >>> x, info = CG(5, engine="watched")(lambda v: jnp.array([2.0, -1.0, 0.5]) * v, jnp.ones(3))
        >>> Status(int(info.status)).name, bool(info.least_curvature < 0)
        ('NEGATIVE_CURVATURE', True)
    """

    max_steps: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None
    engine: Literal["jaxopt", "watched"] = "jaxopt"

    needs_symmetry = True

    def __post_init__(self) -> None:
        _check_iterative(self)
        if self.engine not in ENGINES:
            raise ValueError(f"CG needs an engine of {' or '.join(map(repr, ENGINES))}, got {self.engine!r}")

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        if self.engine == "watched":
            return _solve_watched(self, matvec, b, init)
        return _solve_with_jaxopt(self, matvec, b, init)


@renamed_field("maxiter", "max_steps")
@dataclass(frozen=True)
class NormalCG:
    """Conjugate gradients on AᵀAx = Aᵀb, for any regular operator, in the form CGLS, which never forms AᵀA.

    The method is robust. It is also slow, because the condition number of AᵀA is the square of that of A. Each
    iteration takes one product with A and one with Aᵀ.

    Args:
        max_steps: the budget, in iterations. The error after k iterations is of order ((κ − 1)/(κ + 1))^k, with the
            condition number κ of A.
        tol: stop at ‖b − Ax‖ ≤ tol·‖b‖. With None, the solver takes up to ``max_steps`` iterations. The status is then
            BUDGET_USED if ‖b − Ax‖ is below ‖b‖ or below ‖b − A·init‖, and MAX_STEPS otherwise. A worse status, such as
            SINGULAR, takes precedence. With or without ``tol``, the recursion also ends when the residual is at most
            eps·(‖b‖ + ‖A‖‖x‖), the size of the rounding errors in b − Ax.
        ridge: solve (A + ridge·I)x = b instead. The ridge of jaxopt's ``solve_normal_cg`` means another system,
            (AᵀA + ridge·I)x = Aᵀb.
        preconditioner: a function s ↦ M⁻¹s with a symmetric positive definite M ≈ AᵀA; None for the identity. It is
            applied to multiples of Aᵀ(b − Ax).

    Raises:
        ValueError: for a budget below one or a negative tolerance or ridge, and, when called, for an operator that is
            not square.

    Source: Hestenes and Stiefel (1952), section 10; Björck, Elfving, Strakoš (1998).

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> x, info = NormalCG(max_steps=4)(lambda v: matrix @ v, jnp.array([3.0, 1.0]))
        >>> [round(float(entry), 4) for entry in x]
        [1.0, 1.0]
    """

    max_steps: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None

    needs_symmetry = False

    def __post_init__(self) -> None:
        _check_iterative(self)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        return _solve_general(cgls, self, matvec, b, init)


@renamed_field("maxiter", "max_steps")
@dataclass(frozen=True)
class GMRES:
    """Generalised minimal residuals with restarts, for any regular operator.

    Args:
        max_steps: the budget, in iterations. Each iteration takes one product with A. Each cycle takes one more, for
            its true residual.
        tol: stop at ‖b − Ax‖ ≤ tol·‖b‖, also within a cycle. With None, the solver takes up to ``max_steps``
            iterations. The status is then BUDGET_USED if ‖b − Ax‖ is below ‖b‖ or below ‖b − A·init‖, and MAX_STEPS
            otherwise. A worse status, such as SINGULAR, takes precedence. With or without ``tol``, the recursion also
            ends when the residual is at most eps·(‖b‖ + ‖A‖‖x‖), the size of the rounding errors in b − Ax.
        ridge: solve (A + ridge·I)x = b instead.
        preconditioner: a function r ↦ M⁻¹r, applied from the right, so that residuals are those of Ax = b; None for
            the identity.
        restart: iterations in a cycle. A cycle takes no more iterations than b has entries. The basis takes
            min(``restart``, ``max_steps``, entries of b) + 1 vectors as large as b.

    Raises:
        ValueError: for a budget or restart below one or a negative tolerance or ridge, and, when called, for an
            operator that is not square.

    Source: Saad and Schultz (1986).

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> x, info = GMRES(max_steps=2)(lambda v: matrix @ v, jnp.array([3.0, 1.0]))
        >>> [round(float(entry), 4) for entry in x]
        [1.0, 1.0]
    """

    max_steps: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None
    restart: int = 20

    needs_symmetry = False

    def __post_init__(self) -> None:
        _check_iterative(self)
        if self.restart < 1:
            raise ValueError(f"GMRES needs restart of at least 1, got {self.restart}")

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        return _solve_general(partial(gmres, restart=self.restart), self, matvec, b, init)


@renamed_field("maxiter", "max_steps")
@dataclass(frozen=True)
class BiCGStab:
    """Stabilised biconjugate gradients, for any regular operator.

    Memory does not grow with the iterations. The recursion may break down, with status BREAKDOWN, on a system that
    GMRES solves. The residual can rise by orders of magnitude before it falls, which costs as many digits: in float32,
    prefer GMRES. The iterate with the smallest recursive residual is returned.

    Args:
        max_steps: the budget, in iterations. Each iteration takes two products with A.
        tol: stop at ‖b − Ax‖ ≤ tol·‖b‖. With None, the solver takes up to ``max_steps`` iterations. The status is then
            BUDGET_USED if ‖b − Ax‖ is below ‖b‖ or below ‖b − A·init‖, and MAX_STEPS otherwise. A worse status, such as
            SINGULAR, takes precedence. With or without ``tol``, the recursion also ends when the residual is at most
            eps·(‖b‖ + ‖A‖‖x‖), the size of the rounding errors in b − Ax.
        ridge: solve (A + ridge·I)x = b instead.
        preconditioner: a function r ↦ M⁻¹r, applied from the right, so that residuals are those of Ax = b; None for
            the identity.

    Raises:
        ValueError: for a budget below one or a negative tolerance or ridge, and, when called, for an operator that is
            not square.

    Source: van der Vorst (1992).

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> x, info = BiCGStab(max_steps=4)(lambda v: matrix @ v, jnp.array([3.0, 1.0]))
        >>> [round(float(entry), 4) for entry in x]
        [1.0, 1.0]
    """

    max_steps: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None

    needs_symmetry = False

    def __post_init__(self) -> None:
        _check_iterative(self)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        return _solve_general(bicgstab, self, matvec, b, init)


Iterative = CG | NormalCG | GMRES | BiCGStab


def _solve_with_jaxopt(solver: CG, matvec: MatVec, b: PyTree, init: PyTree | None) -> tuple[PyTree, LinearInfo]:
    """Run jaxopt's CG in the dtype of :func:`tree.widened`, and report on its result."""
    from bilevel._jaxopt import library  # imports jaxopt

    operator = square("CG", matvec, solver.ridge, b, init)
    size, b_scaled, init_scaled = normalise(b, init)
    wide = in_accumulation_dtype(operator, b)
    if init is None:
        wide = _without_zero_products(wide)
    start = None if init is None else tree.widened(init_scaled)
    # Stop at 4·eps: on a singular system, the recursive residual would stay near eps while x moves along the null space
    # of A.
    tol, preconditioner = max(recursive_tol(solver.tol, b), 4 * tree.eps(b)), _preconditioner(solver, b)
    # jaxopt gets lists of leaves. It builds trees of scalars, which a pytree class that checks its fields may refuse.
    structure = jax.tree.structure(b)

    def on_leaves(function: MatVec) -> MatVec:
        return lambda leaves: jax.tree.leaves(function(jax.tree.unflatten(structure, leaves)))

    with jax.numpy_dtype_promotion("standard"):
        leaves = library.solve_cg(
            on_leaves(wide),
            jax.tree.leaves(tree.widened(b_scaled)),
            init=None if start is None else jax.tree.leaves(start),
            tol=tol,
            maxiter=solver.max_steps,
            M=None if preconditioner is None else on_leaves(preconditioner),
        )
    x = tree.like(jax.tree.unflatten(structure, leaves), b)
    breakdown = Status.NEGATIVE_CURVATURE
    info = diagnosis.report(
        operator, b_scaled, x, solver.tol, init=init_scaled, breakdown=breakdown, needs_definite=True
    )
    return denormalise(size, x, info)


def _solve_general(
    algorithm: Callable[..., Recursion],
    solver: NormalCG | GMRES | BiCGStab,
    matvec: MatVec,
    b: PyTree,
    init: PyTree | None,
) -> tuple[PyTree, LinearInfo]:
    """Run an algorithm on the ravelled system in the accumulation dtype, and report on its result."""
    operator = square(type(solver).__name__, matvec, solver.ridge, b, init)
    size, b_scaled, init_scaled = normalise(b, init)
    flat, unravel = ravel_pytree(tree.widened(b_scaled))
    if not flat.size:  # without unknowns there is nothing to iterate
        return denormalise(size, b_scaled, diagnosis.report(operator, b_scaled, b_scaled, solver.tol))
    start = None if init is None else ravel_pytree(tree.widened(init_scaled))[0]

    def flattened(matvec: MatVec) -> MatVec:
        wide = in_accumulation_dtype(matvec, b)
        return lambda v: ravel_pytree(wide(unravel(v)))[0]

    def solve(matvec: MatVec, b_flat: jax.Array, start: jax.Array | None = None) -> tuple[jax.Array, Any]:
        preconditioner = flattened(solver.preconditioner) if solver.preconditioner else lambda r: r
        tol, eps = recursive_tol(solver.tol, b), tree.eps(b)
        seen = algorithm(matvec, b_flat, start, solver.max_steps, tol, eps, preconditioner)
        # custom_linear_solve refuses integers among its auxiliary outputs.
        numbers = replace(seen, x=None, **{name: getattr(seen, name).astype(flat.dtype) for name in COUNTS})
        return tree.match_varying_axes(seen.x, numbers)  # type: ignore[return-value]

    # JAX differentiates x by another linear solve, and not through the steps of this solve.
    x, numbers = jax.lax.custom_linear_solve(
        flattened(operator), flat, partial(solve, start=start), transpose_solve=solve, has_aux=True
    )
    seen = replace(
        numbers,
        iterations=numbers.iterations.astype(jnp.int32),
        null=numbers.null > 0,
        broke=numbers.broke > 0,
    )
    x = tree.like(unravel(x), b)
    info = diagnosis.report_recursion(operator, b_scaled, x, solver.tol, solver.max_steps, seen, init_scaled)
    return denormalise(size, x, info)


COUNTS = ("iterations", "null", "broke")
"""Fields of :class:`Recursion` that are not floating point."""


def _without_zero_products(matvec: MatVec) -> MatVec:
    """Return ``matvec`` with the product of a zero vector replaced by zeros.

    jaxopt's ``solve_cg`` calls ``jax.scipy.sparse.linalg.cg``, which multiplies its start by A even if the start is
    zero. Only the jaxopt engine of CG needs this function, because the loops of this library take no product for a zero
    start. It must not be used in ``_solve_general``, where JAX transposes ``matvec``: JAX cannot transpose a ``cond``
    whose predicate depends on v.
    """

    def product(v: PyTree) -> PyTree:
        nonzero = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(v)]
        needed = tree.in_any_task(jnp.stack(nonzero).any()) if nonzero else True
        return jax.lax.cond(needed, matvec, lambda v: jax.tree.map(jnp.zeros_like, v), v)

    return product


def _solve_watched(solver: CG, matvec: MatVec, b: PyTree, init: PyTree | None) -> tuple[PyTree, LinearInfo]:
    operator = square("CG", matvec, solver.ridge, b, init)
    size, b_scaled, init_scaled = normalise(b, init)
    state = conjugate_gradients(
        in_accumulation_dtype(operator, b),
        tree.widened(b_scaled),
        None if init is None else tree.widened(init_scaled),
        solver.max_steps,
        recursive_tol(solver.tol, b),
        _preconditioner(solver, b),
    )
    x, state = tree.like(state.x, b), jax.lax.stop_gradient(state)
    seen = Recursion(x, state.iterations, state.largest_stretch, state.null, jnp.zeros_like(state.null))
    info = diagnosis.report_recursion(
        operator, b_scaled, x, solver.tol, solver.max_steps, seen, init_scaled, needs_definite=True
    )
    negative = jnp.where(state.negative, jnp.int32(Status.NEGATIVE_CURVATURE), info.status)
    info = replace(info, status=jnp.maximum(info.status, negative), least_curvature=state.least_curvature)
    return denormalise(size, x, info)


def _preconditioner(solver: Iterative, b: PyTree) -> MatVec | None:
    """Return r ↦ M⁻¹r in the accumulation dtype, or None if the solver has no preconditioner."""
    return None if solver.preconditioner is None else in_accumulation_dtype(solver.preconditioner, b)


def _check_iterative(solver: Iterative) -> None:
    name = type(solver).__name__
    if solver.max_steps < 1:
        raise ValueError(f"{name} needs max_steps of at least 1, got {solver.max_steps}")
    check_not_negative(name, tol=solver.tol, ridge=solver.ridge)
