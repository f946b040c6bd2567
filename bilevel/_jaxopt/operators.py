"""Projections and proximal operators of jaxopt, in the form that conditions take."""

import functools
import inspect
from collections.abc import Callable

import jax

from bilevel.types import PyTree


def jaxopt_projection(
    projection: Callable | str,
    params: Callable[[PyTree, PyTree], PyTree] | None = None,
    tol: float | None = None,
) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """Return a projection of `jaxopt.projection` in the form that :class:`Projected` takes.

    If jaxopt's implementation of a named projection is inexact or has a derivative that is not finite, an
    implementation of this library replaces it. The result of a named projection is exact to rounding for inputs of any
    scale. The KL projections are differentiable up to the third order, and all other projections to any order. At a
    kink the derivative is finite and that of one side. For example, the projection of a point onto a ball of radius 0
    has the derivative 0 with respect to the point. The result contains NaN if no point satisfies the constraints. A
    function given in place of a name is used unchanged.

    Args:
        projection: its name (``"projection_simplex"``), for which this call imports jaxopt; or the function, or a
            ``functools.partial`` of it.
        params: ``params(theta, data)``, the argument that jaxopt calls ``hyperparams`` (a radius, a pair of bounds,
            …); None for the function's own default.
        tol: for the polyhedron, the largest violation with which a constraint still counts as satisfied. Its row is
            scaled to length 1, and the violation is relative to the point and the right-hand side. None means 4·eps.
            For transport and Birkhoff, the error of the row and column sums at which the iteration ends, relative to
            the largest sum (for their KL versions, to the largest column sum). None means 16·eps. The box section
            ignores ``tol``.

    Returns:
        ``projection(w, theta, data)``.

    Raises:
        ValueError: for a name that `jaxopt.projection` does not have, and for a ``tol`` that the projection does not
            take.

    Example:
        >>> import jax.numpy as jnp
        >>> ball = jaxopt_projection("projection_l2_ball", params=lambda theta, data: theta)
        >>> [round(float(entry), 2) for entry in ball(jnp.array([3.0, 4.0]), jnp.float32(1.0), None)]
        [0.6, 0.8]
    """
    function = _from_jaxopt(projection, "projection")
    if tol is not None:
        if "tol" not in inspect.signature(function).parameters:
            raise ValueError(f"{projection} takes no tolerance, got tol={tol}: leave it None")
        function = functools.partial(function, tol=tol)

    def project(w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its arithmetic
            return function(w) if params is None else function(w, params(theta, data))

    return project


def jaxopt_prox(
    prox: Callable | str, params: Callable[[PyTree, PyTree], PyTree] | None = None
) -> Callable[[PyTree, PyTree, PyTree, float], PyTree]:
    """Return a proximal operator of `jaxopt.prox` in the form that :class:`ProximalGradient` takes.

    The derivatives of an operator given by name are finite. At a kink, where an entry or a group of entries becomes 0,
    the derivative is 0. With a penalty of strength 0, the operator and its derivative are the identity, except for the
    ``non_negative`` operators: they then replace negative entries by 0.

    Args:
        prox: the function, or its name (``"prox_lasso"``), for which this call imports jaxopt.
        params: ``params(theta, data)``, the strength of the penalty in the form that the function expects; None for
            its own default.

    Returns:
        ``prox(w, theta, data, step_size)``.

    Raises:
        ValueError: for a name that `jaxopt.prox` does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> shrink = jaxopt_prox("prox_lasso", params=lambda theta, data: theta)
        >>> [float(entry) for entry in shrink(jnp.array([3.0, 0.5]), jnp.float32(2.0), None, 0.5)]
        [2.0, 0.0]
    """
    function = _from_jaxopt(prox, "prox")

    def operate(w: PyTree, theta: PyTree, data: PyTree, step_size: float) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its arithmetic
            return function(w, None if params is None else params(theta, data), step_size)

    return operate


def _from_jaxopt(function: Callable | str, module: str) -> Callable:
    if not isinstance(function, str):
        return function
    from bilevel._jaxopt import exact_projections, library  # imports jaxopt

    known = getattr(library, module)
    if not hasattr(known, function):
        names = [name for name in dir(known) if name.startswith(module) or name.startswith("kl_" + module)]
        raise ValueError(f"jaxopt.{module} has no {function!r}; it has {', '.join(names)}")
    return exact_projections.BY_NAME.get(function) or getattr(known, function)
