"""A case: a bilevel problem whose answer is known, and from where.

The answer is linear algebra in NumPy and float64 on the very numbers the problem is given, after they were
rounded to its dtype. No line of it is shared with the library, so that nothing can agree by mistake.
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
"""How a vector is laid out as a pytree; θ may also be a single ``"scalar"``."""
ClosedForm = Callable[[PyTree, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""``closed_form(data, theta) -> (w, ∂w/∂θ, A)``, on flat float64 vectors; A is the matrix that was inverted."""


@dataclass(frozen=True)
class Case:
    """A problem, where to stand in it, and its exact inner solution and hypergradient.

    It prints as the call that makes it again, ``ridge(size=3, condition=10.0, …, seed=7)``, which is what
    Hypothesis shows of a failing example.

    Attributes:
        recipe: the call that makes it.
        problem: the condition and the outer function; the same object for the same shapes, whatever the
            seed, so that what was compiled for it serves again.
        theta: outer variables, NumPy arrays of ``dtype``.
        init: where an inner solver may start.
        data: every number of the problem.
        solver: an inner solver that converges here, from ``init``, to rounding.
        method: a method that is exact at the inner solution.
        margin: the distance of w − η∇ from the nearest kink; infinite where there is none.
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
        return self._suggest()[0]

    @property
    def method(self) -> Callable[..., Any]:
        return self._suggest()[1]

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64, of every array in it."""
        return np.dtype(jax.tree.leaves(self.theta)[0].dtype)

    def exact(self, theta: PyTree = None) -> PyTree:
        """w*(θ), a tree like ``init`` in float64; beside kinks it holds within ``margin``."""
        return self._arrange(self._solved(theta)[0])

    @cached_property
    def w(self) -> PyTree:
        """The exact inner solution, float64."""
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
        """κ of the system that determines the solution, in the 2-norm."""
        return float(np.linalg.cond(self._solved(None)[2]))

    @property
    def rtol(self) -> float:
        """1000·eps·κ, relative to the largest entry: what a solve to rounding leaves, with a wide margin."""
        return 1000 * float(np.finfo(self.dtype).eps) * self.condition_number

    @cached_property
    def _numbers(self):
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.data)

    def _solved(self, theta):
        return self._closed_form(self._numbers, flatten(self.theta if theta is None else theta, np))

    def _value(self, theta):
        """The outer value by NumPy: what differences of the closed form are taken of."""
        return float(evaluate_outer(self._solved(theta)[0], flatten(theta, np), self._numbers["outer"]))


def evaluate_outer(w: Any, theta: Any, numbers: PyTree) -> Any:
    """½‖w − target‖² + ½‖θ − center‖² + ⟨a, w⟩⟨b, θ⟩ on flat vectors: θ counts directly, alone and with w."""
    away, moved = w - numbers["target"], theta - numbers["center"]
    return 0.5 * away @ away + 0.5 * moved @ moved + (numbers["weight_w"] @ w) * (numbers["weight_theta"] @ theta)


def outer(w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
    """The outer function of every case."""
    return evaluate_outer(flatten(w), flatten(theta), data["outer"])


def arrange(flat: Any, layout: str) -> Any:
    """A vector of at least three entries as a pytree, whose leaves in order are the vector again."""
    if layout == "dict":
        return {"bias": flat[:1], "weight": flat[1:, None]}
    if layout == "tuple":
        return flat[:1], {"inner": (flat[..., 1], flat[2:])}
    if layout == "scalars":
        return tuple(flat[..., index] for index in range(flat.size))
    return flat[..., 0] if layout == "scalar" else flat


def flatten(tree: PyTree, numpy: Any = jnp) -> Any:
    """All leaves as one vector: in their dtype for a trace, in float64 for NumPy."""
    flat = numpy.concatenate([numpy.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    return flat.astype(np.float64) if numpy is np else flat


def unflatten_like(flat: np.ndarray, tree: PyTree) -> PyTree:
    """The vector as a tree of the shapes of another."""
    leaves, structure = jax.tree.flatten(tree)
    parts = np.split(flat, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    return structure.unflatten([part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)])
