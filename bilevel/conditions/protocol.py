"""The protocol of a condition, and the checks and wrappers that conditions share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.types import Objective, PyTree

Residual = Callable[[PyTree, PyTree, PyTree], PyTree]
"""``residual(w, theta, data)``, a pytree like w."""
StrongConvexity = float | Callable[[PyTree, PyTree], jax.Array] | None
"""μ > 0 with ⟨u, (∂F/∂w)u⟩ ≥ μ‖u‖² at all w that a solver may reach: a number, ``f(theta, data)``, or None."""


class Condition(Protocol):
    """The interface through which solvers and methods use a condition."""

    @property
    def symmetric(self) -> bool:
        """True if ∂F/∂w is symmetric everywhere, so that F is the gradient in w of some function."""
        ...

    @property
    def positive_definite(self) -> bool:
        """True if the user declares ⟨u, (∂F/∂w)u⟩ > 0 for all u ≠ 0; False where that is unknown."""
        ...

    @property
    def strong_convexity(self) -> StrongConvexity:
        """The strong convexity μ that the user declares; None where it is unknown."""
        ...

    # The arguments are positional-only, so that a field of type Callable, such as ``Root.residual``, fits the protocol.
    def residual(self, w: PyTree, theta: PyTree, data: PyTree, /) -> PyTree:
        """Return F(w, θ, data), a pytree like w."""
        ...

    def scaling(self, theta: PyTree, data: PyTree, /) -> PyTree | None:
        """Return D, a scalar or a pytree like w, or None for no scaling.

        A linear system Av = g with A = ∂F/∂w, or with Aᵀ in place of A, is solved as (D A D)u = D g with v = D u.
        """
        ...


class GradientCondition(Condition, Protocol):
    """A condition whose residual is the gradient of an objective, so that ∂F/∂w is symmetric by construction."""

    def potential(self, w: PyTree, theta: PyTree, data: PyTree, /) -> jax.Array:
        """Return the value of the function whose gradient in w is the residual, a scalar."""
        ...


@dataclass(frozen=True)
class LikeW:
    """A user's function of (w, θ, data) that returns a tree like w: the result is cast to the dtypes of w.

    Without the cast, a float32 w and a float64 θ would give a float64 residual. A loop or a linear solve cannot carry
    both dtypes.

    Args:
        function: the user's function.
        name: its name for messages.
        same_shapes: whether its result must have the shapes of w too, and not only shapes that broadcast to them.
    """

    function: Residual
    name: str
    same_shapes: bool = True

    def __call__(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return like_w(self.function(w, theta, data), w, self.name, self.same_shapes, hint=_NO_TREE_LIKE_W)


@dataclass(frozen=True)
class WithoutAux:
    """A wrapper of a user's function of (w, θ, data) that returns ``(value, aux)``. A call returns the value alone.

    Args:
        function: the user's function.
        name: its name for messages.
    """

    function: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    name: str

    def __call__(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return self._both(w, theta, data)[0]

    def aux(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return self._both(w, theta, data)[1]

    def _both(self, w: PyTree, theta: PyTree, data: PyTree) -> tuple[PyTree, PyTree]:
        found = self.function(w, theta, data)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                f"the {self.name} with has_aux=True must return a pair (value, aux), got {type(found).__name__}"
            )
        return found


def without_aux(function: Residual, name: str, has_aux: bool) -> Residual:
    """Return a condition's function without its aux. A function without aux, or already wrapped, is not changed."""
    return WithoutAux(function, name) if has_aux and not isinstance(function, WithoutAux | LikeW) else function


def aux_of(function: Residual, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
    """Return the aux of a condition's function; None if it has none."""
    function = function.function if isinstance(function, LikeW) else function
    return function.aux(w, theta, data) if isinstance(function, WithoutAux) else None


_NO_TREE_LIKE_W = (
    "; for a Root or FixedPoint with an aux output, pass has_aux=True; for more or fewer residuals than unknowns, use "
    "LeastSquares"
)


def like_w(
    value: PyTree, w: PyTree, name: str, same_shapes: bool = True, template: str = "w", hint: str = ""
) -> PyTree:
    """Return ``value`` in the dtypes and shapes of w.

    The argument w may be another tree in place of the inner variables. ``template`` is then its name for the message.
    ``hint`` is the end of the message: what else may be wrong.

    Raises:
        ValueError: if the tree structure of ``value`` is not that of w, or if its shapes are not those of w. Without
            ``same_shapes``, shapes that broadcast to those of w are accepted too.
    """
    got, expected = ((jax.tree.structure(part), tree.shapes(part)) for part in (value, w))
    fits = got == expected or (not same_shapes and got[0] == expected[0] and all(map(_broadcasts, got[1], expected[1])))
    if not fits:
        raise ValueError(
            f"the {name} is not a tree like {template}: got {got[0]} of shapes {got[1]}, expected {expected[0]} of "
            f"shapes {expected[1]}: return one entry for each entry of {template}, without further outputs{hint}"
        )
    return jax.tree.map(lambda new, old: jnp.broadcast_to(jnp.asarray(new).astype(old.dtype), old.shape), value, w)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def check_signature(owner: str, name: str, function: Callable | None, *arguments: str) -> None:
    """Raise TypeError for a function that cannot be called or does not take these arguments; None is accepted."""
    expected = f"{owner} calls {name}({', '.join(arguments)})"
    if function is None:
        return
    if isinstance(function, type):
        name = function.__name__
        raise TypeError(f"{expected}, got the class {name}: pass an instance, {name}(…) with its arguments")
    if not callable(function):
        raise TypeError(f"{expected}, got {type(function).__name__}: pass a function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{expected}, got a function of {signature}: let it take these {len(arguments)} positional arguments, even "
            "if it does not use all of them"
        ) from error


def check_condition_type(owner: str, condition: object) -> None:
    """Raise TypeError for something that is no condition, such as a class of conditions in place of an instance."""
    if isinstance(condition, type) or not callable(getattr(condition, "residual", None)):
        got = f"the class {condition.__name__}" if isinstance(condition, type) else type(condition).__name__
        remedy = "pass its condition" if hasattr(condition, "condition") else "pass one, such as Stationary(objective)"
        raise TypeError(f"{owner} needs a condition, got {got}: {remedy}")


def scalar(value: PyTree, name: str, remedy: str) -> jax.Array:
    """Return the value of a user's function as an array, or raise TypeError for a tuple or an array with axes."""
    if isinstance(value, tuple):
        raise TypeError(f"the {name} must return a scalar, got a tuple of {len(value)}: {remedy}")
    if jax.tree_util.all_leaves([value]) and jnp.ndim(value) > 0:
        raise TypeError(
            f"the {name} must return a scalar, got an array of shape {jnp.shape(value)}: return its sum or mean"
        )
    return jnp.asarray(value)


def gradient_of(objective: Objective, w: PyTree, theta: PyTree, data: PyTree, remedy: str) -> PyTree:
    """Return the gradient in w of a user's objective, or raise TypeError if the objective returns no scalar."""
    return jax.grad(lambda w: scalar(objective(w, theta, data), "objective", remedy))(w)


def is_gradient(condition: Condition) -> TypeGuard[GradientCondition]:
    """Return whether the residual is the gradient of an objective."""
    return hasattr(condition, "potential")


def adjoint_residual(condition: Condition) -> Residual:
    """Return the function whose Jacobian A in w defines the adjoint system Aᵀv = g. Its values are the residual.

    That is ``condition.residual``, unless the condition defines ``adjoint_residual``, as :class:`LeastSquares` does.
    """
    return getattr(condition, "adjoint_residual", condition.residual)


def no_scaling(self: object, theta: PyTree, data: PyTree) -> None:
    """Return None: the adjoint system of this condition is solved without scaling."""
    del self, theta, data


def check_strong_convexity(name: str, strong_convexity: StrongConvexity) -> None:
    """Raise ValueError for a number μ that is not positive and finite."""
    if strong_convexity is not None and not callable(strong_convexity) and not 0 < strong_convexity < float("inf"):
        raise ValueError(
            f"{name} needs a finite strong_convexity above 0, got {strong_convexity}; leave it None if none is known"
        )
