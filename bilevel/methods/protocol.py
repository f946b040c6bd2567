"""The protocol of a method, and what methods share: checked inputs and the derivatives of the outer function."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import solvers, tree
from bilevel.conditions.protocol import Condition, GradientCondition, check_signature, is_gradient, scalar
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver, check_solver
from bilevel.start import Start, starting_point
from bilevel.types import Hypergradient, PyTree, Solution


class Method(Protocol):
    """A way to differentiate the inner solution.

    With warm starts, :func:`minimize` passes ``linear_init``, the warm start that the method returned in the last outer
    step: ``warm_start`` of its result, or the adjoint ``linear.solution`` if ``warm_start`` is None. In the first step,
    :func:`minimize` passes the result of the method's ``first_warm_start(w, memory)``, where w and ``memory`` are those
    from which the inner solver starts. For a method without that function, it passes zeros like w. Without warm starts,
    it passes None. A method with ``start_is_constant = True`` takes ``init`` as a constant: JAX's derivative in it is
    then zero, and :func:`value_and_hypergradient` warns about it.
    """

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient: ...


def check_problem(owner: str, problem: Problem) -> None:
    """Raise TypeError for a problem of another type."""
    if not hasattr(problem, "condition"):
        name = problem.__name__ if isinstance(problem, type) else type(problem).__name__
        raise TypeError(f"{owner} needs a problem, got {name}: pass Problem(condition, outer)")


def check_arguments(owner: str, problem: Problem, solver: InnerSolver, method: Method) -> None:
    """Raise TypeError for a problem, an inner solver or a method of another type."""
    check_problem(owner, problem)
    check_solver(owner, solver)
    check_signature(owner, "method", method, "problem", "solver", "theta", "init", "data", "linear_init")


def first_warm_start(method: Method, w: PyTree, memory: PyTree) -> PyTree:
    """Return what a method gets as ``linear_init`` in the first step of an outer loop."""
    function = getattr(method, "first_warm_start", None)
    return jax.tree.map(jnp.zeros_like, w) if function is None else function(w, memory)


def outer_variables(theta: PyTree) -> PyTree:
    """Return θ as arrays. A leaf that is not floating point is kept and has no derivative.

    A θ of Python integers, without any floating-point leaf, becomes floating point: see ``tree.numbers_as_floats``.

    Raises:
        TypeError: for a complex leaf.
    """
    return tree.real_arrays(tree.numbers_as_floats(theta), "theta")


def solve_constant(solver: InnerSolver, condition: Condition, init: Start, theta: PyTree, data: PyTree) -> Solution:
    """Return the inner Solution as a constant, for methods that do not differentiate the solver."""
    theta, data = jax.lax.stop_gradient((theta, data))
    start = jax.lax.stop_gradient(starting_point(init, theta, data))
    return jax.lax.stop_gradient(solvers.solve(solver, condition, start, theta, data))


def outer_with_aux(problem: Problem) -> Callable[[PyTree, PyTree, PyTree], Any]:
    """Return the outer function in the form that returns ``(value, aux)``; aux is None without ``has_aux``.

    Raises:
        TypeError: when called, if the outer function returns no pair with ``has_aux``, a value that is no scalar, or an
            aux with a leaf that is neither an array nor a number.
    """

    def outer(w: PyTree, theta: PyTree, data: PyTree) -> tuple[jax.Array, PyTree]:
        found: Any = problem.outer(w, theta, data)
        is_pair = isinstance(found, tuple) and len(found) == 2
        if problem.has_aux and not is_pair:
            raise TypeError(
                f"outer with has_aux=True must return (value, aux), got {type(found).__name__}: return a pair"
            )
        value, aux = found if problem.has_aux else (found, None)
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex):
                raise TypeError(
                    f"the aux of outer holds arrays and numbers, got {type(leaf).__name__} at "
                    f"aux{jax.tree_util.keystr(path)}: jit returns arrays alone, so leave it out"
                )
        # An outer function that ignores w may return a Python number.
        return scalar(value, "outer function", "for (value, aux) say has_aux=True"), aux

    return outer


def outer_derivatives(
    problem: Problem, w: PyTree, theta: PyTree, data: PyTree
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
    """Return the outer value, aux, ∂outer/∂w and ∂outer/∂θ."""
    differentiate = jax.value_and_grad(outer_with_aux(problem), argnums=(0, 1), has_aux=True, allow_int=True)
    (value, aux), (outer_w, outer_theta) = differentiate(w, theta, data)
    return value, aux, outer_w, tree.with_zeros(outer_theta, theta)


def check_potential(name: str, condition: Condition) -> GradientCondition:
    """Return the condition, or raise ValueError if its residual is not the gradient of an inner objective."""
    if not is_gradient(condition):
        raise ValueError(
            f"{name} differentiates an inner objective, and {type(condition).__name__} is not the gradient of one: "
            "use Stationary, Proximal or LeastSquares, or Implicit, which takes any condition"
        )
    return condition
