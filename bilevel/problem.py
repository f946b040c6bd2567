"""The record of a bilevel problem: a condition and an outer function."""

from collections.abc import Callable
from dataclasses import dataclass

from bilevel.conditions.protocol import Condition, check_condition_type, check_signature
from bilevel.types import PyTree


@dataclass(frozen=True)
class Problem:
    """A bilevel problem: minimise outer(w*(θ), θ, data) over θ, where w*(θ) satisfies a condition.

    Args:
        condition: what holds at w*.
        outer: ``outer(w, theta, data) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        has_aux: whether ``outer`` returns ``(scalar, aux)``, where aux is a pytree of arrays and numbers.

    Raises:
        TypeError: for a ``condition`` without a residual, or a class in place of an instance, and for an outer function
            that does not take three arguments. When a hypergradient is computed, for an aux with another leaf than an
            array or a number.
    """

    condition: Condition
    outer: Callable[[PyTree, PyTree, PyTree], object]
    has_aux: bool = False

    def __post_init__(self) -> None:
        check_condition_type("Problem", self.condition)
        check_signature("Problem", "outer", self.outer, "w", "theta", "data")
