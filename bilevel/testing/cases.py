"""The record of a test problem with a known solution and hypergradient, and the layouts of its variables as pytrees.

NumPy computes the solution in float64, from the numbers of the problem after they were rounded to its dtype. No code of
the library's methods takes part, so a bug in a method does not change the expected numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree

LAYOUTS = ("flat", "dict", "tuple", "scalars")
"""Names of the pytrees into which :func:`arrange` lays out a vector. θ may also have the layout ``"scalar"``."""
ClosedForm = Callable[[PyTree, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""``closed_form(data, theta) -> (w, ∂w/∂θ, A)``, on flat float64 vectors. A is the matrix of the system for ∂w/∂θ."""


@dataclass(frozen=True)
class Case:
    """A problem with its arguments, its exact inner solution and its exact hypergradient.

    It prints as the call that makes it again, ``ridge(size=3, condition=10.0, …, seed=7)``. Hypothesis shows this call
    for a failing example.

    Attributes:
        recipe: the call that makes the case, as text.
        problem: the condition and the outer function. Cases of one family that have the same layouts share this object,
            so that a program compiled for one case serves all other cases of the same shapes.
        theta: the outer variables, NumPy arrays of ``dtype``.
        init: an initial point for inner solvers.
        data: all numbers of the problem.
        margin: the distance of the problem from the nearest kink. For a projection or a prox, it is the smallest
            distance between a kink of the operator and an entry of its argument, w − η∇objective at the solution. For
            inequalities, it is the smaller of the active multiplier and the inactive slack. For a smooth problem, it
            is infinite.
    """

    recipe: str
    problem: Problem
    theta: PyTree
    init: PyTree
    data: PyTree
    margin: float
    _closed_form: ClosedForm = field(repr=False)
    _arrange: Callable[[np.ndarray], PyTree] = field(repr=False)
    _suggest: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]] = field(repr=False)

    def __repr__(self) -> str:
        return self.recipe

    @property
    def solver(self) -> Callable[..., Any]:
        """An inner solver that converges from ``init`` to rounding size."""
        return self._suggest()[0]

    @property
    def method(self) -> Callable[..., Any]:
        """A method that is exact at the inner solution."""
        return self._suggest()[1]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of ``theta``, ``init`` and ``data``, float32 or float64."""
        return np.dtype(jax.tree.leaves(self.theta)[0].dtype)

    def exact(self, theta: PyTree = None) -> PyTree:
        """Return the inner solution at ``theta``, a tree like ``init`` in float64; None means the θ of the case.

        The solution of a problem with kinks is right only near the θ of the case: the argument of the projection or
        prox must not have moved by more than ``margin``.
        """
        return self._arrange(self._solved(theta)[0])

    @cached_property
    def w(self) -> PyTree:
        """The exact inner solution at the θ of the case, a tree like ``init`` in float64."""
        return self.exact()

    @cached_property
    def value(self) -> float:
        """The outer value at the exact inner solution."""
        return self._value(self.theta)

    @cached_property
    def gradient(self) -> PyTree:
        """The exact hypergradient, a tree like ``theta`` in float64."""
        w, jacobian, _ = self._solved(None)
        theta, numbers = flatten(self.theta, np), self._numbers["outer"]
        outer_w = w - numbers["target"] + numbers["weight_w"] * (numbers["weight_theta"] @ theta)
        outer_theta = theta - numbers["center"] + numbers["weight_theta"] * (numbers["weight_w"] @ w)
        return unflatten_like(outer_theta + jacobian.T @ outer_w, self.theta)

    @cached_property
    def condition_number(self) -> float:
        """The condition number κ, in the 2-norm, of the linear system for ∂w/∂θ."""
        return float(np.linalg.cond(self._solved(None)[2]))

    @property
    def rtol(self) -> float:
        """The tolerance 1000·eps·κ, relative to the largest entry: rounding errors of a solve are about eps·κ."""
        return 1000 * float(np.finfo(self.dtype).eps) * self.condition_number

    @cached_property
    def _numbers(self):
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.data)

    def _solved(self, theta):
        return self._closed_form(self._numbers, flatten(self.theta if theta is None else theta, np))

    def _value(self, theta):
        """Evaluate the outer value at the exact inner solution by NumPy."""
        return float(evaluate_outer(self._solved(theta)[0], flatten(theta, np), self._numbers["outer"]))


def evaluate_outer(w: Any, theta: Any, numbers: PyTree) -> Any:
    """Evaluate ½‖w − target‖² + ½‖θ − center‖² + ⟨weight_w, w⟩⟨weight_theta, θ⟩ on flat vectors.

    The last term makes the derivative in θ at fixed w depend on w, so that a wrong w changes it.
    """
    away, moved = w - numbers["target"], theta - numbers["center"]
    return 0.5 * away @ away + 0.5 * moved @ moved + (numbers["weight_w"] @ w) * (numbers["weight_theta"] @ theta)


def outer(w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
    """Evaluate the outer function that all cases share."""
    return evaluate_outer(flatten(w), flatten(theta), data["outer"])


def arrange(flat: Any, layout: str) -> Any:
    """Lay out a vector of at least three entries as a pytree, whose leaves in order concatenate to the vector.

    The layout ``"scalar"`` takes a vector of one entry instead.
    """
    if layout == "dict":
        return {"bias": flat[:1], "weight": flat[1:, None]}
    if layout == "tuple":
        return flat[:1], {"inner": (flat[..., 1], flat[2:])}
    if layout == "scalars":
        return tuple(flat[..., index] for index in range(flat.size))
    return flat[..., 0] if layout == "scalar" else flat


def flatten(tree: PyTree, numpy: Any = jnp) -> Any:
    """Concatenate all leaves into one vector: a JAX array in their dtype, or a float64 NumPy array for ``numpy=np``."""
    flat = numpy.concatenate([numpy.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    return flat.astype(np.float64) if numpy is np else flat


def unflatten_like(flat: np.ndarray, tree: PyTree) -> PyTree:
    """Split a vector into a tree with the structure and shapes of another."""
    leaves, structure = jax.tree.flatten(tree)
    parts = np.split(flat, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    return structure.unflatten([part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)])
