"""Rates of a stochastic algorithm: a number, a function of the step, or an optax transformation for θ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import PyTree

RATES = ("inner_rate", "linear_rate", "outer_rate")
"""The names of the rates. An algorithm has some of them."""
Rate = float | Callable[[jax.Array], jax.Array | float]
"""A number, or a function of the step t, an int32 scalar that begins with 0."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Power:
    """The rate a/(t + 1)^p at step t.

    Args:
        rate: a, the rate at the first step.
        exponent: p; 0 for a constant rate, below 0 for one that grows.

    Example:
        >>> round(float(Power(0.1, 0.5)(jnp.int32(3))), 6)
        0.05
    """

    rate: float
    exponent: float

    def __call__(self, step: jax.Array) -> jax.Array:
        # The step of a saved state may be a NumPy scalar, whose arithmetic would be in NumPy's float64.
        count = jnp.asarray(step).astype(jnp.result_type(float)) + 1
        return self.rate / count**self.exponent


def at_step(rate: Rate | None, step: jax.Array) -> jax.Array | float:
    """Return the rate at a step."""
    assert rate is not None, "minimize chooses a rate that is left out"
    if not callable(rate):
        return rate
    with jax.numpy_dtype_promotion("standard"):  # a schedule may multiply floats by the integer step
        return rate(step)


def is_transformation(rate: Any) -> bool:
    """Return whether a rate is an optax transformation, without an import of optax."""
    return hasattr(rate, "init") and hasattr(rate, "update")


def descend(variables: PyTree, rate: jax.Array | float, direction: PyTree) -> PyTree:
    """Return ``variables − rate · direction`` in the dtypes of ``variables``."""
    return tree.subtract(variables, tree.scale(rate, direction))


def check_between(name: str, value: Any, largest: float) -> None:
    """Raise ValueError for a number that is not above 0 and finite, or is above ``largest``. A function is accepted."""
    if value is None or callable(value):
        return
    number = float(value)
    if not 0 < number <= largest or number == float("inf"):
        limit = "" if largest == float("inf") else f" and at most {largest}"
        raise ValueError(f"{name} must be a finite number above 0{limit}, or a function of the step, got {value}")


def check_count(owner: str, **counts: int | None) -> None:
    """Raise ValueError for a number of steps below 1. None is accepted."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{owner} needs {name} of at least 1, got {count}")


def check_rate(name: str, rate: Any) -> None:
    """Raise ValueError unless a rate is None, a finite number of 0 or more, or a function.

    The outer rate may also be an optax transformation.
    """
    if is_transformation(rate) and name != "outer_rate":
        raise ValueError(
            f"{name} must be a number, a function of the step, or None, got an optax transformation: only outer_rate "
            "may be one"
        )
    if rate is None or callable(rate) or is_transformation(rate):
        return
    number = float(rate)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be a finite number of 0 or more, a function of the step, or None, got {rate}")
