"""The start of the inner solver: a point, or a function of θ and data that computes one.

A point is any pytree of arrays, even one that can be called, such as an Equinox module. ``jit`` compiles again for
each new static argument, and a lambda that is written in a call is a new object each time. So a start function is
traced first, and the static argument is the resulting :class:`Program`. Two programs of the same operations are equal,
so ``jit`` does not compile again for such a lambda. The arrays that the lambda captured are passed as arguments that
are not static.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from bilevel import tree
from bilevel.types import PyTree

StartFunction = Callable[[PyTree, PyTree], PyTree]
"""``start(theta, data)``, which returns a pytree like w."""
Start = PyTree | StartFunction
"""The start of the inner solver: a pytree like w, or a function ``init(theta, data)`` that returns one."""


def is_function(init: Start) -> bool:
    """Return whether a start is to be called.

    That is True for a ``functools.partial``, and for any callable that is not a pytree, such as a function or a method.
    A pytree that can be called, such as an Equinox module, is a point.
    """
    return callable(init) and (isinstance(init, functools.partial) or jax.tree_util.all_leaves([init]))


def choose_start(init: Start, start: StartFunction | None) -> Start:
    """Return ``init``, or the function ``start`` if it is given.

    Raises:
        TypeError: if both or neither of them are given, or if ``start`` cannot be called.
    """
    if start is None:
        if init is None:
            raise TypeError(
                "the inner solver needs a start: give init, a pytree of arrays like w, or "
                "start=lambda theta, data: ..., a function that computes one"
            )
        return init
    if init is not None:
        raise TypeError(
            "got both init and start: give init for a point and start for a function of (theta, data), not both; "
            "to give start alone, pass None as init, or pass the data by name (data=...)"
        )
    if not callable(start):
        raise TypeError(f"start is a function of (theta, data), got {type(start).__name__}: give a point as init")
    return start if is_function(start) else functools.partial(start)


def evaluate(init: Start, theta: PyTree, data: PyTree) -> PyTree:
    """Return the start as arrays: ``init``, or ``init(theta, data)`` where it is a function."""
    init = choose_start(init, None)
    return tree.arrays(init(theta, data) if is_function(init) else init, "init")


def starting_point(init: Start, theta: PyTree, data: PyTree) -> PyTree:
    """Return ``init``, or ``init(theta, data)`` where it is a function, as floating-point arrays.

    Raises:
        TypeError: if ``init`` is None, and for a leaf that is not floating point.
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


class Program:
    """A traced start function, without the arrays that it captured. Two programs of the same operations are equal."""

    def __init__(self, jaxpr: core.Jaxpr, structure: Any):
        self._jaxpr, self._structure = jaxpr, structure
        self._key = structure, _operations(jaxpr)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def bind(self, captured: list[jax.Array]) -> StartFunction:
        """Return the start function, given the arrays that it captured."""
        run = core.jaxpr_as_fun(core.ClosedJaxpr(self._jaxpr, captured))

        def start(theta: PyTree, data: PyTree) -> PyTree:
            return jax.tree.unflatten(self._structure, run(*jax.tree.leaves((theta, data))))

        return start


def trace(start: StartFunction, theta: PyTree, data: PyTree) -> tuple[Program, list[jax.Array]]:
    """Return the program of a start function, and the arrays that the function captured."""
    leaves, arguments = jax.tree.flatten((theta, data))
    structures = []

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        values, structure = jax.tree.flatten(evaluate(start, *jax.tree.unflatten(arguments, leaves)))
        structures.append(structure)
        return values

    closed = jax.make_jaxpr(flat)(*leaves)
    return Program(closed.jaxpr, structures[-1]), list(closed.consts)


def _operations(jaxpr: core.Jaxpr) -> Hashable:
    """Return a key of a jaxpr. Two jaxprs with equal keys compute the same function."""
    numbers: dict[Any, int] = {}

    def atom(variable: Any) -> Hashable:
        if isinstance(variable, core.Literal):
            return str(variable.aval), np.asarray(variable.val).tobytes()
        return numbers.setdefault(variable, len(numbers)), variable.aval

    def parameter(value: Any) -> Hashable:
        if isinstance(value, core.ClosedJaxpr):
            # Both programs keep their constants alive while they are compared, so equal ids mean the same object.
            return _operations(value.jaxpr), tuple(map(id, value.consts))
        if isinstance(value, core.Jaxpr):
            return _operations(value)
        if isinstance(value, tuple | list):
            return tuple(map(parameter, value))
        if isinstance(value, dict):
            return tuple((name, parameter(entry)) for name, entry in sorted(value.items()))
        return (type(value), value) if isinstance(value, Hashable) else id(value)

    heads = tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars)))
    equations = tuple(
        (equation.primitive, tuple(map(atom, equation.invars)), tuple(map(atom, equation.outvars)),
         parameter(equation.params))
        for equation in jaxpr.eqns
    )  # fmt: skip
    return len(jaxpr.constvars), heads, equations, tuple(map(atom, jaxpr.outvars))
