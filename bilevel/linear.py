"""Linear solvers for the adjoint system: one protocol, jaxopt's algorithms, and an honest report.

A solver is a frozen value, called as ``solver(matvec, b, init=None) -> (x, LinearInfo)`` on any pytree.
jaxopt returns x and nothing else, and a recursive residual can be wrong by orders of magnitude in float32,
so each solve ends with one product of its own that gives the true residual and the status.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
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
        if self.maxiter < 1:
            raise ValueError(f"CG needs maxiter of at least 1, got {self.maxiter}")
        _check_not_negative("CG", tol=self.tol, ridge=self.ridge)

    def __call__(self, matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        from bilevel import _jaxopt  # jaxopt takes a second to import: only when it is used

        regularised = _with_ridge(matvec, self.ridge)
        options = {"maxiter": self.maxiter, "tol": _recursive_tol(self.tol, b), "M": self.preconditioner}
        unit, b_unit, init_unit = _to_unit(b, init)
        x = _jaxopt.solve_cg(regularised, b_unit, init=init_unit, **options)
        info = _report(regularised, b_unit, x, self.tol, self.maxiter)
        return _from_unit(unit, x, info)


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
        from bilevel import _jaxopt

        regularised = _with_ridge(matvec, self.ridge)
        unit, b_unit, _ = _to_unit(b, None)
        flat, unravel = ravel_pytree(b_unit)
        x = unravel(_jaxopt.solve_lu(lambda v: ravel_pytree(regularised(unravel(v)))[0], flat))
        # Backward stable: the residual is a few n·eps unless the matrix has no inverse in this precision.
        tol = jnp.sqrt(jnp.finfo(flat.dtype).eps)
        info = _report(regularised, b_unit, x, tol, flat.size, Status.SINGULAR, Status.SINGULAR)
        return _from_unit(unit, x, info)


def solve_differentiably(
    linear: LinearSolver,
    matvec: MatVec,
    b: PyTree,
    symmetric: bool,
    init: PyTree | None = None,
    start_at_b: bool = False,
) -> tuple[PyTree, LinearInfo]:
    """``linear(matvec, b, init)``, differentiable in b and in whatever ``matvec`` closes over, to any order.

    The derivative solves with the same solver; its transpose solves with Aᵀ. With ``start_at_b`` each of these
    systems starts from its own right-hand side where no ``init`` is given.
    """
    init = jax.lax.stop_gradient(init)

    def find(matvec, b, init=None):  # the start belongs to this system, not to its transpose
        x, info = linear(matvec, b, b if init is None and start_at_b else init)
        return x, (info.residual_norm, as_float(info.iterations), as_float(info.status))

    x, (residual_norm, iterations, status) = jax.lax.custom_linear_solve(
        matvec, b, partial(find, init=init), transpose_solve=find, symmetric=symmetric, has_aux=True
    )
    return x, LinearInfo(x, residual_norm, iterations.astype(jnp.int32), status.astype(jnp.int32))


def as_float(count: jax.Array) -> jax.Array:
    """A count or status as float32: JAX's solve primitives refuse integers among what is not differentiated."""
    return jnp.asarray(count).astype(jnp.float32)


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


def _from_unit(unit, x, info):
    solution = tree.scale(unit, x)
    return solution, LinearInfo(solution, info.residual_norm, info.iterations, info.status)


def _recursive_tol(tol, b):
    """Where a recursion stops: half of tol, so that rounding alone does not fail the true residual.

    Below eps² nothing is left to gain, and the squares that the recursion divides by would underflow to 0/0.
    """
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(b)), default=0.0)
    return max(0.5 * (tol or 0.0), eps**2)


def _no_curvature(x, product):
    """Whether ⟨x, Ax⟩ < √eps·‖x‖‖Ax‖, which no positive definite A with κ < 1/eps allows (Kantorovich)."""
    curvature = tree.vdot(x, product)
    bound = tree.norm(x) * tree.norm(product) * jnp.sqrt(jnp.finfo(curvature.dtype).eps)
    return curvature < bound


def _report(matvec, b, x, tol, iterations, failure=Status.MAX_STEPS, breakdown=Status.NEGATIVE_CURVATURE):
    """The true residual of x, one product, and what follows from it; not differentiated.

    ``failure`` is what a residual above ``tol`` means, ``breakdown`` what it means that x is not finite while
    A and b are: the product with what is finite of x tells these apart.
    """
    x, b = jax.lax.stop_gradient((x, b))
    whole = jnp.isfinite(tree.norm(x))
    size = tree.norm(b)
    product = jax.lax.stop_gradient(matvec(jax.tree.map(lambda leaf: jnp.where(whole, leaf, jnp.zeros_like(leaf)), x)))
    residual = tree.norm(tree.subtract(b, product)) / jnp.where(size > 0, size, jnp.ones_like(size))
    sound = jnp.isfinite(residual)
    if tol is None:
        status = jnp.int32(Status.BUDGET_USED)
    else:
        status = jnp.where(residual <= tol, jnp.int32(Status.CONVERGED), jnp.int32(failure))
    if breakdown is Status.NEGATIVE_CURVATURE:
        status = jnp.where(_no_curvature(x, product), jnp.int32(breakdown), status)
    status = jnp.where(whole, status, jnp.int32(breakdown))
    status = jnp.where(sound, status, jnp.int32(Status.NONFINITE))
    residual = jnp.where(whole, residual, jnp.full_like(residual, jnp.inf))
    return LinearInfo(x, residual, jnp.asarray(iterations, jnp.int32), status)
