"""Find arrays of θ that a user's function has captured, by a closure or as a global.

A function that captures an array of θ sees a constant: ``value_and_hypergradient`` differentiates the argument only.
The gradient then lacks a term, and no residual shows it.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree


def captured_leaves(problem: Problem, theta: PyTree) -> list[str]:
    """Return the names of the leaves of θ whose array objects the problem's functions have captured."""
    leaves = {
        id(leaf): f"theta{jax.tree_util.keystr(path)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(theta)
        if isinstance(leaf, jax.Array | np.ndarray)
    }
    held = (id(value) for value in _reachable_values((problem.condition, problem.outer)))
    return sorted({leaves[number] for number in held if number in leaves})


def _reachable_values(root: Any) -> Iterator[Any]:
    """Yield what functions hold: closure cells, globals that they name, fields of dataclasses, items of containers."""
    seen: set[int] = set()
    pending: list[Any] = [root]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, dict):
            pending += list(value.values())
        elif isinstance(value, list | tuple):
            pending += list(value)
        elif isinstance(value, type):
            continue
        elif dataclasses.is_dataclass(value):
            pending += [getattr(value, field.name) for field in dataclasses.fields(value)]
        elif hasattr(value, "__wrapped__"):
            pending.append(value.__wrapped__)
        elif hasattr(value, "__code__"):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            named = [value.__globals__.get(name) for name in value.__code__.co_names]
            # The search takes only arrays, dicts and tuples from the globals. Through modules and functions, it would
            # visit every object of the program.
            pending += cells + [entry for entry in named if isinstance(entry, jax.Array | np.ndarray | dict | tuple)]


def _is_filled(cell) -> bool:
    """Return True if a closure cell holds a value other than None."""
    try:
        return cell.cell_contents is not None
    except ValueError:  # Python raises it for an empty cell
        return False
