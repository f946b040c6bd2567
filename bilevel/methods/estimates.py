"""JAX's derivatives of the result of a method that only estimates the hypergradient.

The derivative of the outer value in θ is the estimate. The derivative of any other result raises an error. These
methods take the inner solution, or the first steps of its solver, as a constant. If JAX differentiated their formulas,
it would also treat this part as a constant, and return wrong numbers, often zero.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bilevel import tree
from bilevel.types import Hypergradient, PyTree


def estimated(found: Hypergradient, source: jax.Array, name: str, theta: PyTree, *movers: PyTree) -> Hypergradient:
    """Return the Hypergradient with a derivative of its value alone: JAX's derivative of its other fields is refused.

    Args:
        found: the result of a method that takes θ and the inner solution as constants.
        source: a number. The value gets the derivatives of this number in the data, and in arrays that the user's
            functions capture. They are computed only where JAX asks for them.
        name: the method, for the message of a refusal.
        theta: the outer variables. The derivative of the value in θ is the gradient.
        movers: the other arrays on which the results depend, such as the data.

    Raises:
        ValueError: where JAX uses a refused derivative. In forward mode JAX uses the derivatives of all results, unless
            a surrounding ``jit`` removes them.
    """
    value = jax.lax.stop_gradient(found.value)
    floats, join = tree.partition_inexact(replace(found, aux=tree.arrays(found.aux)))
    found = join(_constant(name, floats, (theta, movers)))
    return replace(found, value=_value_with_derivative(name, value, found.gradient, source, theta, movers))


def constant(name: str, x: PyTree, movers: PyTree) -> PyTree:
    """Return ``x``, a tree of floating-point arrays, without a derivative.

    ValueError is raised if JAX uses the derivative in a variable on which x or ``movers`` depends.
    """
    return _constant(name, x, movers)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(name: str, x: PyTree, movers: PyTree) -> PyTree:
    del name, movers
    return x


@partial(_constant.defjvp, symbolic_zeros=True)
def _refuse_all(name: str, primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    out, moving = _constant(name, *primals), _moving(tangents)
    total = sum((jnp.sum(tangent.real.astype(jnp.float32)) for tangent in moving), jnp.zeros((), jnp.float32))

    def refused(leaf: jax.Array) -> Any:
        tangent = jnp.zeros_like(leaf) + total.astype(leaf.dtype)
        return _refused_p.bind(tangent, name=name) if moving else tangent

    return out, jax.tree.map(refused, out)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value_with_derivative(
    name: str, value: jax.Array, gradient: PyTree, source: jax.Array, theta: PyTree, movers: PyTree
) -> jax.Array:
    """Return ``value`` with the derivative ``gradient`` in θ, and the derivative of ``source`` in all other variables.

    In θ the first derivative is ``gradient``, so the second one is the derivative of ``gradient``. :func:`estimated`
    passes a gradient whose derivative raises an error. A second derivative of ``source`` raises an error too.
    """
    del name, gradient, source, theta, movers
    return value


@partial(_value_with_derivative.defjvp, symbolic_zeros=True)
def _differentiate(name: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value, gradient, source, theta, movers = primals
    _, _, of_source, of_theta, _ = tangents
    slope = jnp.zeros_like(value)
    if _moving(of_source):
        slope = slope + of_source * _constant(name, jnp.ones_like(value), (source, theta, movers))
    return _value_with_derivative(name, *primals), slope + _inner_product(gradient, of_theta, value)


@jax.custom_jvp
def prefer_gradient(value: jax.Array, gradient: PyTree, theta: PyTree, others: jax.Array) -> jax.Array:
    """Return ``value`` with the derivative ``gradient`` in θ, where nothing but θ varies.

    Args:
        value: the outer value, with its own derivative in everything.
        gradient: its derivative in θ.
        theta: the outer variables.
        others: the outer value at a constant θ. If this number has a tangent, so that JAX differentiates in something
            else than θ, the value's own derivative is used.
    """
    del gradient, theta, others
    return value


@partial(prefer_gradient.defjvp, symbolic_zeros=True)
def _choose(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value, gradient, _, _ = primals
    own, _, of_theta, of_others = tangents
    out = prefer_gradient(*primals)
    if _moving(of_others) or not _moving(of_theta):
        return out, own if _moving(own) else jnp.zeros_like(value)
    return out, _inner_product(gradient, of_theta, value)


@jax.custom_jvp
def with_tangent(x: PyTree, source: PyTree) -> PyTree:
    """Return ``x`` with the derivative of ``source``, a tree like ``x``."""
    del source
    return x


@with_tangent.defjvp
def _take_tangent(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    return with_tangent(*primals), tangents[1]


def _inner_product(gradient: PyTree, tangents: PyTree, like: jax.Array) -> jax.Array:
    """Return ⟨gradient, tangents⟩ over the tangents that are not structurally zero."""
    pairs = zip(jax.tree.leaves(gradient), _leaves(tangents), strict=True)
    products = (tree.vdot(slope, tangent).astype(like.dtype) for slope, tangent in pairs if _moving(tangent))
    return sum(products, jnp.zeros_like(like))


def _leaves(tangents: PyTree) -> list[Any]:
    return jax.tree.leaves(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))


def _moving(tangents: PyTree) -> list[jax.Array]:
    """Return the tangents that are not structurally zero."""
    leaves = (leaf for leaf in _leaves(tangents) if not isinstance(leaf, SymbolicZero))
    return [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]


def _refuse(name: str, advice: str = "") -> Any:
    raise ValueError(
        f"{name} does not know this derivative of its result: use Implicit, or Unrolled() through all steps, whose "
        f"results JAX can differentiate to any order{advice}"
    )


def _refuse_to_evaluate(*_: Any, name: str) -> Any:
    _refuse(name, "; for the derivative of the value alone use jax.grad, or forward mode inside jax.jit")


# JAX traces the derivative rules of all results together, even of results that are not used. This primitive postpones
# the refusal until a tangent is evaluated, or until a cotangent arrives that is not a symbolic zero.
_refused_p = Primitive("refused_derivative")
_refused_p.def_impl(_refuse_to_evaluate)
_refused_p.def_abstract_eval(lambda tangent, name: tangent)
mlir.register_lowering(_refused_p, _refuse_to_evaluate)
ad.deflinear2(_refused_p, lambda cotangent, tangent, name: _refuse(name))
batching.defvectorized(_refused_p)
