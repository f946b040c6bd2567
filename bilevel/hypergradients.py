"""The two entry points: the hypergradient as a function, and the inner solution as a differentiable layer."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.advice import advise
from bilevel.conditions.protocol import Condition, check_condition_type
from bilevel.errors import Policy, check_policy, check_status, succeeded
from bilevel.layer_errors import LinearWatch, check_solution, is_concrete
from bilevel.linear import CG, GMRES, check_linear, choose_linear
from bilevel.methods.protocol import Method, check_arguments, outer_variables, starting_point
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver, check_solver
from bilevel.start import Program, Start, StartFunction, choose_start, is_function, trace
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
        ``hypergradient(theta, init, data, linear_init=None, *, start=None) -> Hypergradient``, compiled once for each
        set of shapes and dtypes. In ``theta``, a leaf that is not floating point is a constant with a zero gradient. A
        ``theta`` of Python integers alone is taken as floating point. ``init`` is a pytree like w, even one that can be
        called, such as an Equinox module. In its place, ``start`` is a function ``start(theta, data)`` that returns
        such a pytree. It is traced in each call, and compiled only if its operations differ from those of earlier
        calls. A function, a method or a ``functools.partial`` is also accepted as ``init``. ``linear_init`` is where
        the adjoint solve starts, for instance an earlier ``out.linear.solution``. A tree of zeros gives the same result
        as None. For :class:`ValuePenalty`, ``linear_init`` is an earlier ``out.warm_start``. JAX's derivative of
        ``out.value`` is the method's estimate. A derivative that the method does not know, such as the derivative of an
        approximate method's gradient, is refused.

    Raises:
        ValueError: for an unknown ``on_failure``, and, when called, for a condition, a solver and a method that do not
            fit each other. The message lists alternatives. It is also raised when JAX asks for a derivative of the
            result that the method does not know.
        TypeError: for a problem, a solver or a method of another type, such as a class in place of an instance. When
            called, if neither or both of init and start are given, for a leaf of θ, init or data that is neither an
            array nor a number, for a complex leaf of θ, for a leaf of init that is not floating point, and for an outer
            or inner objective that returns no scalar.
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
    check_arguments("value_and_hypergradient", problem, solver, method)
    linear = getattr(method, "linear", None)

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
        theta, data = tree.traceable(tree.numbers_as_floats(theta), "theta"), tree.traceable(data, "data")
        if is_function(init):
            program, init = trace(init, theta, data)
        elif tree.is_traced(init) and getattr(method, "start_is_constant", False):
            init = without_tangent(tree.arrays(init, "init"), "a hypergradient")
        out, status = compiled(theta, tree.traceable(init, "init"), data, linear_init, program=program)
        if on_failure != "ignore" and not succeeded(status):
            hint = partial(
                advise, problem.condition, tree.arrays(theta), tree.arrays(data), solver=solver, linear=linear
            )
            check_status(out, on_failure, hint)
        return out

    return hypergradient


def implicit_layer(
    condition: Condition,
    solver: InnerSolver,
    linear: LinearSolver | None = None,
    on_failure: Policy = "raise",
    *,
    with_solution: bool = False,
) -> Callable[..., PyTree]:
    """Return the inner solution as a differentiable function of θ and data.

    Args:
        condition: the condition that holds at the solution.
        solver: finds the solution.
        linear: solves the tangent and adjoint systems. None means the solver that :func:`choose_linear` picks for the
            condition and the number of unknowns. If this is CG or GMRES, it takes at most 1000 steps, and stops at a
            relative residual of 1e-5.
        on_failure: what to do about a failed inner or linear solve when the layer is called with concrete values:
            ``"raise"``, ``"warn"`` or ``"ignore"``. The check waits for the status, which takes 10 to 20 µs in each
            call. A linear solve without a ``tol`` has failed too if its relative residual is above the square root of
            the machine epsilon, or above 1e-5 in float64. Under ``jit``, ``vmap`` and ``scan`` nothing is raised: call
            the layer once with concrete values, or use :func:`value_and_hypergradient`, which returns the statuses. In
            reverse mode, a failed linear solve is not reported either if the derivative is taken in captured arrays
            alone.
        with_solution: whether the layer returns ``(w, solution)``, where ``solution`` is the :class:`Solution` of the
            inner solve, with its status. ``solution`` has no derivative.

    Returns:
        ``layer(theta, init, data, *, start=None) -> w``, for ``jax.grad``, ``jax.jvp``, ``jax.hessian``, ``jax.vmap``
        and ``jax.jit``. It is compiled once for each set of shapes and dtypes. ``init`` and ``start`` are as for
        :func:`value_and_hypergradient`, except that a function is not compiled: each call runs it. The
        derivative of w in ``init`` is zero by definition, and a warning says so where JAX asks for it. A traced array
        that the condition captures in a closure is differentiated too. A ``theta`` of Python integers alone is taken as
        floating point.

    Raises:
        ValueError: for a linear solver that needs a symmetric operator if the condition is not declared symmetric, and
            for an unknown ``on_failure``. When called, for a condition and a solver that do not fit each other.
        TypeError: as for :func:`value_and_hypergradient`, and for a linear solver that cannot be called.
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
    check_condition_type("implicit_layer", condition)
    check_solver("implicit_layer", solver)
    if linear is not None:
        check_linear("implicit_layer", linear)
        check_symmetry(linear, condition)
    watch = LinearWatch(on_failure)
    unchecked = on_failure == "ignore" and not with_solution

    @partial(jax.jit, static_argnames="watched")
    def compiled(theta: PyTree, init: PyTree, data: PyTree, watched: bool) -> Solution:
        theta, data = outer_variables(theta), tree.arrays(data)
        theta, init, data = tree.match_varying_axes(theta, starting_point(init, theta, data), data)
        chosen = _default_linear(condition, init) if linear is None else linear
        return solve_implicitly(condition, solver, watch.over(chosen) if watched else chosen, theta, init, data)

    @jax.jit
    def compiled_w(theta: PyTree, init: PyTree, data: PyTree) -> PyTree:
        return compiled(theta, init, data, watched=False).w

    def layer(theta: PyTree, init: Start = None, data: PyTree = None, *, start: StartFunction | None = None) -> PyTree:
        if unchecked and tree.are_concrete_arrays((theta, init, data)) and init is not None and start is None:
            return compiled_w(theta, init, data)  # without the next lines, a call takes half as long
        init = choose_start(init, start)
        theta, data = tree.traceable(tree.numbers_as_floats(theta), "theta"), tree.traceable(data, "data")
        if is_function(init):
            init = jax.lax.stop_gradient(tree.arrays(init(*tree.arrays((theta, data))), "init"))
        elif tree.is_traced(init):
            init = without_tangent(tree.arrays(init, "init"), "an implicit_layer")
        init = tree.traceable(init, "init")
        if on_failure == "ignore" or not is_concrete((theta, init, data)):
            solution = compiled(theta, init, data, watched=False)
            w = solution.w
        else:
            theta, data = watch.after_derivative((theta, data))
            solution = compiled(theta, init, data, watched=True)
            check_solution(solution, on_failure)
            w = watch.after_derivative(solution.w)
        return (w, jax.lax.stop_gradient(solution)) if with_solution else w

    return layer


def _default_linear(condition: Condition, w: PyTree) -> LinearSolver:
    """Return the linear solver of a layer for which none was given."""
    solver = choose_linear(condition, w).solver
    return replace(solver, max_steps=1000, tol=1e-5) if isinstance(solver, CG | GMRES) else solver


def without_tangent(init: PyTree, owner: str) -> PyTree:
    """Return ``init``, the start of ``owner``, without a derivative.

    When JAX differentiates in ``init``, a warning says that the derivative is zero.
    """
    return _without_tangent(init, owner)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_tangent(init, owner):
    del owner
    return init


@_without_tangent.defjvp
def _warn(owner: str, primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
    del tangents
    warnings.warn(
        f"the init of {owner} is being differentiated, and the solution's derivative in init is zero: the arguments "
        "are (theta, init, data) for a layer or a hypergradient, and those of a solver function decorated by "
        "custom_root or custom_fixed_point are (init, theta, ...); exchange theta and init if they are swapped, and "
        "otherwise pass jax.lax.stop_gradient(init)",
        UserWarning,
        stacklevel=2,
    )
    (init,) = primals
    return _without_tangent(init, owner), jax.tree.map(jnp.zeros_like, init)
