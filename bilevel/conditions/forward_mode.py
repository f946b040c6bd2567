"""Forward-mode derivatives of projections and proximal operators that define only their reverse mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel.types import PyTree


def differentiable_forwards(function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Return ``function(*arguments)``, differentiable in forward mode even where it calls a ``jax.custom_vjp``.

    A ``jax.custom_vjp`` defines only the reverse mode: JAX cannot push a tangent through it. If its rule runs a solver,
    as in jaxopt's projections that solve an optimisation problem, JAX cannot transpose the vjp either. So the tangent
    of every function that calls a ``jax.custom_vjp`` is computed with the whole Jacobian. That takes one reverse pass
    for each entry of the output. The tangent itself cannot be differentiated in forward mode.
    """
    if not _holds_custom_vjp(jax.make_jaxpr(function)(*arguments).jaxpr):
        return function(*arguments)
    # A custom_jvp may not close over a tracer, so what the function captures becomes an argument.
    function, captured = jax.closure_convert(function, *arguments)

    @jax.custom_jvp
    def call(*arguments: PyTree) -> PyTree:
        return function(*arguments)

    @call.defjvp
    def push_forward(primals: Any, tangents: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # jaxopt's derivative rules mix dtypes
            out, pull_back = jax.vjp(function, *primals)
            flat, unravel = ravel_pytree(out)
            rows = jax.vmap(lambda row: pull_back(unravel(row)))(jnp.eye(flat.size, dtype=flat.dtype))
        parts = [
            jnp.tensordot(row, t.astype(row.dtype), axes=t.ndim).astype(flat.dtype)
            for row, t in zip(jax.tree.leaves(rows), jax.tree.leaves(tangents), strict=True)
            if t.dtype != jax.dtypes.float0  # the tangent of an integer
        ]
        return out, unravel(functools.reduce(jnp.add, parts))

    return call(*arguments, *captured)


def _holds_custom_vjp(jaxpr: Any) -> bool:
    """Return whether a jaxpr calls a ``jax.custom_vjp``, directly or in a jaxpr inside it."""
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns"))
        if equation.primitive.name.startswith("custom_vjp_call") or any(
            _holds_custom_vjp(value) for value in inner if hasattr(value, "eqns")
        ):
            return True
    return False
