"""The records of an outer loop: its state, its history, the record of one step, and the result."""

from dataclasses import dataclass, field
from typing import Literal

import jax

from bilevel.types import PyTree, Status

Ended = Literal["steps", "data", "stop"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OuterState:
    """The state from which an outer loop goes on: a pytree of arrays, which NumPy or a checkpoint library can save.

    Attributes:
        theta: θ.
        w: the inner solution of the last step whose numbers were finite; before the first step, the start of the inner
            solver.
        optimizer: the state of the optax optimiser.
        warm_start: what the method starts from: the adjoint for :class:`Implicit` and :class:`FiniteDifference`; the
            penalised solution and the memory of its solver for :class:`ValuePenalty`.
        memory: the memory of the inner solver, such as the moments and the step count of :class:`Optax`; None for a
            solver without memory, and in a loop without warm starts.
        step: the number of steps taken since the first call, an int32 scalar.

    Example:
        >>> import io, jax, numpy as np, optax
        >>> from bilevel import CG, GradientDescent, Implicit, Problem, Stationary, initial_state, minimize
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> problem = Problem(condition, lambda w, theta, data: 0.5 * (w - data) ** 2)
        >>> arguments = problem, 0.0, 0.0, 3.0, GradientDescent(0.5, 5), Implicit(CG(1)), optax.adam(0.1)
        >>> found = minimize(*arguments, steps=10)
        >>> np.savez(file := io.BytesIO(), *jax.tree.leaves(found.state))
        >>> saved = np.load(io.BytesIO(file.getvalue()))
        >>> structure = jax.tree.structure(initial_state(*arguments))
        >>> state = jax.tree.unflatten(structure, [saved[name] for name in saved])
        >>> int(minimize(*arguments, steps=10, state=state).state.step)
        20
    """

    theta: PyTree
    w: PyTree
    optimizer: PyTree
    warm_start: PyTree
    memory: PyTree
    step: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The record of an outer loop: one entry for each step, computed before the step changes θ.

    Attributes:
        value: the outer value, ``[steps]``.
        gradient_norm: ‖d outer/dθ‖₂, ``[steps]``.
        inner_residual: ‖F(w, θ, data)‖₂ with the condition's residual F, ``[steps]``.
        linear_residual: the adjoint system's true relative residual, ``[steps]``; NaN for a method that
            solves no adjoint system.
        status: ``Hypergradient.status``, the worst :class:`Status` of a step, int32 ``[steps]``.
    """

    value: jax.Array
    gradient_norm: jax.Array
    inner_residual: jax.Array
    linear_residual: jax.Array
    status: jax.Array


@dataclass(frozen=True)
class StepRecord:
    """The record of one outer step on the host, as ``stop`` of :func:`minimize` gets it.

    Attributes:
        step: the number of the step, from 0; a resumed loop goes on counting.
        value: the outer value.
        gradient_norm: ‖d outer/dθ‖₂.
        inner_residual: ‖F(w, θ, data)‖₂.
        linear_residual: the adjoint system's relative residual; NaN for a method that solves no adjoint system.
        status: the worst :class:`Status` of the step.
    """

    step: int
    value: float
    gradient_norm: float
    inner_residual: float
    linear_residual: float
    status: Status


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Minimum:
    """The result of an outer loop.

    Attributes:
        theta: θ after the last step.
        w: the inner solution of the last step whose numbers were finite. It belongs to the θ before that step.
        history: the record of each step of this call.
        state: the argument ``state`` with which a further call of :func:`minimize` goes on.
        ended: why the loop ended: ``"steps"`` if it took all steps, ``"data"`` if the iterator ended, and ``"stop"`` if
            the argument ``stop`` ended it.
    """

    theta: PyTree
    w: PyTree
    history: History
    state: OuterState
    ended: Ended = field(default="steps", metadata={"static": True})

    @property
    def stopped(self) -> bool:
        """True if the function ``stop`` ended the loop."""
        return self.ended == "stop"
