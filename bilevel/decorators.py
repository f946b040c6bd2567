"""Decorators that make a solver function of one's own differentiable: custom_root and custom_fixed_point.

The decorated function takes the same arguments as the solver function. In each call, the arrays and Python floats in
the arguments after ``init`` become θ of an :func:`implicit_layer`. The layer's residual is called with w and these
arguments. The layer starts at the solution that the function has found and leaves it unchanged, so it only attaches the
derivative.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel import tree
from bilevel.conditions.general import FixedPoint, Root
from bilevel.conditions.protocol import Condition
from bilevel.errors import Policy
from bilevel.hypergradients import implicit_layer, without_tangent
from bilevel.solvers import InnerSolver, report
from bilevel.types import LinearSolver, MatVec, PyTree, Solution

SolverFunction = Callable[..., Any]
"""``solver(init, *args, **kwargs)``, which returns w, or ``(w, aux)`` with ``has_aux``."""


def custom_root(
    residual: Callable[..., PyTree],
    has_aux: bool = False,
    linear: LinearSolver | Callable[[MatVec, PyTree], PyTree] | None = None,
    on_failure: Policy = "raise",
    *,
    tol: float | None = None,
    symmetric: bool = False,
    callback: bool = False,
) -> Callable[[SolverFunction], SolverFunction]:
    """Return a decorator that differentiates a solver function by the implicit function theorem.

    The solver function may have any arguments after ``init``. Its result w satisfies
    ``residual(w, *args, **kwargs) = 0``. The residual gets every argument after ``init``, with the solver function's
    default for an argument that the call omits. JAX can differentiate the result with respect to the floating-point
    arrays and Python floats in all arguments but ``init``, in forward and in reverse mode, to any order, under
    ``jax.vmap`` and ``jax.jit``. Any other leaf of an argument, such as a string, a function, None or a Python integer,
    is a constant.

    Args:
        residual: ``residual(w, *args, **kwargs)``, a pytree like w.
        has_aux: whether the solver function returns ``(w, aux)``. The decorated function then returns both, and aux,
            any object, has no derivative.
        linear: solves the tangent and adjoint systems: a linear solver, or a function ``solve(matvec, b)`` that returns
            x. None means the default of :func:`implicit_layer`.
        on_failure: as for :func:`implicit_layer`: what to do about a failed solve outside of ``jit`` and ``vmap``.
        tol: the largest ‖residual‖ at w that counts as a solution. Above it, the solve has failed. None accepts any
            residual that is finite.
        symmetric: whether ∂residual/∂w is known to be symmetric everywhere, so that :class:`CG` can be used.
        callback: whether the solver function runs NumPy or SciPy, which JAX cannot trace. It then gets NumPy arrays.
            Under a trace it runs on the host by ``jax.pure_callback``, one task after the other under ``vmap``, and
            ``init`` must be a pytree of arrays like w. Outside of a trace it is called directly.

    Returns:
        ``decorate(solver) -> solver``. The derivative of w in ``init`` is zero by definition, and a warning says so
        where JAX asks for it. ``init`` may be None for a solver function that does not use it. The solver function
        itself is not compiled. The layer that attaches the derivative is compiled once for each set of shapes, dtypes
        and constants, if the constants can be hashed. The compiled layers of the last 32 sets of constants are kept.

    Raises:
        TypeError: from this function, for a residual or a linear solver that cannot be called. From the decorated
            function, for a call without ``init``, for a result that is no pair with ``has_aux``, for a residual that
            does not take the solver's arguments, and, with ``callback`` under a trace, for an ``init`` that is not a
            pytree of arrays.
        ValueError: from this function, for ``callback`` together with ``has_aux``, an unknown ``on_failure``, and a
            linear solver that needs a symmetric operator if ``symmetric`` is False. From the decorated function, for a
            residual that returns no tree like w.
        HypergradientError: from the decorated function, when it is called or differentiated, on a failed solve, with
            ``on_failure="raise"``.

    Source: Blondel et al. (2022), Efficient and modular implicit differentiation, section 2.1.

    Example:
        >>> import jax
        >>> @custom_root(lambda w, theta, power: w**power - theta)
        ... def root(init, theta, power):
        ...     return theta ** (1 / power)
        >>> round(float(jax.grad(root, argnums=1)(None, 8.0, power=3)), 4)  # 1/(3·8^⅔)
        0.0833
    """

    declare = functools.partial(Root, symmetric=symmetric)
    return _decorator(declare, "custom_root", residual, has_aux, linear, on_failure, tol, callback)


def custom_fixed_point(
    mapping: Callable[..., PyTree],
    has_aux: bool = False,
    linear: LinearSolver | Callable[[MatVec, PyTree], PyTree] | None = None,
    on_failure: Policy = "raise",
    *,
    tol: float | None = None,
    symmetric: bool = False,
    callback: bool = False,
) -> Callable[[SolverFunction], SolverFunction]:
    """Return a decorator that differentiates a solver function whose result is a fixed point w of a mapping.

    Args:
        mapping: ``mapping(w, *args, **kwargs)``, a pytree like w, with the arguments of the solver function.
        has_aux: as for :func:`custom_root`.
        linear: as for :func:`custom_root`.
        on_failure: as for :func:`custom_root`.
        tol: the largest ‖w − mapping(w)‖ that counts as a solution, as for :func:`custom_root`.
        symmetric: whether ∂mapping/∂w is known to be symmetric everywhere, so that :class:`CG` can be used.
        callback: as for :func:`custom_root`.

    Raises:
        TypeError: as for :func:`custom_root`.
        ValueError: as for :func:`custom_root`.
        HypergradientError: as for :func:`custom_root`.

    Source: Blondel et al. (2022), Efficient and modular implicit differentiation, section 2.1.

    Example:
        >>> import jax
        >>> @custom_fixed_point(lambda w, theta: 0.5 * w + theta)
        ... def solver(init, theta):
        ...     return jax.lax.fori_loop(0, 30, lambda _, w: 0.5 * w + theta, init)
        >>> float(jax.grad(solver, argnums=1)(0.0, 1.0))
        2.0
    """

    declare = functools.partial(FixedPoint, symmetric=symmetric)
    return _decorator(declare, "custom_fixed_point", mapping, has_aux, linear, on_failure, tol, callback)


def _decorator(
    declare: Callable[[Callable[..., PyTree]], Any],
    name: str,
    function: Callable[..., PyTree],
    has_aux: bool,
    linear: Any,
    on_failure: Policy,
    tol: float | None,
    callback: bool,
) -> Callable[[SolverFunction], SolverFunction]:
    if not callable(function):
        raise TypeError(f"{name} needs a function of (w, *args, **kwargs), got {type(function).__name__}")
    if callback and has_aux:
        raise ValueError(
            f"{name} with callback=True returns w alone, because JAX cannot know the shapes of aux: use has_aux=False"
        )

    def attach(constants: "_Constants") -> Callable[..., PyTree]:
        """Return the layer for calls with these constants."""

        def unpacked(w: PyTree, theta: list[jax.Array], data: None) -> PyTree:
            del data
            args, kwargs = constants.join(theta)
            _check_arguments(name, function, args, kwargs)
            return function(w, *args, **kwargs)

        return implicit_layer(declare(unpacked), _keep(tol), linear, on_failure)

    attach(_partition(((), {}))[1])  # raises the errors of the options now
    attach_once = functools.lru_cache(maxsize=32)(attach)

    def decorate(solver: SolverFunction) -> SolverFunction:
        run, signature = _on_host(name, solver) if callback else solver, _signature(solver)

        @functools.wraps(solver)
        def solve(*args: Any, **kwargs: Any) -> Any:
            init, args, kwargs = _bind(signature, args, kwargs)
            theta, constants = _partition((args, kwargs))
            constant_args, constant_kwargs = constants.join(_without_derivative(theta))
            found = run(_start(init), *constant_args, **constant_kwargs)
            if has_aux:
                _check_pair(name, found)
            w, aux = found if has_aux else (found, None)
            layer = attach_once(constants) if constants.hashable else attach(constants)
            w = layer(theta, jax.lax.stop_gradient(w))
            if not has_aux:
                return w
            arrays, others = _partition(aux)
            aux = others.join(_without_derivative(arrays))
            return type(found)(w, aux) if hasattr(found, "_fields") else (w, aux)  # keeps a NamedTuple of two fields

        return solve

    return decorate


def _check_pair(name: str, found: Any) -> None:
    """Raise TypeError for a result of a solver function that is no pair (w, aux)."""
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise TypeError(
            f"{name} with has_aux=True needs a solver function that returns a pair (w, aux), got {type(found).__name__}"
        )


def _keep(tol: float | None) -> InnerSolver:
    """Return the inner solver that keeps its start, which is the solution already, and reports its residual."""

    def solver(condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return report(condition.residual(init, theta, data), init, 0, tol)

    return solver


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have no signature
        return None


def _bind(
    signature: inspect.Signature | None, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, tuple, dict[str, Any]]:
    """Return init, and the arguments after it, in the order of the solver's signature and with its defaults."""
    if signature is not None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    if not args:
        raise TypeError(
            "a solver function takes init as its first positional argument, got none: write solver(init, …)"
        )
    return args[0], args[1:], kwargs


def _check_arguments(name: str, function: Callable[..., PyTree], args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for a residual or a mapping that does not take the solver's arguments."""
    signature = _signature(function)
    try:
        if signature is not None:
            signature.bind(None, *args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{name}: the residual or mapping has the signature {signature}, but it is called with w and the solver "
            f"function's arguments after init, here {len(args)} by position and {sorted(kwargs)} by name ({error}): "
            "let it take w and then the same arguments as the solver function after init"
        ) from error


class _Constants:
    """The arguments of a call without their arrays and Python floats.

    Two instances are equal if their tree structures and the types and values of their constants are equal.
    """

    def __init__(self, structure: Any, leaves: list[Any]):
        self._structure = structure
        self._leaves = tuple((type(leaf), leaf) for leaf in leaves)  # 1, 1.0 and True are equal without their types

    @property
    def hashable(self) -> bool:
        try:
            hash(self)
        except TypeError:
            return False
        return True

    def __hash__(self) -> int:
        return hash((self._structure, self._leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constants) and (self._structure, self._leaves) == (other._structure, other._leaves)

    def join(self, arrays: list[Any]) -> PyTree:
        """Return the arguments, with ``arrays`` in the places of their arrays and Python floats."""
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for _, leaf in self._leaves]
        return jax.tree.unflatten(self._structure, leaves)


_ARRAY = object()
"""The placeholder of an array or a Python float in :class:`_Constants`."""


def _partition(arguments: PyTree) -> tuple[list[Any], _Constants]:
    """Return the arrays and Python floats among the leaves, and the :class:`_Constants` with all other leaves."""
    leaves, structure = jax.tree.flatten(arguments)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    return arrays, _Constants(structure, [_ARRAY if _is_array(leaf) else leaf for leaf in leaves])


def _is_array(leaf: Any) -> bool:
    """Return whether a leaf becomes an array. A Python integer or boolean does not: it may be a count or a flag."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufc" or jnp.issubdtype(leaf.dtype, np.inexact)  # bfloat16 has the kind V
    return isinstance(leaf, jax.Array | float)


def _without_derivative(leaves: list[Any]) -> list[Any]:
    return [jax.lax.stop_gradient(leaf) if isinstance(leaf, Tracer) else leaf for leaf in leaves]


def _start(init: PyTree) -> PyTree:
    """Return ``init`` without a derivative. If JAX asks for it, a warning says that it is zero."""
    arrays, others = _partition(init)
    if tree.is_traced(arrays):
        arrays = _without_derivative(without_tangent(arrays, "a solver function"))
    return others.join(arrays)


def _on_host(name: str, solver: SolverFunction) -> SolverFunction:
    """Return a function that calls the solver function with NumPy arrays.

    Under a trace, the call is a callback on the host.
    """

    def run(init: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        arrays, constants = _partition((init, args, kwargs))

        def call(*arrays: Any) -> PyTree:
            init, args, kwargs = constants.join([np.asarray(leaf) for leaf in arrays])
            return solver(init, *args, **kwargs)

        if not tree.is_traced(arrays):
            return call(*arrays)
        if not jax.tree.leaves(init) or not all(map(_is_array, jax.tree.leaves(init))):
            raise TypeError(
                f"{name} with callback=True needs the shapes of w under a trace, such as that of jit or vmap: give "
                f"init as a pytree of arrays like w, got {type(init).__name__}"
            )
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf)), init)

        def like_init(*arrays: Any) -> PyTree:
            return jax.tree.map(lambda leaf, shape: np.asarray(leaf, shape.dtype), call(*arrays), shapes)

        return jax.pure_callback(like_init, shapes, *arrays, vmap_method="sequential")

    return run
