"""The inner Jacobian A = ∂F/∂w at one point: its extreme eigenvalues and, if it is small, its matrix."""

from dataclasses import dataclass

import numpy as np

from bilevel.spectrum import ritz_values
from bilevel.verify.local_problem import LocalProblem, random_like
from bilevel.verify.references import MAX_UNKNOWNS

LANCZOS_STEPS = 40
"""Number of Lanczos steps. A step costs one product with A, and one with Aᵀ if A is not declared symmetric."""


@dataclass(frozen=True)
class Jacobian:
    """The inner Jacobian's matrix and the extremes of its spectrum.

    Attributes:
        matrix: A, or None for more than 1000 unknowns.
        low, high: extreme eigenvalues of the symmetric part (A + Aᵀ)/2; extreme Ritz values if ``matrix`` is None.
        smallest_singular, largest_singular: extreme singular values; None if ``matrix`` is None.
    """

    matrix: np.ndarray | None
    low: float
    high: float
    smallest_singular: float | None
    largest_singular: float | None

    @staticmethod
    def at(local: LocalProblem, symmetric: bool) -> "Jacobian":
        """Compute the matrix A for up to 1000 unknowns, or else Ritz values of its symmetric part.

        Args:
            local: the problem at the point.
            symmetric: whether A is declared symmetric, so that a step costs one product.
        """
        if local.w.size <= MAX_UNKNOWNS:
            matrix = np.asarray(local.jacobian(local.w, local.theta))
            values = np.linalg.eigvalsh((matrix + matrix.T) / 2) if matrix.size else np.ones(1)
            singular = np.linalg.svd(matrix, compute_uv=False) if matrix.size else np.ones(1)
            return Jacobian(matrix, float(values[0]), float(values[-1]), float(singular[-1]), float(singular[0]))

        def product(u):
            forward = local.product(u)
            return forward if symmetric else (forward + local.vjp(local.w, local.theta, u)[0]) / 2

        ritz = ritz_values(product, local.w, LANCZOS_STEPS, random_like(local.w, 0))
        return Jacobian(None, float(ritz[0]), float(ritz[-1]), None, None)

    def largest_asymmetry(self) -> tuple[int, int] | None:
        """Return the indices (i, j), i ≤ j, with the largest |Aᵢⱼ − Aⱼᵢ|; None if A is not written out."""
        if self.matrix is None:
            return None
        difference = np.abs(self.matrix - self.matrix.T)
        i, j = sorted(np.unravel_index(difference.argmax(), difference.shape))
        return int(i), int(j)
