"""The directions in θ along which derivatives are compared.

The cost of a reference by differences or tangents is proportional to the number of directions. A small θ is therefore
compared in every coordinate, and a large one along a few random orthonormal directions.
"""

import numpy as np

from bilevel.verify.flat import Flat

MAX_COORDINATES = 64
"""Largest number of entries of θ that are compared one by one; a larger θ is compared along random directions."""
RANDOM_DIRECTIONS = 8
"""Number of random directions in a large θ."""


def choose_directions(directions: np.ndarray | None, theta: Flat) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return unit vectors ``[m, entries of θ]`` and their names.

    Args:
        directions: the caller's own, or None for the coordinates of a small θ and random directions in a large one.
        theta: the outer variables.

    Raises:
        ValueError: for directions of another shape.
    """
    entries = theta.vector.size
    if directions is None and entries <= MAX_COORDINATES:
        directions = np.eye(entries)
    if directions is None:
        directions = random_directions(entries, RANDOM_DIRECTIONS)
    directions = np.asarray(directions, np.float64)
    if directions.ndim != 2 or directions.shape[1] != entries:
        raise ValueError(
            f"directions need the shape [m, {entries}], with one column for each entry of θ, got {directions.shape}"
        )
    if are_coordinates(directions):
        return directions, theta.labels
    return directions, tuple(f"direction {number}" for number in range(len(directions)))


def random_directions(entries: int, count: int, seed: int = 0) -> np.ndarray:
    """Return ``min(count, entries)`` orthonormal rows ``[…, entries]``, uniformly distributed."""
    normal = np.random.default_rng(seed).normal(size=(entries, min(count, entries)))
    return np.linalg.qr(normal)[0].T


def are_coordinates(directions: np.ndarray) -> bool:
    """Return True if the directions are all coordinates in their order, so that derivatives form a gradient."""
    return len(directions) == directions.shape[1] and np.array_equal(directions, np.eye(len(directions)))
