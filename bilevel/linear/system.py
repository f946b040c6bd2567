"""Parts that linear solvers share: option checks, the ridge, the scale of b, the dtype, the record of a loop."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import LinearInfo, MatVec, PyTree, Status


def check_not_negative(name: str, **options: float | None) -> None:
    """Raise ValueError for an option that is below zero or NaN. None stands for an option that is not set."""
    for option, value in options.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} needs {option} of at least 0, got {value}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recursion:
    """The solution of an iterative algorithm, and the observations of its loop.

    Attributes:
        x: the solution.
        iterations: iterations taken, an int32 scalar.
        norm: the largest ‖Ap‖ / ‖p‖ over all products, a lower bound of ‖A‖.
        null: whether the loop met a vector that shows that A is singular: a direction p whose product Ap is zero up to
            rounding or lies in the span of earlier products, or a residual r ≠ 0 with Aᵀr = 0.
        broke: whether the algorithm broke down, although A may be regular.
    """

    x: jax.Array
    iterations: jax.Array
    norm: jax.Array
    null: jax.Array
    broke: jax.Array


def square(name: str, matvec: MatVec, ridge: float, b: PyTree, init: PyTree | None = None) -> MatVec:
    """Return the operator v ↦ Av + ridge·v. A call of it raises ValueError if A is not square.

    Raises:
        ValueError: for an ``init`` with other shapes than b.
    """
    if init is not None and tree.shapes(init) != tree.shapes(b):
        raise ValueError(
            f"{name} needs a square operator, so init must have the shapes of b: b has {tree.shapes_for_message(b)}, "
            f"init has {tree.shapes_for_message(init)}. For a least-squares problem, pass v ↦ Aᵀ(Av) and Aᵀb"
        )

    def checked(v: PyTree) -> PyTree:
        product = matvec(v)
        if tree.shapes(product) != tree.shapes(b):
            raise ValueError(
                f"{name} needs a square operator, but matvec maps vectors of the shapes of b, "
                f"{tree.shapes_for_message(b)}, to {tree.shapes_for_message(product)}: for a least-squares problem "
                "pass v ↦ Aᵀ(Av) and Aᵀb"
            )
        return tree.add(product, tree.scale(ridge, v)) if ridge else product

    return checked


def start_of(matvec: MatVec, b: PyTree, init: PyTree | None) -> tuple[PyTree, PyTree]:
    """Return the first x of a recursion, and b − Ax. Without ``init``, x is zero, which takes no product."""
    if init is None:
        return jax.tree.map(jnp.zeros_like, b), b
    return init, tree.subtract(b, matvec(init))


NORM_OF_B = 2.0**15
"""Norm to which right-hand sides are scaled. CG computes ‖r‖², which is at least (eps·‖b‖)², and ⟨p, Ap⟩, which is of
the order of ‖A‖‖r‖². With this ‖b‖, neither over- nor underflows in float32 for ‖A‖ from 1e-24 to 1e24. Because 2¹⁵ is
a power of two, the recursion rounds exactly as with ‖b‖ = 1. Products in float16 overflow above 6e4, so right-hand
sides with float16 leaves are scaled to norm 1."""


def normalise(
    b: PyTree, init: PyTree | None = None, target: float = NORM_OF_B
) -> tuple[jax.Array, PyTree, PyTree | None]:
    """Return the number c for which ‖b / c‖ = ``target`` (1 if b has a float16 leaf), and b / c and init / c.

    A cotangent of norm 1e-20 or 1e20 is then solved as accurately as one of norm 1. A ‖b‖ of zero, or one that is not
    finite, is replaced by 1. :func:`denormalise` takes c as ``size``.
    """
    narrow = any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(b))
    size, target = tree.norm(b), 1.0 if narrow else target
    size = jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))
    factor = jax.lax.stop_gradient(target / size)
    scaled_init = None if init is None else tree.scale(factor, init)
    return jax.lax.stop_gradient(size / target), tree.scale(factor, b), scaled_init


def denormalise(size: jax.Array, x: PyTree, info: LinearInfo) -> tuple[PyTree, LinearInfo]:
    """Undo :func:`normalise`: return x and the solution in ``info``, both multiplied by ``size``.

    JAX may differentiate x. ``info`` carries no derivative. Its status becomes NONFINITE if the multiplied solution
    overflows.
    """
    solution = tree.scale(size, info.solution)
    overflow = tree.is_finite(info.solution) & ~tree.is_finite(solution)
    status = jnp.where(overflow, jnp.int32(Status.NONFINITE), info.status)
    return tree.scale(size, x), replace(info, solution=solution, status=status)


def limit_of_rounding(eps: float, b_norm: jax.Array, norm: jax.Array, x: PyTree) -> jax.Array:
    """Return eps·(‖b‖ + ‖A‖‖x‖), the size of the rounding errors in b − Ax.

    A recursion cannot be relied on to reach a smaller residual.
    """
    return eps * (b_norm + norm * tree.norm(x))


def scaled_operator(matvec: MatVec, scaling: PyTree | None) -> MatVec:
    """Return u ↦ D A D u for ``matvec`` A and the diagonal matrix D that ``scaling`` holds. None means D = I."""
    if scaling is None:
        return matvec
    return lambda u: tree.scale(scaling, matvec(tree.scale(scaling, u)))


def in_accumulation_dtype(matvec: MatVec, like: PyTree) -> MatVec:
    """Wrap ``matvec``, which maps trees with the dtypes of ``like``, for trees in the accumulation dtype.

    The accumulation dtype is that of :func:`tree.widened`.

    A recursion in bfloat16 loses too many digits. The products themselves are still computed in the dtypes of ``like``.
    """
    # Inside shard_map, the basis vectors of a dense solver vary over no mesh axis, but matvec may need varying ones.
    return lambda v: tree.widened(matvec(tree.like(tree.match_varying_axes(v, like)[0], like)))


def recursive_tol(tol: float | None, b: PyTree) -> float:
    """Return the relative residual at which a recursion stops.

    It is 0.9·tol, or 0.5·tol for a ``tol`` of at most 80·eps, so that the true residual meets ``tol`` in spite of
    rounding errors. A recursion also stops at the limit of rounding (:func:`limit_of_rounding`): far below it, squares
    of residuals would underflow and give 0/0.
    """
    tol = tol or 0.0
    return (0.9 if tol > 80 * tree.eps(b) else 0.5) * tol
