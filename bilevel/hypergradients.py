"""From an inner solution to the derivative of the outer value: the methods, and the two ways to call them.

The implicit function theorem at F(w*, θ) = 0, with A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w, h = ∂outer/∂θ:

    Aᵀ v = g,        d outer / dθ = h − Bᵀ v.

A method is a frozen value, called as ``method(problem, solver, theta, init, data, linear_init)``; it returns
a :class:`Hypergradient`. Nothing here looks at a status: that is for the host, in
:func:`value_and_hypergradient`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from bilevel import solvers, tree
from bilevel.conditions import Condition, Problem
from bilevel.failures import advise, check_policy, check_status, succeeded
from bilevel.linear import as_float, solve_differentiably
from bilevel.solvers import InnerSolver, IterativeSolver
from bilevel.types import Hypergradient, LinearInfo, LinearSolver, MatVec, PyTree, Solution, Status

Start = PyTree | Callable[[PyTree, PyTree], PyTree]
"""Where the inner solver begins: a pytree like w, or ``init(theta, data)`` that makes one."""


class Method(Protocol):
    """A way to differentiate the inner solution."""

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient: ...


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: one adjoint system, whatever the inner solver did to get there.

    Memory does not grow with inner steps. The gradient is exact at w*; at an approximate w it is off by a
    multiple of ‖F(w)‖, and by the linear solver's residual.

    Args:
        linear: solves the adjoint system; :class:`CG` needs a symmetric condition.

    Raises:
        ValueError: when called, for a linear solver that needs a symmetry the condition does not have.

    Source: Rajeswaran et al. (2019), algorithm 2; Pedregosa (2016).
    """

    linear: LinearSolver

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        condition = problem.condition
        check_symmetry(self.linear, condition)
        inner = solve_implicitly(condition, solver, self.linear, theta, starting_point(init, theta, data), data)
        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, theta, data)
        residual, matvec = adjoint_matvec(condition, inner.w, theta, data)
        inner = solvers.with_residual(inner, solver, residual)
        scaling, symmetric = condition.scaling(theta, data), is_gradient(condition)
        right = _after(inner.residual_norm, outer_w)
        adjoint, info = solve_scaled(self.linear, matvec, right, scaling, symmetric, linear_init)
        if condition.symmetric and not symmetric:
            info = _doubting_symmetry(info, matvec, condition, inner.w, theta, data)
        through_w = _pull_to_theta(condition, inner.w, theta, data, adjoint)
        return Hypergradient(value, tree.subtract(outer_theta, through_w), aux, inner, info)


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through the inner solver's steps, all of them or the last few.

    The derivative of what the solver computed, not of the solution: both agree as the steps converge.
    Memory grows with the steps that are differentiated. Where ``init`` is a function of θ, its derivative
    counts (this is MAML, with ``init=lambda theta, data: theta``).

    Args:
        last: differentiate the last ``last`` steps only; None for all.
        checkpoint: recompute each step in the backward pass and keep only the iterates.
        first_order: take each step's residual as a constant, so that no second derivative is made and no iterate
            kept. What is left of the inner solution's derivative is that of ``init``: with MAML's start at θ this is
            first-order MAML (Finn, Abbeel, Levine 2017, section 5.2).

    Raises:
        ValueError: for ``last`` below one or above the solver's steps, and for a solver that has no steps
            to differentiate, or a ``tol`` that leaves their number open.

    Source: Franceschi et al. (2017); truncation: Shaban et al. (2019).
    """

    last: int | None = None
    checkpoint: bool = False
    first_order: bool = False

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        del linear_init  # no linear system
        self._check(solver)
        solver.check(problem.condition)

        def outer(theta):
            w = self._inner(problem.condition, solver, theta, starting_point(init, theta, data), data)
            value, aux = outer_with_aux(problem)(w, theta, data)
            return value, (aux, w)

        (value, (aux, w)), gradient = jax.value_and_grad(outer, has_aux=True, allow_int=True)(theta)
        inner = solvers.report(problem.condition.residual(w, theta, data), w, solver.steps)
        return Hypergradient(value, tree.with_zeros(gradient, theta), aux, inner, None)

    def _check(self, solver):
        if not isinstance(solver, IterativeSolver) or solver.tol is not None:
            raise ValueError(
                "Unrolled differentiates a fixed number of steps: use GradientDescent, Optax, FixedPointIteration or "
                f"Anderson with tol=None, or Implicit, which takes any solver; got {solver}"
            )
        if self.last is not None and not 1 <= self.last <= solver.steps:
            raise ValueError(f"Unrolled(last={self.last}) needs between 1 and the solver's {solver.steps} steps")

    def _inner(self, condition, solver, theta, init, data):
        def advance(_, state):
            slope = condition.residual(state[0], theta, data)
            return solver.update(state, jax.lax.stop_gradient(slope) if self.first_order else slope)

        last = solver.steps if self.last is None else self.last
        state = jax.lax.fori_loop(0, solver.steps - last, advance, solver.start(init))
        if last < solver.steps:
            state = jax.lax.stop_gradient(state)
        if self.checkpoint:
            advance = jax.checkpoint(advance)
        return jax.lax.fori_loop(0, last, advance, state)[0]


@dataclass(frozen=True)
class ForwardUnrolled:
    """Forward-mode differentiation through the inner solver: one tangent for each entry of θ.

    Like :class:`Unrolled` the derivative of what the solver computed. Time and memory grow with the entries of
    θ, memory not with the steps, and the solver may stop by its ``tol``. Where ``init`` is a function of θ, its
    derivative counts.

    Source: Franceschi et al. (2017), Forward and reverse gradient-based hyperparameter optimization.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import GradientDescent, Problem, Stationary
        >>> problem = Problem(Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)
        >>> function = value_and_hypergradient(problem, GradientDescent(0.5, steps=2), ForwardUnrolled())
        >>> float(function(1.0, 0.0, None).gradient)  # 1 − ½²
        0.75
    """

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        del linear_init  # no linear system

        floats, join = tree.split_floating(theta)

        def outer(floats):
            theta = join(floats)
            inner = solvers.solve(solver, problem.condition, starting_point(init, theta, data), theta, data)
            value, aux = outer_with_aux(problem)(inner.w, theta, data)
            return value, (value, aux, inner)

        # JAX makes no Jacobian in nothing at all.
        slope = jax.jacfwd(outer, has_aux=True) if floats else lambda floats: (floats, outer(floats)[1])
        gradient, (value, aux, inner) = slope(floats)
        return Hypergradient(value, tree.with_zeros(join(gradient), theta), aux, inner, None)


@dataclass(frozen=True)
class OneStep:
    """One step from the solution, differentiated in θ alone: dw/dθ ≈ ∂step(w*, θ)/∂θ, w* held fixed.

    No linear system and no second derivative in w. The error is that of a contraction's first iterate: it is
    small where one step of the solver forgets nearly everything, as a quasi-Newton map does. Differentiated again,
    w* still stands fixed: a second derivative needs :class:`Implicit`.

    Raises:
        ValueError: when called, for a solver whose step is no function of w and θ alone.

    Source: Bolte, Pauwels, Vaiter (2023), One-step differentiation of iterative algorithms.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import FixedPoint, FixedPointIteration, Problem
        >>> problem = Problem(FixedPoint(lambda w, theta, data: 0.1 * w + theta), lambda w, theta, data: w)
        >>> out = value_and_hypergradient(problem, FixedPointIteration(20), OneStep())(1.0, 0.0, None)
        >>> round(float(out.value), 3), float(out.gradient)  # 1 / 0.9; its derivative is as large
        (1.111, 1.0)
    """

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        del linear_init  # no linear system
        if not isinstance(solver, solvers.GradientDescent | solvers.FixedPointIteration | solvers.Anderson):
            raise ValueError(
                "OneStep differentiates a step that remembers nothing: use GradientDescent, FixedPointIteration or "
                f"Anderson, whose first steps are such, or Implicit, which takes any solver; got {solver}"
            )
        inner = _solve_once(problem, solver, theta, init, data)

        def step(theta):
            return solver.update(solver.start(inner.w), problem.condition.residual(inner.w, theta, data))[0]

        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, theta, data)
        (through_w,) = jax.vjp(step, theta)[1](outer_w)
        gradient = tree.add(outer_theta, tree.with_zeros(through_w, theta))
        return Hypergradient(value, gradient, aux, inner, None)


@dataclass(frozen=True)
class FirstOrder:
    """The adjoint system with A's second derivatives left out, so that nothing is to be solved.

    For :class:`Proximal`, A = H + λI is taken as λI: with θ as the centre the gradient is ∇_w outer at the
    solution, first-order MAML. For a condition with a mapping, A = I − ∂mapping/∂w is taken as I. Differentiated
    again, w* stands fixed: a second derivative needs :class:`Implicit`.

    Raises:
        ValueError: when called, for a condition whose A has no such part.

    Source: Finn, Abbeel, Levine (2017), section 5.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import GradientDescent, Problem, Proximal
        >>> pull = Proximal(lambda w, theta, data: 0.5 * (w - data) ** 2, strength=1.0)
        >>> problem = Problem(pull, lambda w, theta, data: w**2)
        >>> out = value_and_hypergradient(problem, GradientDescent(0.5, steps=1), FirstOrder())(1.0, 0.0, 3.0)
        >>> float(out.inner.w), float(out.gradient)  # the exact one has a factor λ / (1 + λ)
        (2.0, 4.0)
    """

    def __call__(self, problem, solver, theta, init, data, linear_init=None) -> Hypergradient:
        del linear_init  # no linear system
        condition = problem.condition
        scaling = condition.scaling(theta, data)
        if scaling is None and not hasattr(condition, "mapping"):
            raise ValueError(
                f"FirstOrder leaves out second derivatives, and A of {type(condition).__name__} is nothing else: use "
                "it with Proximal, FixedPoint, Projected or ProximalGradient, or use Implicit, OneStep or Unrolled"
            )
        inner = _solve_once(problem, solver, theta, init, data)
        value, aux, outer_w, outer_theta = outer_derivatives(problem, inner.w, theta, data)
        adjoint = outer_w if scaling is None else tree.scale(scaling, tree.scale(scaling, outer_w))
        through_w = _pull_to_theta(condition, inner.w, theta, data, adjoint)
        return Hypergradient(value, tree.subtract(outer_theta, through_w), aux, inner, None)


def value_and_hypergradient(
    problem: Problem,
    solver: InnerSolver,
    method: Method,
    on_failure: Literal["raise", "warn", "ignore"] = "raise",
) -> Callable[..., Hypergradient]:
    """The function that returns the outer value and its total derivative in θ, with a report on both solves.

    Args:
        problem: the condition and the outer function.
        solver: finds the inner solution.
        method: differentiates it.
        on_failure: what to do with a failed status when called with concrete values; under a trace the
            status is only data in the result.

    Returns:
        ``hypergradient(theta, init, data, linear_init=None) -> Hypergradient``, pure and compiled once per
        shape. ``init`` is a pytree like w, or a function ``init(theta, data)``; ``linear_init`` starts the
        adjoint solve (an earlier ``out.linear.solution``); zeros are none.

    Raises:
        ValueError: for a combination that makes no sense, with those that do.
        HypergradientError: when called, on a failed status, with ``on_failure="raise"``.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import CG, GradientDescent, Implicit, Problem, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * theta * w**2)
        >>> problem = Problem(condition, lambda w, theta, data: w)  # w* = data / (1 + theta)
        >>> solver = GradientDescent(0.5, steps=100, tol=1e-6)
        >>> out = value_and_hypergradient(problem, solver, Implicit(CG(5)))(1.0, 0.0, 2.0)
        >>> round(float(out.value), 5), round(float(out.gradient), 5)  # w*, −data / (1 + theta)²
        (1.0, -0.5)
    """
    check_policy(on_failure)

    @partial(jax.jit, static_argnames="init_function")
    def compiled(theta, init, data, linear_init, init_function):
        out = method(problem, solver, theta, init_function or init, data, linear_init)
        return out, out.status

    def hypergradient(theta: PyTree, init: Start, data: PyTree, linear_init: PyTree | None = None) -> Hypergradient:
        theta, data = outer_variables(theta), tree.arrays(data)
        function, start = (init, None) if callable(init) else (None, tree.arrays(init))
        theta, start, data, linear_init = tree.varying_alike(theta, start, data, linear_init)
        out, status = compiled(theta, start, data, linear_init, init_function=function)
        if on_failure != "ignore" and not succeeded(status):
            check_status(out, on_failure, partial(advise, problem.condition, theta, data))
        return out

    return hypergradient


def implicit_layer(condition: Condition, solver: InnerSolver, linear: LinearSolver) -> Callable[..., PyTree]:
    """The inner solution as a differentiable function of θ and data.

    Args:
        condition: what holds at the solution.
        solver: finds it.
        linear: solves the tangent and adjoint systems.

    Returns:
        ``layer(theta, init, data) -> w``, for ``jax.grad``, ``jax.jvp``, ``jax.hessian``, ``jax.vmap`` and
        ``jax.jit``. Its derivative in ``init`` is zero by definition; θ that a closure captured is
        differentiated like any other.

    Raises:
        ValueError: for a linear solver that needs a symmetry the condition does not have.

    Example:
        >>> import jax
        >>> from bilevel import CG, GradientDescent, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2)
        >>> layer = implicit_layer(condition, GradientDescent(1.0, steps=1), CG(1))
        >>> float(jax.grad(layer)(3.0, 0.0, None))
        6.0
    """
    check_symmetry(linear, condition)

    def layer(theta: PyTree, init: Start, data: PyTree) -> PyTree:
        theta, data = outer_variables(theta), tree.arrays(data)
        theta, start, data = tree.varying_alike(theta, starting_point(init, theta, data), data)
        return solve_implicitly(condition, solver, linear, theta, start, data).w

    return layer


def solve_implicitly(
    condition: Condition, solver: InnerSolver, linear: LinearSolver, theta: PyTree, init: PyTree, data: PyTree
) -> Solution:
    """The solver's Solution, whose w carries the derivative of the implicit function theorem to any order."""

    def find(_, init):
        solution = solvers.solve(solver, condition, init, theta, data)
        return tree.varying_alike(
            solution.w, (solution.residual_norm, as_float(solution.steps), as_float(solution.status))
        )

    def tangent_solve(jacobian, tangent):
        scaling = condition.scaling(theta, data)
        return solve_scaled(linear, jacobian, tangent, scaling, is_gradient(condition))[0]

    w, (residual_norm, steps, status) = jax.lax.custom_root(
        lambda w: condition.residual(w, theta, data), jax.lax.stop_gradient(init), find, tangent_solve, has_aux=True
    )
    return Solution(w, residual_norm, steps.astype(jnp.int32), status.astype(jnp.int32))


def adjoint_matvec(
    condition: Condition, w: PyTree, theta: PyTree, data: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """F(w, θ) and u ↦ (∂F/∂w)ᵀ u, linearised once: forwards where A is a Hessian, which is cheaper, else backwards."""
    if is_gradient(condition):
        return jax.linearize(lambda w: condition.residual(w, theta, data), w)
    residual, pull_back = jax.vjp(lambda w: condition.residual(w, theta, data), w)
    return residual, lambda u: pull_back(u)[0]


def _after(number, v):
    """``v``, with a leaf that waits for ``number``: else the compiler keeps its terms beside all that is made of v."""
    leaves, structure = jax.tree.flatten(v)
    if leaves:
        nothing = jax.lax.stop_gradient(jnp.where(jnp.isfinite(number), 0 * number, 0))
        leaves[0] = leaves[0] + nothing.astype(leaves[0].dtype)
    return jax.tree.unflatten(structure, leaves)


def is_gradient(condition: Condition) -> bool:
    """Whether F is the gradient of an objective, and A symmetric for that reason and not because it is said to be."""
    return hasattr(condition, "potential")


def _doubting_symmetry(info, matvec, condition, w, theta, data):
    """NONSYMMETRIC where Aᵀu and Au differ for a random u, of a condition that was declared symmetric."""
    import optax  # optax takes a while to import: only when it is used

    u = jax.lax.stop_gradient(optax.tree.random_like(jax.random.key(0), w))
    _, forwards = jax.jvp(lambda w: condition.residual(w, theta, data), (w,), (u,))
    backwards = matvec(u)
    apart = tree.norm(tree.subtract(forwards, backwards))
    rounding = jnp.sqrt(jnp.finfo(apart.dtype).eps) * tree.norm(forwards)
    doubtful = jax.lax.stop_gradient(apart > rounding) & (info.status != Status.NONFINITE)
    return replace(info, status=jnp.where(doubtful, jnp.int32(Status.NONSYMMETRIC), info.status))


def solve_scaled(
    linear: LinearSolver, matvec: MatVec, b: PyTree, scaling: PyTree | None, symmetric: bool, init: PyTree | None = None
) -> tuple[PyTree, LinearInfo]:
    """Solve ``matvec(v) = b`` as (D A D)u = D b, v = D u: one iteration is exact where A = D⁻²."""
    if scaling is None:
        return solve_differentiably(linear, matvec, b, symmetric, init)
    scaled_init = None if init is None else jax.tree.map(jnp.divide, init, _like(scaling, init))

    def scaled_matvec(u):
        return tree.scale(scaling, matvec(tree.scale(scaling, u)))

    u, info = solve_differentiably(linear, scaled_matvec, tree.scale(scaling, b), symmetric, scaled_init)
    v = tree.scale(scaling, u)
    return v, replace(info, solution=v)


def check_symmetry(linear: LinearSolver, condition: Condition) -> None:
    """Refuse a linear solver that needs a symmetric operator where the condition has none."""
    if getattr(linear, "needs_symmetry", False) and not condition.symmetric:
        raise ValueError(
            f"{type(linear).__name__} needs a symmetric operator, and that of {type(condition).__name__} is not: "
            "use NormalCG, GMRES, BiCGStab or LU, or declare the condition symmetric where it is"
        )


def _pull_to_theta(condition, w, theta, data, adjoint):
    """Bᵀ·adjoint, B = ∂F/∂θ."""
    (through_w,) = jax.vjp(lambda theta: condition.residual(w, theta, data), theta)[1](adjoint)
    return tree.with_zeros(through_w, theta)


def _like(scaling, w):
    return tree.scale(scaling, jax.tree.map(jnp.ones_like, w))


def outer_variables(theta: PyTree) -> PyTree:
    """θ as arrays; a leaf that is not floating is carried along without a derivative.

    Raises:
        TypeError: for a complex leaf.
    """
    theta = tree.arrays(theta)
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"outer variables are real, got {leaf.dtype} at theta{jax.tree_util.keystr(path)}: a derivative in a "
                "complex variable has two conventions; write it as its real and imaginary part"
            )
    return theta


def starting_point(init: Start, theta: PyTree, data: PyTree) -> PyTree:
    """``init`` or what it makes of θ and data, as arrays that can be differentiated.

    Raises:
        TypeError: for a leaf that is not floating.
    """
    start = tree.arrays(init(theta, data) if callable(init) else init)
    for path, leaf in jax.tree_util.tree_leaves_with_path(start):
        if not tree.is_floating(leaf):
            raise TypeError(
                f"inner variables are floating point, got {leaf.dtype} at init{jax.tree_util.keystr(path)}: write it "
                "as a float (0.0), keep what is counted or masked in data, and a complex variable as two real ones"
            )
    return start


def _solve_once(problem, solver, theta, init, data):
    """The inner Solution as a constant: what these methods differentiate, they say themselves."""
    fixed = jax.lax.stop_gradient(theta)
    found = solvers.solve(solver, problem.condition, starting_point(init, fixed, data), fixed, data)
    return jax.lax.stop_gradient(found)


def outer_with_aux(problem):
    """outer with aux, always."""
    if problem.has_aux:
        return problem.outer
    return lambda w, theta, data: (problem.outer(w, theta, data), None)


def outer_derivatives(problem, w, theta, data):
    """Value, aux, ∂outer/∂w and ∂outer/∂θ."""
    differentiate = jax.value_and_grad(outer_with_aux(problem), argnums=(0, 1), has_aux=True, allow_int=True)
    (value, aux), (outer_w, outer_theta) = differentiate(w, theta, data)
    return value, aux, outer_w, tree.with_zeros(outer_theta, theta)
