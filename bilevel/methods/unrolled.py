"""Differentiation through the inner solver's steps: Unrolled and ForwardUnrolled."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel import solvers, tree
from bilevel.conditions.protocol import Condition
from bilevel.methods.estimates import constant, estimated, prefer_gradient
from bilevel.methods.protocol import Start, outer_with_aux, starting_point
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver, IterativeSolver
from bilevel.types import Hypergradient, PyTree


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through the inner solver's steps, all of them or the last few.

    The result is the derivative of what the solver computed, not of the solution. It tends to the derivative of the
    solution as the steps converge. Memory grows with the number of steps that are differentiated, except with
    ``first_order`` and gradient descent. If ``init`` is a function of θ, its derivative is included unless ``last``
    leaves steps out. With ``init=lambda theta, data: theta`` this is MAML.

    By default, JAX can differentiate the result again, to any order. If ``last`` leaves steps out, JAX can
    differentiate only the value: its derivative in θ is the gradient, and its derivative in data goes through the last
    steps. With ``first_order``, JAX can differentiate only the value, and only in θ. Any other derivative raises an
    error.

    With :class:`Anderson`, an entry x of the start whose residual is zero is first moved by eps^⅓·(1 + |x|), because
    the derivative of Anderson's steps need not converge for an entry that never moves.

    Args:
        last: differentiate the last ``last`` steps only; None for all.
        checkpoint: recompute each step in the backward pass and keep only the iterates.
        first_order: treat the residual of each step as a constant, so that no second derivative is computed. With
            gradient descent, no iterate is stored, and the inner solution's derivative is that of ``init``. With MAML's
            start at θ this is first-order MAML (Finn, Abbeel, Levine 2017, section 5.2).

    Raises:
        ValueError: when called, for ``last`` below one or above the solver's steps, for a solver that offers no single
            steps (such as :class:`HessianFree`, :class:`Jaxopt` or a function), for a solver with a ``tol``, whose
            number of steps is known only at run time, and for a condition that the solver cannot solve.

    Source: Franceschi et al. (2017); truncation: Shaban et al. (2019).
    """

    last: int | None = None
    checkpoint: bool = False
    first_order: bool = False

    @property
    def start_is_constant(self) -> bool:
        """True if ``last`` is set. The derivative in arrays ``init`` is then left out, also if no step is left out."""
        return self.last is not None

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient:
        del linear_init  # this method solves no linear system
        iterative = self._check(solver)
        iterative.check(problem.condition)

        def outer(theta):
            start = _unsolved_start(iterative, problem.condition, starting_point(init, theta, data), theta, data)
            w, memory = self._inner(problem.condition, iterative, theta, start, data)
            value, aux = outer_with_aux(problem)(w, theta, data)
            return value, (aux, w, memory)

        (value, (aux, w, memory)), gradient = jax.value_and_grad(outer, has_aux=True, allow_int=True)(theta)
        inner = solvers.report(problem.condition.residual(w, theta, data), w, iterative.max_steps)
        inner = solvers.with_memory(inner, iterative, memory)
        found = Hypergradient(value, tree.with_zeros(gradient, theta), aux, inner, None)
        if not self.first_order and self.last in (None, iterative.max_steps):
            return found
        at, w = jax.lax.stop_gradient((theta, w))
        source, residual = outer(at)[0], problem.condition.residual(w, at, data)
        if self.first_order:  # the source lacks the derivative of the steps in data
            source = source + constant(f"{self}", jnp.zeros_like(source), residual)
        return estimated(found, source, f"{self}", theta, data, residual)

    def _check(self, solver: InnerSolver) -> IterativeSolver:
        if not isinstance(solver, IterativeSolver) or solver.tol is not None:
            raise ValueError(
                "Unrolled differentiates a fixed number of steps: use GradientDescent, Optax, FixedPointIteration, "
                f"FISTA or Anderson with tol=None, or Implicit, which takes any solver; got {solver}"
            )
        if self.last is not None and not 1 <= self.last <= solver.max_steps:
            raise ValueError(
                f"Unrolled(last={self.last}) needs last between 1 and the solver's {solver.max_steps} steps"
            )
        return solver

    def _inner(
        self, condition: Condition, solver: IterativeSolver, theta: PyTree, init: PyTree, data: PyTree
    ) -> tuple[PyTree, PyTree]:
        def advance(_, state):
            residual = condition.residual(state[0], theta, data)
            return solver.update(state, jax.lax.stop_gradient(residual) if self.first_order else residual)

        last = solver.max_steps if self.last is None else self.last
        state = jax.lax.fori_loop(0, solver.max_steps - last, advance, solver.start(init))
        if last < solver.max_steps:
            state = jax.lax.stop_gradient(state)
        if self.checkpoint:
            advance = jax.checkpoint(advance)
        return jax.lax.fori_loop(0, last, advance, state)


@dataclass(frozen=True)
class ForwardUnrolled:
    """Forward-mode differentiation through the inner solver: one tangent for each entry of θ.

    As with :class:`Unrolled`, the result is the derivative of what the solver computed. Time and memory grow with
    the number of entries of θ. Memory does not grow with the steps, and the solver may stop by its ``tol``. If
    ``init`` is a function of θ, its derivative is included.

    JAX can differentiate the result again. If the solver has a ``tol``, or offers no single steps
    (such as :class:`HessianFree`, :class:`Jaxopt` or a function), its loop may have an unknown length. Reverse mode
    (``jax.grad``) is then certain to work only for the derivative of the value in θ. Forward mode can compute all
    derivatives.

    Source: Franceschi et al. (2017), Forward and reverse gradient-based hyperparameter optimization.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import GradientDescent, Problem, Stationary, value_and_hypergradient
        >>> problem = Problem(Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)
        >>> function = value_and_hypergradient(problem, GradientDescent(0.5, max_steps=2), ForwardUnrolled())
        >>> float(function(1.0, 0.0, None).gradient)  # 1 − ½²
        0.75
    """

    def __call__(
        self,
        problem: Problem,
        solver: InnerSolver,
        theta: PyTree,
        init: Start,
        data: PyTree,
        linear_init: PyTree | None = None,
    ) -> Hypergradient:
        del linear_init  # this method solves no linear system
        floats, join = tree.partition_inexact(theta)

        def outer(floats):
            theta = join(floats)
            start = _unsolved_start(solver, problem.condition, starting_point(init, theta, data), theta, data)
            inner = solvers.solve(solver, problem.condition, start, theta, data)
            value, aux = outer_with_aux(problem)(inner.w, theta, data)
            return value, (value, aux, inner)

        # jacfwd refuses an empty tree.
        differentiate = jax.jacfwd(outer, has_aux=True) if floats else lambda floats: (floats, outer(floats)[1])
        slopes, (value, aux, inner) = differentiate(floats)
        gradient = tree.with_zeros(join(slopes), theta)
        if not isinstance(solver, IterativeSolver) or solver.tol is not None:
            # JAX cannot differentiate a loop of unknown length in reverse mode, but the derivative in θ is known.
            value = prefer_gradient(value, gradient, theta, outer(jax.lax.stop_gradient(floats))[0])
        return Hypergradient(value, gradient, aux, inner, None)


def _unsolved_start(solver: InnerSolver, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> PyTree:
    """Return ``init``. For Anderson, move each entry whose residual is exactly zero by eps^⅓·(1 + |entry|).

    Anderson's mix of past steps is not differentiable where an entry never moves: the mix ignores the entry, whose
    derivative then need not converge. An entry that moves a little takes part in the mix.
    """
    if not isinstance(solver, solvers.Anderson):
        return init
    residual = jax.lax.stop_gradient(condition.residual(init, theta, data))

    def moved(entry, residual):
        distance = jnp.finfo(entry.dtype).eps ** (1 / 3) * (1 + jnp.abs(jax.lax.stop_gradient(entry)))
        return entry + jnp.where(residual == 0, distance, jnp.zeros_like(entry))

    return jax.tree.map(moved, init, residual)
