"""Compare a method's numbers with expected ones, within a tolerance, and describe the worst entry.

:func:`bilevel.check_hypergradient` and the assertions of :mod:`bilevel.testing` use the same comparison. The tolerance
of an assertion comes from the caller or from the dtype. ``check_hypergradient`` also allows for the effect of residuals
that met their ``tol``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """The error that a method's derivatives may have, a sum of terms.

    Attributes:
        rtol: relative to the largest expected derivative.
        atol: absolute.
        rounding: the rounding of the terms that the method adds, in the dtype of θ, ``[m]``.
        linear: the effect of a linear residual that met its ``tol``, ``[m]``.
        inner: the effect of an inner residual that met its ``tol``, ``[m]``. :meth:`against` adds it, and
            :meth:`at_same_w` does not.
    """

    rtol: float
    atol: float = 0.0
    rounding: np.ndarray | float = 0.0
    linear: np.ndarray | float = 0.0
    inner: np.ndarray | float = 0.0

    def at_same_w(self, expected: np.ndarray) -> np.ndarray:
        """Return the error allowed against exact derivatives at the method's own w, ``[m]`` or a scalar."""
        return self.rtol * np.abs(expected).max(initial=0.0) + self.atol + self.rounding + self.linear

    def against(self, expected: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
        """Return the error allowed against a reference that has an uncertainty of its own, ``[m]``."""
        return self.at_same_w(expected) + uncertainty + self.inner


@dataclass(frozen=True)
class Deviation:
    """A method's numbers and the expected ones, compared entry by entry.

    Attributes:
        labels: the name of each entry, ``theta['a'][0]`` or ``direction 3``, ``[m]``.
        got: the method's numbers, ``[m]``.
        expected: the reference's numbers, ``[m]``.
        uncertainty: a bound on the error of ``expected``, ``[m]``.
        tolerance: the error that the method is allowed.

    Example:
        >>> got, expected = np.array([1.0, 2.5]), np.array([1.0, 2.0])
        >>> found = Deviation(("a", "b"), got, expected, np.zeros(2), Tolerance(rtol=0.1))
        >>> found.agrees, found.labels[found.worst], float(found.relative_error)
        (False, 'b', 0.25)
    """

    labels: Sequence[str]
    got: np.ndarray
    expected: np.ndarray
    uncertainty: np.ndarray
    tolerance: Tolerance

    @cached_property
    def error(self) -> np.ndarray:
        """|got − expected|, ``[m]``."""
        with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN, which never agrees
            return np.abs(self.got - self.expected)

    @cached_property
    def allowed(self) -> np.ndarray:
        """The largest error with which an entry still agrees, ``[m]``."""
        return self.tolerance.against(self.expected, self.uncertainty)

    @property
    def decided(self) -> bool:
        """True if the reference is accurate enough to tell a right number from a wrong one."""
        return bool((self.uncertainty <= self.tolerance.at_same_w(self.expected)).all())

    @property
    def off(self) -> np.ndarray:
        """A mask of the entries whose error is above its tolerance or not finite, ``[m]``."""
        return ~((self.error <= self.allowed) & np.isfinite(self.error))

    @property
    def agrees(self) -> bool:
        """True if every entry is within its tolerance."""
        return not self.off.any()

    @cached_property
    def worst(self) -> int:
        """The index of the entry with the largest ratio of error to allowed error; 0 if there are no entries."""
        if not self.error.size:
            return 0
        with np.errstate(invalid="ignore"):
            ratio = self.error / np.maximum(self.allowed, np.finfo(float).tiny)
        return int(np.where(np.isfinite(self.error), ratio, np.inf).argmax())

    @property
    def relative_error(self) -> float:
        """The largest error relative to the largest expected number, or to ``atol`` if that is larger.

        It is infinite if an error is not finite.
        """
        return self._relative(self.error.max(initial=0.0))

    def mismatch(self, subject: str, reference: str) -> str:
        """Return a sentence about the worst entry: ``the hypergradient is wrong at theta['a']: got …``."""
        at = self.worst
        return (
            f"{subject} is wrong at {self.labels[at]}: got {self.got[at]:.8}, expected {self.expected[at]:.8} "
            f"({reference}), relative error {self._relative(self.error[at]):.3g} above rtol {self.tolerance.rtol:.3g}; "
            f"{self.off.sum()} of {self.off.size} entries are off"
        )

    def indecision(self, reference: str) -> str:
        """Return a sentence about the entry where the reference is least certain."""
        at = int(np.argmax(self.uncertainty))
        tolerance = np.max(self.tolerance.at_same_w(self.expected))
        return (
            f"{reference} cannot decide at {self.labels[at]}: its own uncertainty, {self.uncertainty[at]:.3g}, is "
            f"above the tolerance of {tolerance:.3g}. Look for a kink or a singular system; otherwise use another "
            "reference, or a larger rtol"
        )

    def _relative(self, error) -> float:
        if not np.isfinite(error):
            return float(np.inf)
        scale = np.abs(self.expected).max(initial=0.0)
        return float(error / max(scale, self.tolerance.atol, np.finfo(float).tiny))
