"""The protocol of a method, and what all methods share: checked inputs and the derivatives of the outer function."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bilevel import solvers, tree
from bilevel.conditions.protocol import Condition, GradientCondition, is_gradient
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver
from bilevel.start import Start, evaluate
from bilevel.types import Hypergradient, PyTree, Solution


class Method(Protocol):
    """A way to differentiate the inner solution.

    :func:`minimize` passes ``linear_init``, the warm start that the method returned in the last outer step:
    ``warm_start`` of its result, or the adjoint ``linear.solution`` if ``warm_start`` is None. In the first step,
    :func:`minimize` passes the result of the method's ``first_warm_start(w, memory)``, where w and ``memory`` are those
    from which the inner solver starts. For a method without that function, it passes zeros like w.
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
    theta = tree.arrays(tree.numbers_as_floats(theta), "theta")
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"outer variables are real, got {leaf.dtype} at theta{jax.tree_util.keystr(path)}: there are two "
                "conventions for a derivative in a complex variable; split the variable into its real and imaginary "
                "parts"
            )
    return theta


def starting_point(init: Start, theta: PyTree, data: PyTree) -> PyTree:
    """Return ``init``, or ``init(theta, data)`` where it is a function, as floating-point arrays.

    Raises:
        TypeError: for a leaf that is not floating point.
    """
    start = evaluate(init, theta, data)
    for path, leaf in jax.tree_util.tree_leaves_with_path(start):
        if not tree.is_floating(leaf):
            raise TypeError(
                f"inner variables are floating point, got {leaf.dtype} at init{jax.tree_util.keystr(path)}: write an "
                "integer as a float (0.0), move a count or a mask to data, and split a complex variable into two real "
                "ones"
            )
    return start


def solve_constant(solver: InnerSolver, condition: Condition, init: Start, theta: PyTree, data: PyTree) -> Solution:
    """Return the inner Solution as a constant, for methods that do not differentiate the solver."""
    theta, data = jax.lax.stop_gradient((theta, data))
    start = jax.lax.stop_gradient(starting_point(init, theta, data))
    return jax.lax.stop_gradient(solvers.solve(solver, condition, start, theta, data))


def outer_with_aux(problem: Problem) -> Callable[[PyTree, PyTree, PyTree], Any]:
    """Return the outer function in the form that returns ``(value, aux)``; aux is None without ``has_aux``.

    Raises:
        TypeError: when called, if the outer function returns another form than ``has_aux`` says.
    """

    def outer(w: PyTree, theta: PyTree, data: PyTree) -> tuple[jax.Array, PyTree]:
        found: Any = problem.outer(w, theta, data)
        is_pair = isinstance(found, tuple) and len(found) == 2
        if problem.has_aux and not is_pair:
            raise TypeError(
                f"outer with has_aux=True must return (value, aux), got {type(found).__name__}: return a pair"
            )
        if isinstance(found, tuple) and not problem.has_aux:
            raise TypeError(
                f"outer must return a scalar, got a tuple of {len(found)}: for (value, aux) say has_aux=True"
            )
        value, aux = found if problem.has_aux else (found, None)
        return jnp.asarray(value), aux  # an outer function that ignores w may return a Python number

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
            "use Stationary or Proximal, or Implicit, which takes any condition"
        )
    return condition
