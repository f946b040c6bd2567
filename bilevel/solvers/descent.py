"""Inner solvers that follow the gradient: GradientDescent and Optax."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel._deprecation import renamed_field
from bilevel.conditions.protocol import Condition
from bilevel.solvers.iteration import iterate
from bilevel.solvers.protocol import check_budget, check_gradient
from bilevel.types import PyTree, Solution

if TYPE_CHECKING:
    import optax


@renamed_field("steps", "max_steps")
@dataclass(frozen=True)
class GradientDescent:
    """Gradient descent: w ← w − step_size · F(w, θ, data) from ``init``, with F the gradient of the inner objective.

    Args:
        step_size: a positive number. On a convex objective, the iteration without momentum converges for values below
            2 / (largest eigenvalue of ∂F/∂w). It may also be a schedule, like those of optax: a function of the number
            of the step, counted from 0.
        max_steps: the budget, in gradients.
        tol: stop at ‖F‖ ≤ tol; None takes all ``max_steps``, with status BUDGET_USED.
        momentum: the factor in [0, 1) of Polyak's heavy ball: m ← momentum·m + F, w ← w − step_size·m.
        memory: the memory from which a run goes on: m, or with a schedule m and the number of the step; None for a new
            run. :func:`minimize` sets it.

    Raises:
        ValueError: for a step size that is not positive and finite, a momentum outside [0, 1), a negative budget or
            tol, and, when called, for a condition that is not a gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> solution = GradientDescent(0.5, max_steps=2)(condition, jnp.float32(0.0), jnp.float32(1.0), None)
        >>> float(solution.w), float(solution.residual_norm)
        (0.75, 0.25)
    """

    step_size: float | Callable[[jax.Array], jax.Array | float]
    max_steps: int
    tol: float | None = None
    momentum: float = 0.0
    memory: PyTree = field(default=None, repr=False, kw_only=True)

    traceable = True

    def __post_init__(self) -> None:
        check_budget("GradientDescent", self.max_steps, self.tol)
        usable = callable(self.step_size) or 0 < self.step_size < float("inf")
        if not usable or not 0 <= self.momentum < 1:
            raise ValueError(
                "GradientDescent needs a finite step_size above 0 and a momentum in [0, 1), "
                f"got {self.step_size} and {self.momentum}"
            )

    def check(self, condition: Condition) -> None:
        check_gradient("GradientDescent", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        if self.memory is not None:
            return init, self.memory
        velocity = jax.tree.map(jnp.zeros_like, init) if self.momentum else None
        if not callable(self.step_size):
            return init, velocity
        return init, (velocity, tree.match_varying_axes(init, jnp.int32(0))[1])

    def resumed(self, memory: PyTree) -> "GradientDescent":
        """Return this solver with a run's memory, from which it goes on."""
        return replace(self, memory=memory)

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        w, memory = state
        velocity, step = memory if callable(self.step_size) else (memory, None)
        if self.momentum:
            residual = velocity = tree.add(tree.scale(self.momentum, velocity), residual)
        w = tree.subtract(w, tree.scale(self.size_at(step), residual))
        return w, velocity if step is None else (velocity, step + 1)

    def size_at(self, step: jax.Array | None) -> jax.Array | float:
        """Return the step size at a step. If ``step_size`` is a number, ``step`` is not used."""
        if not callable(self.step_size):
            return self.step_size
        assert step is not None, "the memory of a schedule holds the step"
        with jax.numpy_dtype_promotion("standard"):  # a schedule may multiply floats by the integer step
            return self.step_size(step)

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


def check_transformation(owner: str, transformation: object) -> None:
    """Raise TypeError for something that is no optax transformation, such as the function that makes one."""
    if not (callable(getattr(transformation, "init", None)) and callable(getattr(transformation, "update", None))):
        name = getattr(transformation, "__name__", type(transformation).__name__)
        remedy = f"call it, as in optax.{name}(...)" if callable(transformation) else "pass one, as optax.adam(0.1)"
        raise TypeError(f"{owner} needs an optax.GradientTransformation, got {name}: {remedy}")


@renamed_field("steps", "max_steps")
@dataclass(frozen=True)
class Optax:
    """Descent on the inner objective by any optax transformation.

    Args:
        transformation: an ``optax.GradientTransformation``; it is given F, the inner gradient, and w.
        max_steps: the budget, in gradients.
        tol: stop at ‖F‖ ≤ tol; None takes all ``max_steps``, with status BUDGET_USED. With a tol the number of
            iterations is known only at run time, so :class:`Unrolled` cannot differentiate them.
        memory: the transformation's state from which a run goes on; None for a new one. :func:`minimize` sets it.

    Raises:
        TypeError: for something that is no transformation, such as ``optax.adam`` in place of ``optax.adam(0.1)``.
        ValueError: for a negative budget or tol, and, when called, for a condition that is not a gradient, or a
            transformation that requires further arguments, such as the objective's value.
    """

    transformation: "optax.GradientTransformation"
    max_steps: int
    tol: float | None = None
    memory: PyTree = field(default=None, repr=False, kw_only=True)

    traceable = True

    def __post_init__(self) -> None:
        check_budget("Optax", self.max_steps, self.tol)
        check_transformation("Optax", self.transformation)

    def check(self, condition: Condition) -> None:
        check_gradient("Optax", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        return init, self.transformation.init(init) if self.memory is None else self.memory

    def resumed(self, memory: PyTree) -> "Optax":
        """Return this solver with a run's memory, from which it goes on."""
        return replace(self, memory=memory)

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        import optax  # optax is slow to import, so it is imported when needed

        w, memory = state
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
            updates, memory = self._transformed(residual, memory, w)
        return optax.apply_updates(w, updates), memory

    def _transformed(self, residual: PyTree, memory: PyTree, w: PyTree) -> tuple[PyTree, PyTree]:
        try:
            return self.transformation.update(residual, memory, w)
        except TypeError as error:
            if "required keyword-only argument" not in str(error):
                raise
            raise ValueError(
                f"Optax gives a transformation the gradient and w, and this one needs more ({error}): use another one, "
                'such as optax.adam, or HessianFree or Jaxopt("LBFGS") for a line search'
            ) from error

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)
