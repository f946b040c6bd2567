"""The two entry points: the hypergradient as a function, and the inner solution as a differentiable layer."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.failures import Policy, advise, check_policy, check_status, succeeded
from bilevel.layer_failures import LinearWatch, check_solution, is_concrete
from bilevel.linear import CG, GMRES, choose_linear
from bilevel.methods.protocol import Method, Start, outer_variables, starting_point
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.theorem import check_symmetry, solve_implicitly
from bilevel.types import Hypergradient, LinearSolver, PyTree, Solution


def value_and_hypergradient(
    problem: Problem,
    solver: InnerSolver,
    method: Method,
    on_failure: Policy = "raise",
) -> Callable[..., Hypergradient]:
    """Return a function that computes the outer value and its total derivative in θ, with reports on both solves.

    Args:
        problem: the condition and the outer function.
        solver: finds the inner solution.
        method: differentiates the inner solution with respect to θ.
        on_failure: what to do about a failed status when the function is called with concrete values: ``"raise"``,
            ``"warn"`` or ``"ignore"``. Under a trace the status is only data in the result.

    Returns:
        ``hypergradient(theta, init, data, linear_init=None) -> Hypergradient``, compiled once for each set of shapes
        and dtypes. In ``theta``, a leaf that is not floating point is a constant with a zero gradient. A ``theta`` of
        Python integers alone is taken as floating point. ``init`` is a pytree like w, or a function
        ``init(theta, data)``. ``linear_init`` is where the adjoint solve starts, for instance an earlier
        ``out.linear.solution``. A tree of zeros gives the same result as None. JAX's derivative of ``out.value`` is the
        method's estimate. A derivative that the method does not know, such as that of the gradient of an approximate
        method, is refused.

    Raises:
        ValueError: for an unknown ``on_failure``, and, when called, for a condition, a solver and a method that do not
            fit each other. The message lists alternatives. Where JAX differentiates the result, for a derivative that
            the method does not know.
        HypergradientError: when called, on a failed status, with ``on_failure="raise"``.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import CG, GradientDescent, Implicit, Problem, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * theta * w**2)
        >>> problem = Problem(condition, lambda w, theta, data: w)  # w* = data / (1 + theta)
        >>> solver = GradientDescent(0.5, max_steps=100, tol=1e-6)
        >>> out = value_and_hypergradient(problem, solver, Implicit(CG(5)))(1.0, 0.0, 2.0)
        >>> round(float(out.value), 5), round(float(out.gradient), 5)  # w*, −data / (1 + theta)²
        (1.0, -0.5)
    """
    check_policy(on_failure)

    @partial(jax.jit, static_argnames="init_function")
    def compiled(
        theta: PyTree, init: PyTree, data: PyTree, linear_init: PyTree | None, init_function: Callable | None
    ) -> tuple[Hypergradient, jax.Array]:
        out = method(problem, solver, theta, init_function or init, data, linear_init)
        return out, out.status

    def hypergradient(theta: PyTree, init: Start, data: PyTree, linear_init: PyTree | None = None) -> Hypergradient:
        theta, data = outer_variables(theta), tree.arrays(data)
        function, start = (init, None) if callable(init) else (None, tree.arrays(init))
        theta, start, data, linear_init = tree.match_varying_axes(theta, start, data, linear_init)
        out, status = compiled(theta, start, data, linear_init, init_function=function)
        if on_failure != "ignore" and not succeeded(status):
            check_status(out, on_failure, partial(advise, problem.condition, theta, data))
        return out

    return hypergradient


def implicit_layer(
    condition: Condition, solver: InnerSolver, linear: LinearSolver | None = None, on_failure: Policy = "raise"
) -> Callable[..., PyTree]:
    """Return the inner solution as a differentiable function of θ and data.

    Args:
        condition: what holds at the solution.
        solver: finds the solution.
        linear: solves the tangent and adjoint systems. None means the choice of :func:`choose_linear` for the number of
            unknowns; an iterative one then takes up to 1000 steps, until the relative residual is at most 1e-5.
        on_failure: what to do about a failed inner or linear solve when the layer is called with concrete values:
            ``"raise"``, ``"warn"`` or ``"ignore"``. A linear solve without a ``tol`` has failed too if its relative
            residual is above the square root of the machine epsilon, or above 1e-5 in float64. Under ``jit``, ``vmap``
            and ``scan`` nothing is raised: call the layer once with concrete values, or use
            :func:`value_and_hypergradient`, which returns the statuses. The linear solve of a derivative in nothing but
            captured arrays is not judged either.

    Returns:
        ``layer(theta, init, data) -> w``, for ``jax.grad``, ``jax.jvp``, ``jax.hessian``, ``jax.vmap`` and
        ``jax.jit``. The derivative of w in ``init`` is zero by definition, and a warning says so where JAX asks for it.
        A traced array that the condition captures in a closure is differentiated too. A ``theta`` of Python integers
        alone is taken as floating point.

    Raises:
        ValueError: for a linear solver that needs a symmetry the condition does not have, and for an unknown
            ``on_failure``.
        HypergradientError: when the layer is called or differentiated, on a failed solve, with ``on_failure="raise"``.

    Example:
        >>> import jax
        >>> from bilevel import CG, GradientDescent, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2)
        >>> layer = implicit_layer(condition, GradientDescent(1.0, max_steps=1), CG(1))
        >>> float(jax.grad(layer)(3.0, 0.0, None))
        6.0
    """
    check_policy(on_failure)
    if linear is not None:
        check_symmetry(linear, condition)
    watch = LinearWatch(on_failure)

    def solve(theta: PyTree, init: PyTree, data: PyTree, watched: bool) -> Solution:
        chosen = _default_linear(condition, init) if linear is None else linear
        return solve_implicitly(condition, solver, watch.over(chosen) if watched else chosen, theta, init, data)

    def layer(theta: PyTree, init: Start, data: PyTree) -> PyTree:
        theta, data = outer_variables(theta), tree.arrays(data)
        start = starting_point(init if callable(init) else without_tangent(tree.arrays(init)), theta, data)
        theta, start, data = tree.match_varying_axes(theta, start, data)
        watched = on_failure != "ignore" and is_concrete((theta, start, data))
        if watched:
            theta, data = watch.after_derivative((theta, data))
        solution = solve(theta, start, data, watched)
        check_solution(solution, on_failure)
        return watch.after_derivative(solution.w) if watched else solution.w

    return layer


def _default_linear(condition: Condition, w: PyTree) -> LinearSolver:
    """Return the linear solver of a layer for which none was given."""
    solver = choose_linear(condition, w).solver
    return replace(solver, max_steps=1000, tol=1e-5) if isinstance(solver, CG | GMRES) else solver


@jax.custom_jvp
def without_tangent(init: PyTree) -> PyTree:
    """Return the start of a layer. JAX's derivative in it is zero, with a warning."""
    return init


@without_tangent.defjvp
def _warn(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
    del tangents
    warnings.warn(
        "the init of an implicit_layer is being differentiated, and the solution's derivative in init is zero: the "
        "arguments are (theta, init, data), and two of them may have been swapped; if not, pass "
        "jax.lax.stop_gradient(init)",
        UserWarning,
        stacklevel=2,
    )
    (init,) = primals
    return without_tangent(init), jax.tree.map(jnp.zeros_like, init)
