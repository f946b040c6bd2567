"""The check of a projected point, which becomes NaN if no point satisfies the constraints."""

import jax
import jax.numpy as jnp


def nan_if_violated(point, violation, size):
    """Return ``point``, or NaN if it violates its constraints by far more than rounding.

    A violation above √eps times ``size`` means that no point satisfies the constraints.

    Args:
        point: the projection, ``[...]``.
        violation: how far each constraint is violated, ``[k]``.
        size: the magnitude of the terms in the constraints, a scalar.
    """
    if violation.size == 0:
        return point
    tolerance = jnp.asarray(jnp.finfo(point.dtype).eps ** 0.5, point.dtype)
    return jnp.where(jax.lax.stop_gradient(jnp.max(violation) <= tolerance * size), point, jnp.nan)
