"""Lanczos's method on the host, for an operator too large to be written out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def lanczos(product: Callable, start: jax.Array, steps: int) -> np.ndarray:
    """Return the Ritz values of a symmetric operator in ascending order, from one product a step.

    Ritz values lie within the spectrum, and the extreme ones approach its ends first. Every new vector is made
    orthogonal to all earlier ones, twice: otherwise rounding brings copies of eigenvalues.

    Example:
        >>> ritz = lanczos(lambda u: jnp.array([1.0, 2.0, 4.0]) * u, jnp.ones(3), steps=3)
        >>> [round(float(value), 3) for value in ritz]
        [1.0, 2.0, 4.0]
    """
    basis, diagonal, off_diagonal = [np.asarray(start) / np.linalg.norm(start)], [], []
    for _ in range(min(steps, start.size)):
        new = np.asarray(product(jnp.asarray(basis[-1])))
        size = np.linalg.norm(new)
        diagonal.append(basis[-1] @ new)
        known = np.stack(basis)
        for _ in range(2):
            new = new - known.T @ (known @ new)
        off_diagonal.append(np.linalg.norm(new))
        if off_diagonal[-1] <= 1e-10 * size:  # the basis spans an invariant subspace, and `new` is rounding
            break
        basis.append(new / off_diagonal[-1])
    off = np.diag(off_diagonal[: len(diagonal) - 1], 1)
    return np.linalg.eigvalsh(np.diag(diagonal) + off + off.T)
