"""What the answer of a linear solve says of the solve and of its operator.

jaxopt's solvers return x alone. What they saw on the way is found out here at the price of one product: the true
residual, whether the solver stopped by its own recursion or for want of budget, and whether conjugate gradients
met a direction in which the operator is not positive definite.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import LinearInfo, MatVec, PyTree, Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Found:
    """A solver's x and what is known of it.

    Attributes:
        x: the solution, a pytree like b.
        left: b − Ax; b − A·0 where x is not finite, so that a NaN in it is one of A or b.
        defect: SINGULAR or NEGATIVE_CURVATURE as an int32 scalar, of an operator that ought to be positive definite
            and shows that it is not; 0 where it shows nothing.
        stopped: whether more budget would not have changed x.
    """

    x: PyTree
    left: PyTree
    defect: jax.Array
    stopped: jax.Array


def found(matvec: MatVec, b: PyTree, x: PyTree, negative: jax.Array | None = None) -> Found:
    """x with what it leaves of b, of a solve that ran its course; ``negative`` as :func:`watch_curvature` gives it."""
    length = tree.norm(x)
    whole = jnp.isfinite(length)
    length = jnp.where(whole, length, 0)
    if negative is None:
        x_or_zero = jax.tree.map(lambda leaf: jnp.where(whole, leaf, jnp.zeros_like(leaf)), x)
        return Found(x, tree.subtract(b, matvec(x_or_zero)), jnp.int32(0), jnp.bool_(False))

    def unfinished(carry):
        turn, _, _, _, flat = carry
        return (turn == 0) | ((turn == 1) & flat)

    def advance(carry):  # one program for both products: the second is made where the first leaves a doubt
        turn, left, size, _, flat = carry
        first = turn == 0
        # Beside the turn, so that the compiler keeps no second copy of x for it.
        direction = jax.tree.map(lambda x, b: jnp.where(first & whole, x, jnp.where(first, jnp.zeros_like(b), b)), x, b)
        new = matvec(direction)
        new_size = tree.norm(new)
        left = jax.tree.map(lambda b, new, old: jnp.where(first, b - new, old), b, new, left)
        # Whether ⟨x, Ax⟩ ≤ √eps·‖x‖‖Ax‖, which no positive definite A with κ < 1/eps allows (Kantorovich).
        curvature = tree.vdot(direction, new)
        size = jnp.where(first, new_size, size)
        flat = jnp.where(first, (curvature <= _rounding(length, size)) & (length > 0), flat)
        return turn + 1, left, size, new_size, flat

    nothing = jnp.zeros_like(length)
    # x, which the first turn replaces, comes out of the solve: zeros would be laid out beside it.
    start = (jnp.int32(0), x, nothing, nothing, jnp.bool_(False))
    _, left, size, scale, flat = jax.lax.while_loop(unfinished, advance, tree.varying_alike(b, *start)[1:])
    # x is a null direction if Ax is nothing against ‖A‖‖x‖, for which ‖Ab‖ stands; else A is indefinite.
    null = (size <= _rounding(length, scale)) & (length > 0)
    kind = jnp.where(null, jnp.int32(Status.SINGULAR), jnp.int32(Status.NEGATIVE_CURVATURE))
    return Found(x, left, jnp.where(flat | negative, kind, jnp.int32(0)), jnp.bool_(False))


def _rounding(length, size):
    """Below what ⟨x, Ax⟩ tells nothing of its sign, of ‖x‖ and ‖Ax‖."""
    return jnp.sqrt(jnp.finfo(size.dtype).eps) * length * size


def found_within(
    solve: Callable[[int | jax.Array], tuple[PyTree, jax.Array | None]],
    matvec: MatVec,
    b: PyTree,
    budget: int,
    tol: float | None,
) -> Found:
    """What ``solve(budget)`` found; where that fails ``tol``, whether the solver had stopped by itself.

    It had if one iteration less gives the same x to the bit. Only where the first run failed is there a second.
    """
    if tol is None:
        return found(matvec, b, *solve(budget))

    def unfinished(carry):
        turn, first = carry
        return (turn == 0) | ((turn == 1) & ~(relative_residual(b, first.left) <= tol))

    def advance(carry):
        turn, first = carry
        again = found(matvec, b, *solve(budget - turn))
        first = jax.tree.map(lambda new, old: jnp.where(turn == 0, new, old), again, first)
        return turn + 1, replace(first, stopped=(turn == 1) & _equal(again.x, first.x))

    shapes = jax.eval_shape(lambda: found(matvec, b, *solve(budget)))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = tree.varying_alike(b, jnp.int32(0), nothing)[1:]
    return jax.lax.while_loop(unfinished, advance, start)[1]


def _equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.stack([jnp.bool_(True), *(jnp.array_equal(x, y) for x, y in pairs)]).all()


def relative_residual(b: PyTree, left: PyTree) -> jax.Array:
    """‖b − Ax‖ / ‖b‖, without the division where b = 0."""
    size = tree.norm(b)
    return tree.norm(left) / jnp.where(size > 0, size, jnp.ones_like(size))


def report(
    b: PyTree,
    found: Found,
    tol: float | None,
    iterations: int,
    failure: Status = Status.MAX_STEPS,
    breakdown: Status = Status.NONFINITE,
) -> LinearInfo:
    """The true residual of x and what follows from it; not differentiated.

    Args:
        b: the right-hand side.
        found: x and what is known of it.
        tol: what the relative residual is judged by; None for no judgement.
        iterations: the solver's budget.
        failure: what a residual above ``tol`` means where the budget ended the solve.
        breakdown: what it means that x is not finite while A and b are.
    """
    b, found = jax.lax.stop_gradient((b, found))
    residual = relative_residual(b, found.left)
    sound, whole = jnp.isfinite(residual), jnp.isfinite(tree.norm(found.x))
    status = _judged(residual, tol, found.stopped, failure)
    status = jnp.where(found.defect > 0, found.defect, status)
    status = jnp.where(whole, status, jnp.int32(breakdown))
    status = jnp.where(sound, status, jnp.int32(Status.NONFINITE))
    residual = jnp.where(whole, residual, jnp.full_like(residual, jnp.inf))
    return LinearInfo(found.x, residual, jnp.asarray(iterations, jnp.int32), status)


def _judged(residual, tol, stopped, failure):
    if tol is None:
        return jnp.int32(Status.BUDGET_USED)
    fallen_short = jnp.where(stopped, jnp.int32(Status.STAGNATION), jnp.int32(failure))
    return jnp.where(residual <= tol, jnp.int32(Status.CONVERGED), fallen_short)


def watch_curvature(
    solve: Callable[..., PyTree],
    matvec: MatVec,
    b: PyTree,
    init: PyTree | None = None,
    M: Callable[[PyTree], PyTree] | None = None,
    **options,
) -> tuple[PyTree, jax.Array]:
    """The x of a conjugate gradient solver, and whether it met a direction p with ⟨p, Ap⟩ < 0.

    The solver is given pairs (v, mark): it carries the mark along with its vectors and knows nothing of it. The mark
    is so small that its square is lost beside ‖r‖², so every other number stays what it would be. It enters with
    the step after the one that met the curvature; that of the last step shows only in ⟨x, Ax⟩.
    """
    dtype = jnp.result_type(jnp.float32 if not jax.tree.leaves(b) else jax.tree.leaves(b)[0])
    eps = float(jnp.finfo(dtype).eps)

    def nothing(direction):  # of the start at zero, known by its mark, a constant: no product is made, nor compiled
        return jax.tree.map(jnp.zeros_like, direction)

    def untroubled(direction, product, curvature):
        return curvature <= 0, jnp.minimum(curvature, 0).astype(dtype)  # False and zero, typed as what is found below

    def looked_into(direction, product, curvature):
        squared, length, size = tree.vdot(direction, direction), tree.norm(direction), tree.norm(product)
        # CG multiplies by ‖r‖² / ⟨p, Ap⟩, so that eps⁴ is left, whatever the size of A.
        mark = eps**4 * curvature / jnp.where(squared > 0, squared, 1)
        null = size == 0
        return null, jnp.where(curvature < -_rounding(length, size), mark, 0).astype(dtype)

    def watching(pair):
        direction, mark = pair
        product = jax.lax.cond(mark == at_zero, nothing, matvec, direction)
        curvature = tree.vdot(direction, product)
        null, mark = jax.lax.cond(curvature > 0, untroubled, looked_into, direction, product, curvature)
        # Where Ap = 0 x then runs far along p instead of to infinity, and ⟨x, Ax⟩ tells of it.
        product = jax.tree.map(lambda new, p: jnp.where(null, jnp.asarray(eps, p.dtype) * p, new), product, direction)
        return product, mark

    # A start at zero has a mark of its own, below all others, from which that of x is told in the end.
    _, unmarked, at_zero = tree.varying_alike(b, jnp.zeros((), dtype), jnp.full((), eps**5, dtype))
    start = (jax.tree.map(jnp.zeros_like, b), at_zero) if init is None else (init, unmarked)
    precondition = None if M is None else lambda pair: (M(pair[0]), pair[1])
    x, mark = solve(watching, (b, unmarked), init=start, M=precondition, **options)
    return x, mark != start[1]
