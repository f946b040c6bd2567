"""Linear solvers for the adjoint system: one protocol, jaxopt's algorithms, and an honest report.

A solver is a frozen value, called as ``solver(matvec, b, init=None) -> (x, LinearInfo)`` on any pytree.
jaxopt returns x and nothing else, and a recursive residual can be wrong by orders of magnitude in float32,
so each solve ends with one product of its own, from which :mod:`bilevel.diagnosis` has the true residual and the
status.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import diagnosis, tree
from bilevel.conditions import Condition
from bilevel.types import LinearInfo, LinearSolver, MatVec, PyTree, Status


@dataclass(frozen=True)
class CG:
    """Conjugate gradients, for a symmetric positive definite operator: jaxopt's ``solve_cg``.

    Args:
        maxiter: iterations, each one product. The error falls like ((√κ − 1)/(√κ + 1))^k.
        tol: stop at ‖b − Ax‖ ≤ tol·‖b‖; None spends ``maxiter``, which is then no failure.
        ridge: solves (A + ridge·I)x = b instead; the residual reported is that system's.
        preconditioner: a function r ↦ M⁻¹r, symmetric positive definite; None for the identity.

    Raises:
        ValueError: for a budget below one or a negative tolerance or ridge.

    Source: Hestenes and Stiefel (1952).

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = CG(maxiter=2)(lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 2.0]))
        >>> [round(float(entry), 5) for entry in x]
        [1.0, 0.5]
    """

    maxiter: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None

    needs_symmetry = True

    def __post_init__(self):
        _check_iterative(self)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        return _iterate("solve_cg", self, matvec, b, init, self.maxiter, definite=True)


@dataclass(frozen=True)
class NormalCG:
    """Conjugate gradients on AᵀAx = Aᵀb, for any regular operator: jaxopt's ``solve_normal_cg``.

    Sure, and slow: the condition number counts twice. Each iteration is a product with A and one with Aᵀ.

    Args:
        maxiter: iterations. The error falls like ((κ − 1)/(κ + 1))^k.
        tol: stop at ‖b − Ax‖ ≤ tol·‖b‖, by the true residual; None spends ``maxiter``, which is then no failure.
            The recursion sees Aᵀ(b − Ax) only, so it runs until that is of rounding size.
        ridge: solves (A + ridge·I)x = b instead.
        preconditioner: a function r ↦ M⁻¹r for AᵀA, symmetric positive definite; None for the identity.

    Raises:
        ValueError: for a budget below one or a negative tolerance or ridge.

    Source: Hestenes and Stiefel (1952), section 10.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> x, info = NormalCG(maxiter=4)(lambda v: matrix @ v, jnp.array([3.0, 1.0]))
        >>> [round(float(entry), 4) for entry in x]
        [1.0, 1.0]
    """

    maxiter: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None

    needs_symmetry = False

    def __post_init__(self):
        _check_iterative(self)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        # ‖Aᵀr‖ bounds no ‖r‖ without knowledge of A: only rounding stops the recursion.
        return _iterate("solve_normal_cg", self, matvec, b, init, self.maxiter, tol=_recursive_tol(None, b))


@dataclass(frozen=True)
class GMRES:
    """Generalised minimal residuals, for any regular operator: jaxopt's ``solve_gmres``.

    Args:
        maxiter: products in all: cycles of ``restart`` of them, at least one cycle.
        tol: stop after a cycle with ‖b − Ax‖ ≤ tol·‖b‖; None spends ``maxiter``, which is then no failure.
        ridge: solves (A + ridge·I)x = b instead.
        preconditioner: a function r ↦ M⁻¹r, from the left; None for the identity.
        restart: the Krylov vectors kept, each as large as b, at most as many as b has entries.

    Raises:
        ValueError: for a budget or restart below one or a negative tolerance or ridge.

    Source: Saad and Schultz (1986).

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> x, info = GMRES(maxiter=2)(lambda v: matrix @ v, jnp.array([3.0, 1.0]))
        >>> [round(float(entry), 4) for entry in x]
        [1.0, 1.0]
    """

    maxiter: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None
    restart: int = 20

    needs_symmetry = False

    def __post_init__(self):
        _check_iterative(self)
        if self.restart < 1:
            raise ValueError(f"GMRES needs restart of at least 1, got {self.restart}")

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        restart = min(self.restart, self.maxiter)
        return _iterate("solve_gmres", self, matvec, b, init, -(-self.maxiter // restart), restart=restart)


@dataclass(frozen=True)
class BiCGStab:
    """Stabilised biconjugate gradients, for any regular operator: jaxopt's ``solve_bicgstab``.

    Two products an iteration and no growing memory, yet it may break down where GMRES does not.

    Args:
        maxiter: iterations, each two products.
        tol: stop at ‖b − Ax‖ ≤ tol·‖b‖; None spends ``maxiter``, which is then no failure.
        ridge: solves (A + ridge·I)x = b instead.
        preconditioner: a function r ↦ M⁻¹r; None for the identity.

    Raises:
        ValueError: for a budget below one or a negative tolerance or ridge.

    Source: van der Vorst (1992).

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> x, info = BiCGStab(maxiter=4)(lambda v: matrix @ v, jnp.array([3.0, 1.0]))
        >>> [round(float(entry), 4) for entry in x]
        [1.0, 1.0]
    """

    maxiter: int = 20
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: Callable[[PyTree], PyTree] | None = None

    needs_symmetry = False

    def __post_init__(self):
        _check_iterative(self)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        # It divides by ‖Ar‖² and ends in 0/0 on the way from eps to eps²: rounding size is where it stops.
        tol = max(_recursive_tol(self.tol, b), tree.eps(b))
        return _iterate("solve_bicgstab", self, matvec, b, init, self.maxiter, tol=tol)


@dataclass(frozen=True)
class LU:
    """A dense factorisation, for any regular operator of up to some thousand unknowns: jaxopt's ``solve_lu``.

    The operator is materialised (n products, n² memory), whatever the pytree.

    Args:
        ridge: solves (A + ridge·I)x = b instead.

    Raises:
        ValueError: for a negative ridge.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.array([[1.0, 5.0], [0.0, 1.0]])
        >>> x, info = LU()(lambda v: matrix @ v, jnp.array([6.0, 1.0]))
        >>> [round(float(entry), 5) for entry in x]
        [1.0, 1.0]
    """

    ridge: float = 0.0

    needs_symmetry = False

    def __post_init__(self):
        _check_not_negative("LU", ridge=self.ridge)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        del init  # a factorisation starts from nothing
        return _factorise("solve_lu", self, matvec, b, Status.SINGULAR)


@dataclass(frozen=True)
class Cholesky:
    """A dense factorisation of a symmetric positive definite operator: jaxopt's ``solve_cholesky``.

    Half the work of :class:`LU`. It fails where the operator is not positive definite, so its success is
    proof of definiteness up to rounding.

    Args:
        ridge: solves (A + ridge·I)x = b instead.

    Raises:
        ValueError: for a negative ridge.

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = Cholesky()(lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 2.0]))
        >>> [round(float(entry), 5) for entry in x]
        [1.0, 0.5]
    """

    ridge: float = 0.0

    needs_symmetry = True

    def __post_init__(self):
        _check_not_negative("Cholesky", ridge=self.ridge)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        del init  # a factorisation starts from nothing
        return _factorise("solve_cholesky", self, matvec, b, Status.NEGATIVE_CURVATURE)


@dataclass(frozen=True)
class Neumann:
    """The truncated series x = α Σ_{k<terms} (I − αA)^k b, for an operator with ‖I − αA‖ < 1.

    The same number as backpropagation through the last ``terms`` steps of gradient descent at rate α.

    Args:
        terms: how many, each after the first one product. The error is (I − αA)^terms x.
        step_size: α, below 2 / (largest eigenvalue of A); 1 suits a fixed point.
        tol: what residual ‖b − Ax‖ ≤ tol·‖b‖ is judged by; None for no judgement. All terms are summed anyway.
        ridge: solves (A + ridge·I)x = b instead.

    Raises:
        ValueError: for fewer than one term, a step size that is not positive, or a negative tol or ridge.

    Source: Lorraine, Vicol, Duvenaud (2020), algorithm 3.

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = Neumann(terms=3)(lambda v: 0.5 * v, jnp.float32(1.0))
        >>> float(x)  # 1 + ½ + ¼
        1.75
    """

    terms: int = 20
    step_size: float = 1.0
    tol: float | None = None
    ridge: float = 0.0

    needs_symmetry = False

    def __post_init__(self):
        if self.terms < 1 or not self.step_size > 0:
            raise ValueError(
                f"Neumann needs terms of at least 1 and a step_size above 0, got {self.terms} and {self.step_size}"
            )
        _check_not_negative("Neumann", tol=self.tol, ridge=self.ridge)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        regularised = _with_ridge(matvec, self.ridge)
        unit, b_unit, init_unit = _to_unit(b, init)

        def advance(_, x):
            return tree.add(x, tree.scale(self.step_size, tree.subtract(b_unit, regularised(x))))

        first = tree.scale(self.step_size, b_unit)
        x = jax.lax.fori_loop(1, self.terms, advance, first if init is None else advance(0, init_unit))
        found = diagnosis.found(regularised, b_unit, x)
        return _from_unit(unit, diagnosis.report(b_unit, found, self.tol, self.terms))


@dataclass(frozen=True)
class Nystrom:
    """x = (ρI + H_r)⁻¹b with the rank-r Nyström approximation H_r of a symmetric positive semi-definite A.

    H_r = C W⁺ Cᵀ from r random columns C = AΩ, W = ΩᵀAΩ, and the inverse by Woodbury's identity. It needs r
    products that do not wait for each other, against CG's chain of them. At full rank it is exact for A + ρI.

    Args:
        rank: r, at most the number of unknowns.
        ridge: ρ > 0; the residual reported is that of (A + ρI)x = b.
        tol: what residual ‖b − Ax‖ ≤ tol·‖b‖ is judged by; None for no judgement.
        seed: of the Gaussian Ω.

    Raises:
        ValueError: for a rank below one, a ridge that is not positive, or a negative tol.

    Source: Hataya and Yamada (2023), Nyström method for accurate and scalable implicit differentiation.

    Example:
        >>> import jax.numpy as jnp
        >>> x, info = Nystrom(rank=2, ridge=1.0)(lambda v: jnp.array([1.0, 3.0]) * v, jnp.array([2.0, 2.0]))
        >>> [round(float(entry), 3) for entry in x]
        [1.0, 0.5]
    """

    rank: int
    ridge: float = 1e-2
    tol: float | None = None
    seed: int = 0

    needs_symmetry = True

    def __post_init__(self):
        if self.rank < 1 or not self.ridge > 0:
            raise ValueError(f"Nystrom needs a rank of at least 1 and a ridge above 0, got {self.rank}, {self.ridge}")
        _check_not_negative("Nystrom", tol=self.tol)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        del init  # a projection starts from nothing
        unit, b_unit, _ = _to_unit(b, None)
        flat, unravel = ravel_pytree(tree.widened(b_unit))
        wide = _widely(matvec, b)
        x = self._woodbury(lambda v: ravel_pytree(wide(unravel(v)))[0], flat, tree.eps(b))
        x = tree.like(unravel(x), b)
        found = diagnosis.found(_with_ridge(matvec, self.ridge), b_unit, x)
        return _from_unit(unit, diagnosis.report(b_unit, found, self.tol, self.rank, breakdown=Status.SINGULAR))

    def _woodbury(self, matvec, b, eps):
        normal = jax.random.normal(jax.random.key(self.seed), (b.size, min(self.rank, b.size)), b.dtype)
        sketch, _ = jnp.linalg.qr(normal)
        columns = jax.vmap(matvec, in_axes=1, out_axes=1)(sketch)
        # W may be singular where A is: its eigenvalues at rounding size carry nothing and are left out.
        core = sketch.T @ columns
        values, vectors = jnp.linalg.eigh(0.5 * (core + core.T))
        # Sums of b.size terms are rounded in b's dtype, each product in that of the leaves.
        rounding = max(10 * b.size * float(jnp.finfo(b.dtype).eps), 2 * eps)
        kept = values > rounding * jnp.max(jnp.abs(values))
        root = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, jnp.ones_like(values))), jnp.zeros_like(values))
        factor = columns @ (vectors * root)  # H_r = factor·factorᵀ
        inner = self.ridge * jnp.eye(factor.shape[1], dtype=b.dtype) + factor.T @ factor
        return (b - factor @ jnp.linalg.solve(inner, factor.T @ b)) / self.ridge


class LinearChoice(NamedTuple):
    """A linear solver and the reason for it."""

    solver: LinearSolver
    reason: str


DENSE_LIMIT = 500
"""Unknowns up to which a dense factorisation is chosen: n products and n² memory are then of no account."""


def choose_linear(condition: Condition, w: PyTree | None = None) -> LinearChoice:
    """A linear solver that fits what the condition says of itself, and why.

    Args:
        condition: its ``symmetric`` and ``positive_definite`` decide.
        w: a pytree like the inner variables, or of their shapes, where their number may count too.

    Returns:
        ``(solver, reason)``; the reason is one sentence.

    Example:
        >>> from bilevel.conditions import Stationary
        >>> solver, reason = choose_linear(Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2))
        >>> type(solver).__name__, reason
        ('CG', 'Stationary is symmetric: conjugate gradients need one product an iteration and four vectors.')
    """
    name = type(condition).__name__
    size = None if w is None else sum(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(w))  # of a number, 1
    if size is not None and size <= DENSE_LIMIT:
        if condition.symmetric and condition.positive_definite:
            return LinearChoice(Cholesky(), f"{name} is positive definite with {size} unknowns: factorise it.")
        return LinearChoice(LU(), f"{name} has {size} unknowns: a dense factorisation is exact and needs no tuning.")
    if condition.symmetric:
        why = "conjugate gradients need one product an iteration and four vectors."
        return LinearChoice(CG(maxiter=100, tol=1e-6), f"{name} is symmetric: {why}")
    why = "GMRES has the smallest residual of all that use as many products."
    return LinearChoice(GMRES(maxiter=100, tol=1e-6), f"{name} is not symmetric: {why}")


def solve_differentiably(
    linear: LinearSolver,
    matvec: MatVec,
    b: PyTree,
    symmetric: bool,
    init: PyTree | None = None,
) -> tuple[PyTree, LinearInfo]:
    """``linear(matvec, b, init)``, differentiable in b and in whatever ``matvec`` closes over, to any order.

    The derivative solves with the same solver; its transpose solves with Aᵀ.
    """
    init = jax.lax.stop_gradient(init)

    def find(matvec, b, init=None):  # the start belongs to this system, not to its transpose
        x, info = linear(matvec, b, init)
        return tree.varying_alike(x, (info.residual_norm, as_float(info.iterations), as_float(info.status)))

    x, (residual_norm, iterations, status) = jax.lax.custom_linear_solve(
        matvec, _tied(b), partial(find, init=init), transpose_solve=find, symmetric=symmetric, has_aux=True
    )
    x = _tied(x)
    return x, LinearInfo(x, residual_norm, iterations.astype(jnp.int32), status.astype(jnp.int32))


def _tied(v):
    """``v`` with every leaf a function of all: JAX's rules for a solve want a derivative in each leaf or in none.

    The compiler sees that a slice of a concatenation is what was put there, and makes neither.
    """
    flat, unravel = ravel_pytree(tree.widened(v))  # one dtype: mixed ones have no promotion where it is strict
    return tree.like(unravel(flat), v)


def as_float(count: jax.Array) -> jax.Array:
    """A count or status as float32: JAX's solve primitives refuse integers among what is not differentiated."""
    return jnp.asarray(count).astype(jnp.float32)


def _iterate(name, solver, matvec, b, init, budget, definite=False, **options):
    """One of jaxopt's iterative solvers on b / ‖b‖, with the report on what it found.

    ``definite`` is for a method that is right for positive definite operators alone, and finds out which are not.
    """
    from bilevel import _jaxopt  # jaxopt takes a second to import: only when it is used

    regularised = _with_ridge(matvec, solver.ridge)
    unit, b_unit, init_unit = _to_unit(b, init)
    operator, right = _widely(regularised, b), tree.widened(b_unit)
    start = None if init is None else tree.widened(init_unit)
    precondition = None if solver.preconditioner is None else _widely(solver.preconditioner, b)
    options = {"tol": _recursive_tol(solver.tol, b), "M": precondition, "init": start} | options
    algorithm = getattr(_jaxopt, name)

    def solve(maxiter):
        with jax.numpy_dtype_promotion("standard"):  # JAX's own GMRES mixes widths in its arithmetic
            if definite:
                x, negative = diagnosis.watch_curvature(algorithm, operator, right, maxiter=maxiter, **options)
            else:
                x, negative = algorithm(operator, right, maxiter=maxiter, **options), None
        return tree.like(x, b), negative

    found = diagnosis.found_within(solve, regularised, b_unit, budget, solver.tol)
    breakdown = Status.NEGATIVE_CURVATURE if definite else Status.SINGULAR
    return _from_unit(unit, diagnosis.report(b_unit, found, solver.tol, solver.maxiter, breakdown=breakdown))


def _factorise(name, solver, matvec, b, breakdown):
    """One of jaxopt's dense solvers on the raveled system: they know neither pytrees nor scalars."""
    from bilevel import _jaxopt

    regularised = _with_ridge(matvec, solver.ridge)
    unit, b_unit, _ = _to_unit(b, None)
    flat, unravel = ravel_pytree(tree.widened(b_unit))  # LAPACK factorises nothing below float32

    def flat_matvec(v):  # solve_cholesky materialises in the default dtype, whatever b's is
        return ravel_pytree(_widely(regularised, b)(unravel(v.astype(flat.dtype))))[0]

    x = tree.like(unravel(getattr(_jaxopt, name)(flat_matvec, flat)), b)
    found = diagnosis.found(regularised, b_unit, x)
    # Backward stable: the residual is a few n·eps unless the matrix has no inverse in this precision.
    info = diagnosis.report(b_unit, found, tree.eps(b) ** 0.5, flat.size, Status.SINGULAR, breakdown)
    return _from_unit(unit, info)


def _widely(matvec, like):
    """A map on trees like ``like``, on vectors as wide as sums over them: in bfloat16 a recursion goes astray."""
    # A basis vector of a dense solver varies over no axis of a mesh, where matvec may.
    return lambda v: tree.widened(matvec(tree.like(tree.varying_alike(v, like)[0], like)))


def _check_iterative(solver):
    name = type(solver).__name__
    if solver.maxiter < 1:
        raise ValueError(f"{name} needs maxiter of at least 1, got {solver.maxiter}")
    _check_not_negative(name, tol=solver.tol, ridge=solver.ridge)


def _check_not_negative(name, **options):
    for option, value in options.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} needs {option} of at least 0, got {value}")


def _with_ridge(matvec, ridge):
    if not ridge:
        return matvec
    return lambda v: tree.add(matvec(v), tree.scale(ridge, v))


def _to_unit(b, init):
    """b / ‖b‖, so that cotangents of 1e-20 or 1e20 are solved as well as those of 1; init likewise."""
    size = tree.norm(b)
    unit = jax.lax.stop_gradient(jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size)))
    return unit, tree.scale(1 / unit, b), None if init is None else tree.scale(1 / unit, init)


def _from_unit(unit, info):
    solution = tree.scale(unit, info.solution)
    return solution, replace(info, solution=solution)


def _recursive_tol(tol, b):
    """Where a recursion stops: a little below tol, so that rounding alone does not fail the true residual.

    Below eps² nothing is left to gain, and the squares that the recursion divides by would underflow to 0/0.
    """
    tol, eps = tol or 0.0, tree.eps(b)
    return max((0.9 if tol > 80 * eps else 0.5) * tol, eps**2)
