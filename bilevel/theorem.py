"""The implicit function theorem: the adjoint system, its scaled solve, and an inner solution with its derivative.

F is the condition's residual and v the adjoint. At F(w*, θ) = 0, with A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w and
h = ∂outer/∂θ:

    Aᵀ v = g,        d outer / dθ = h − Bᵀ v.

The functions return a status as data; :mod:`bilevel.errors` raises the errors.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import solvers, tree
from bilevel.conditions.protocol import Condition, adjoint_residual, is_gradient
from bilevel.linear import run_linear
from bilevel.linear.system import scaled_operator
from bilevel.solvers import InnerSolver
from bilevel.types import LinearInfo, LinearSolver, MatVec, PyTree, Solution, Status


def solve_implicitly(
    condition: Condition, solver: InnerSolver, linear: LinearSolver, theta: PyTree, init: PyTree, data: PyTree
) -> Solution:
    """Return the solver's Solution. Its w has the derivatives of the implicit function theorem, to any order."""

    # custom_root gets lists of leaves. It would rebuild a tree with types in place of arrays, which a pytree class of
    # the user may refuse.
    leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(init))
    join = partial(jax.tree.unflatten, structure)

    def residual(leaves: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.leaves(adjoint_residual(condition)(join(leaves), theta, data))

    def find(_: object, leaves: list[jax.Array]) -> tuple[list[jax.Array], tuple[PyTree, ...]]:
        solution = solvers.solve(solver, condition, join(leaves), theta, data)
        report = solution.residual_norm, _as_float(solution.steps), _as_float(solution.status), solution.memory
        return tree.match_varying_axes(jax.tree.leaves(solution.w), report)  # type: ignore[return-value]

    def tangent_solve(jacobian: MatVec, tangent: list[jax.Array]) -> list[jax.Array]:
        def matvec(v: PyTree) -> PyTree:
            return join(jacobian(jax.tree.leaves(v)))

        scaling = condition.scaling(theta, data)
        return jax.tree.leaves(solve_scaled(linear, matvec, join(tangent), scaling, is_gradient(condition))[0])

    w, (residual_norm, steps, status, memory) = jax.lax.custom_root(residual, leaves, find, tangent_solve, has_aux=True)
    return Solution(join(w), residual_norm, steps.astype(jnp.int32), status.astype(jnp.int32), memory)


def adjoint_matvec(
    condition: Condition, w: PyTree, theta: PyTree, data: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Return F(w, θ) and the map u ↦ (∂F/∂w)ᵀu, linearised once.

    A Hessian is symmetric, so it is multiplied in forward mode, which is cheaper. Any other A is multiplied in reverse
    mode.
    """
    if is_gradient(condition):
        return jax.linearize(lambda w: adjoint_residual(condition)(w, theta, data), w)
    residual, pull_back = jax.vjp(lambda w: adjoint_residual(condition)(w, theta, data), w)
    return residual, lambda u: pull_back(u)[0]


def pull_back_to_theta(condition: Condition, w: PyTree, theta: PyTree, data: PyTree, adjoint: PyTree) -> PyTree:
    """Return Bᵀ·adjoint with B = ∂F/∂θ."""
    (through_w,) = jax.vjp(lambda theta: condition.residual(w, theta, data), theta)[1](adjoint)
    return tree.with_zeros(through_w, theta)


def solve_scaled(
    linear: LinearSolver, matvec: MatVec, b: PyTree, scaling: PyTree | None, symmetric: bool, init: PyTree | None = None
) -> tuple[PyTree, LinearInfo]:
    """Solve ``matvec(v) = b`` as (D A D)u = D b with v = D u, where D is ``scaling``.

    If ``scaling`` is None, the system is solved without scaling. For A = D⁻² one CG step is exact. The residual in the
    report is that of the scaled system.
    """
    if scaling is None:
        return solve_linear(linear, matvec, b, symmetric, init)
    ones = jax.tree.map(jnp.ones_like, b)
    scaled_init = None if init is None else jax.tree.map(jnp.divide, init, tree.scale(scaling, ones))
    u, info = solve_linear(linear, scaled_operator(matvec, scaling), tree.scale(scaling, b), symmetric, scaled_init)
    v = tree.scale(scaling, u)
    return v, replace(info, solution=v)


def solve_linear(
    linear: LinearSolver, matvec: MatVec, b: PyTree, symmetric: bool, init: PyTree | None = None
) -> tuple[PyTree, LinearInfo]:
    """Return ``linear(matvec, b, init)``, differentiable in b and in what ``matvec`` closes over, to any order.

    A tangent is computed with the same solver, and a cotangent with the same solver on Aᵀ.
    """
    init = jax.lax.stop_gradient(init)

    def find(matvec: MatVec, b: PyTree, init: PyTree | None = None) -> tuple[PyTree, LinearInfo]:
        x, info = run_linear(linear, matvec, b, init)
        # custom_linear_solve refuses integers among its auxiliary outputs. The solution is attached again below.
        floats = jax.tree.map(_as_float, replace(info, solution=None))
        return tree.match_varying_axes(x, floats)  # type: ignore[return-value]

    times_one = _one_that_depends_on(matvec, b)
    b = times_one(_couple_leaves(b))
    # The transposed solve gets no start: ``init`` belongs to this system.
    x, info = jax.lax.custom_linear_solve(
        matvec, b, partial(find, init=init), transpose_solve=find, symmetric=symmetric, has_aux=True
    )
    x = times_one(_couple_leaves(x))
    iterations = None if info.iterations is None else info.iterations.astype(jnp.int32)
    return x, replace(info, solution=x, iterations=iterations, status=info.status.astype(jnp.int32))


def _couple_leaves(v: PyTree) -> PyTree:
    """Return ``v`` with every leaf a function of all leaves.

    ``custom_linear_solve`` needs a tangent on every leaf or on none. Ravelling and unravelling couples the leaves, and
    XLA removes the copy. All leaves are cast to one dtype first, because strict promotion refuses to mix dtypes.
    """
    flat, unravel = ravel_pytree(tree.widened(v))
    return tree.like(unravel(flat), v)


def _one_that_depends_on(matvec: MatVec, b: PyTree) -> Callable[[PyTree], PyTree]:
    """Return a function that multiplies a tree by 1, where this 1 depends on every array that ``matvec`` captures.

    ``custom_linear_solve`` solves for the tangent ∂b − (∂A)x, in which some leaves may have no ∂A. If b is multiplied
    by this 1, every leaf of b has a tangent if A has one. If x is multiplied by it, the same holds for the cotangent of
    x, which is the right-hand side of the transposed solve. The 1 is computed as 1 plus sums over no entries, so an
    array that is not finite does not change it.
    """
    _, captured = jax.closure_convert(matvec, b)
    dtype = jnp.result_type(float)
    one = jnp.ones((), dtype)
    for array in captured:
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            continue  # an array of integers, booleans or random keys has no derivative
        no_entries = jax.lax.slice_in_dim(jnp.expand_dims(array, -1), 0, 0, axis=-1)
        one = one + jnp.real(jnp.sum(no_entries)).astype(dtype)
    return lambda v: jax.tree.map(lambda leaf: leaf * one.astype(leaf.dtype), v)


def _as_float(number: jax.Array) -> jax.Array:
    """Return a count or status as float32, because JAX's solve primitives refuse integers as auxiliary outputs.

    A floating-point number is returned unchanged.
    """
    number = jnp.asarray(number)
    return number if tree.is_floating(number) else number.astype(jnp.float32)


def check_symmetry(linear: LinearSolver, condition: Condition) -> None:
    """Raise ValueError if the linear solver needs a symmetric operator and the condition is not declared symmetric."""
    if getattr(linear, "needs_symmetry", False) and not condition.symmetric:
        raise ValueError(
            f"{type(linear).__name__} needs a symmetric operator, and {type(condition).__name__} is not declared "
            "symmetric: use NormalCG, GMRES, BiCGStab or LU, or pass symmetric=True to a Root or FixedPoint whose "
            "Jacobian is symmetric"
        )


def probe_symmetry(
    info: LinearInfo, matvec: MatVec, condition: Condition, w: PyTree, theta: PyTree, data: PyTree
) -> LinearInfo:
    """Return the report with status NONSYMMETRIC where Aᵀu and Au differ by more than rounding for a random u.

    The status NONFINITE is kept. The probe is for conditions that are declared symmetric without being so by
    construction. The products of an operator such as I − M may cancel, so that their rounding errors are large compared
    with Au. These errors are measured by a second product: A(3u)/3 differs from Au by rounding alone. The probe costs
    two products in forward and one in reverse mode.
    """
    import optax  # optax is slow to import, so it is imported when needed

    u = jax.lax.stop_gradient(optax.tree.random_like(jax.random.key(0), w))

    def multiply(u: PyTree) -> PyTree:
        return jax.jvp(lambda w: condition.residual(w, theta, data), (w,), (u,))[1]

    forwards, backwards = multiply(u), matvec(u)
    difference = tree.distance(forwards, backwards)
    noise = tree.distance(tree.scale(1 / 3, multiply(tree.scale(3, u))), forwards)
    rounding = jnp.maximum(jnp.sqrt(jnp.finfo(difference.dtype).eps) * tree.norm(forwards), 10 * noise)
    nonsymmetric = jax.lax.stop_gradient(difference > rounding) & (info.status != int(Status.NONFINITE))
    return replace(info, status=jnp.where(nonsymmetric, jnp.int32(Status.NONSYMMETRIC), info.status))
