"""The check of a projected point, which becomes NaN if no point satisfies the constraints."""

import jax
import jax.numpy as jnp


def nan_if_violated(point, violation, size, rounding=0.0):
    """Return ``point``, or NaN if it violates its constraints by far more than rounding.

    A violation above √eps times ``size`` means that no point satisfies the constraints. Constraints whose numbers were
    given in a narrower dtype than that of ``point`` may contradict each other by the rounding of these numbers, so a
    violation of up to 4·``rounding`` times ``size`` is accepted too.

    Args:
        point: the projection, ``[...]``.
        violation: how far each constraint is violated, ``[k]``.
        size: the magnitude of the terms in the constraints, a scalar.
        rounding: the largest machine epsilon among the dtypes in which the numbers were given, or 0 if none of these
            dtypes is narrower than that of ``point``.
    """
    if violation.size == 0:
        return point
    tolerance = jnp.asarray(max(jnp.finfo(point.dtype).eps ** 0.5, 4 * rounding), point.dtype)
    return jnp.where(jax.lax.stop_gradient(jnp.max(violation) <= tolerance * size), point, jnp.nan)
