"""The two entry points: the hypergradient as a function, and the inner solution as a differentiable layer."""

from collections.abc import Callable
from functools import partial

import jax

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.failures import Policy, advise, check_policy, check_status, succeeded
from bilevel.methods.protocol import Method, outer_variables, starting_point
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.start import Program, Start, StartFunction, choose_start, is_function, trace
from bilevel.theorem import check_symmetry, solve_implicitly
from bilevel.types import Hypergradient, LinearSolver, PyTree


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
        ``hypergradient(theta, init, data, linear_init=None, *, start=None) -> Hypergradient``, compiled once for each
        set of shapes and dtypes. ``init`` is a pytree like w, even one that can be called, such as an Equinox module.
        In its place, ``start`` is a function ``start(theta, data)`` that returns such a pytree. It is traced in each
        call, and compiled only if its operations differ from those of earlier calls. A function, a method or a
        ``functools.partial`` is also accepted as ``init``. ``linear_init`` is where the adjoint solve starts, for
        instance an earlier ``out.linear.solution``. A tree of zeros gives the same result as None.

    Raises:
        ValueError: for an unknown ``on_failure``, and, when called, for a condition, a solver and a method that do not
            fit each other. The message lists alternatives.
        TypeError: when called, for no start or two, and for a leaf of θ, init or data that is not an array.
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

    @partial(jax.jit, static_argnames="program")
    def compiled(
        theta: PyTree, init: PyTree, data: PyTree, linear_init: PyTree | None, program: Program | None
    ) -> tuple[Hypergradient, jax.Array]:
        theta, data = outer_variables(theta), tree.arrays(data)
        init, linear_init = tree.arrays(init), tree.arrays(linear_init)
        theta, init, data, linear_init = tree.match_varying_axes(theta, init, data, linear_init)
        out = method(problem, solver, theta, program.bind(init) if program else init, data, linear_init)
        return out, out.status

    def hypergradient(
        theta: PyTree,
        init: Start = None,
        data: PyTree = None,
        linear_init: PyTree | None = None,
        *,
        start: StartFunction | None = None,
    ) -> Hypergradient:
        init, program = choose_start(init, start), None
        theta, data = tree.traceable(theta, "theta"), tree.traceable(data, "data")
        if is_function(init):
            program, init = trace(init, theta, data)
        out, status = compiled(theta, tree.traceable(init, "init"), data, linear_init, program=program)
        if on_failure != "ignore" and not succeeded(status):
            check_status(out, on_failure, partial(advise, problem.condition, tree.arrays(theta), tree.arrays(data)))
        return out

    return hypergradient


def implicit_layer(condition: Condition, solver: InnerSolver, linear: LinearSolver) -> Callable[..., PyTree]:
    """Return the inner solution as a differentiable function of θ and data.

    Args:
        condition: what holds at the solution.
        solver: finds the solution.
        linear: solves the tangent and adjoint systems.

    Returns:
        ``layer(theta, init, data, *, start=None) -> w``, for ``jax.grad``, ``jax.jvp``, ``jax.hessian``, ``jax.vmap``
        and ``jax.jit``. It is compiled once for each set of shapes and dtypes. ``init`` and ``start`` are as for
        :func:`value_and_hypergradient`. The derivative of w in ``init`` is zero by definition. A traced array that the
        condition captures in a closure is differentiated too. The layer reports no status.

    Raises:
        ValueError: for a linear solver that needs a symmetry the condition does not have.
        TypeError: when called, as :func:`value_and_hypergradient`.

    Example:
        >>> import jax
        >>> from bilevel import CG, GradientDescent, Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2)
        >>> layer = implicit_layer(condition, GradientDescent(1.0, max_steps=1), CG(1))
        >>> float(jax.grad(layer)(3.0, 0.0, None))
        6.0
    """
    check_symmetry(linear, condition)

    @jax.jit
    def compiled(theta: PyTree, init: PyTree, data: PyTree) -> PyTree:
        theta, data = outer_variables(theta), tree.arrays(data)
        theta, init, data = tree.match_varying_axes(theta, starting_point(init, theta, data), data)
        return solve_implicitly(condition, solver, linear, theta, init, data).w

    def layer(theta: PyTree, init: Start = None, data: PyTree = None, *, start: StartFunction | None = None) -> PyTree:
        init = choose_start(init, start)
        theta, data = tree.traceable(theta, "theta"), tree.traceable(data, "data")
        if is_function(init):
            init = init(*tree.arrays((theta, data)))
        return compiled(theta, tree.traceable(init, "init"), data)

    return layer
