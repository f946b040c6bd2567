"""The protocol of a stochastic algorithm: its state, the oracle that evaluates batches, and ``init`` and ``step``.

F is the condition's residual on an inner batch, A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w and h = ∂outer/∂θ on an outer
batch. Every algorithm but F2SA moves w, the adjoint v and θ against estimates of

    D_w = F,        D_v = Aᵀv − g,        D_θ = h − Bᵀv.

Where D_w and D_v over all samples are zero, w is the inner solution, v is the solution of the adjoint system, and D_θ
is the hypergradient. The sign of v is that of ``Hypergradient.linear.solution``.

Source: Dagréou, Ablin, Vaiter, Moreau (2022), A framework for bilevel optimization that enables stochastic and global
variance reduction algorithms. The v of the paper has the opposite sign.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from bilevel import tree
from bilevel.conditions import Projected, ProximalGradient
from bilevel.conditions.protocol import Condition, is_gradient
from bilevel.problem import Problem
from bilevel.stochastic.rates import at_step, descend, is_transformation
from bilevel.stochastic.samples import Samples, Sampling
from bilevel.types import PyTree

Class = TypeVar("Class")
Point = tuple[PyTree, PyTree, PyTree]
"""w, the adjoint and θ."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The state of a run: a pytree of arrays. A run that is continued from it gives the same bits as one longer run.

    Attributes:
        step: the number of steps taken, t, an int32 scalar.
        key: the data of the random key, uint32 ``[2]``.
        theta: the outer variables θ.
        w: the inner variables.
        adjoint: v, a pytree like w.
        optimizer: the state of an optax transformation; () for a rate.
        memory: what the algorithm keeps between steps, any pytree, the same for every share of the samples.
        tables: what the algorithm keeps for each batch, any pytree. Outside of ``init`` and ``step`` its leaves have a
            leading axis of shares.
    """

    step: jax.Array
    key: jax.Array
    theta: PyTree
    w: PyTree
    adjoint: PyTree
    optimizer: PyTree = ()
    memory: PyTree = ()
    tables: PyTree = ()


class Draws(NamedTuple):
    """The indices of the batches that are drawn for one step.

    Attributes:
        inner: the indices of the inner batches, int32 ``[draws[0]]``.
        outer: the indices of the outer batches, int32 ``[draws[1]]``.
    """

    inner: jax.Array
    outer: jax.Array


class InnerTerms(NamedTuple):
    """F, Aᵀv and Bᵀv.

    Attributes:
        residual: F, a pytree like w.
        transposed: Aᵀv, a pytree like w.
        cross: Bᵀv, a pytree like θ.
    """

    residual: PyTree
    transposed: PyTree
    cross: PyTree


class OuterTerms(NamedTuple):
    """The outer value, g and h.

    Attributes:
        value: the outer function, a scalar.
        in_w: g = ∂outer/∂w, a pytree like w.
        in_theta: h = ∂outer/∂θ, a pytree like θ.
    """

    value: jax.Array
    in_w: PyTree
    in_theta: PyTree


class Directions(NamedTuple):
    """D_w, D_v and D_θ: the directions against which w, the adjoint and θ move.

    Attributes:
        w: F, a pytree like w.
        adjoint: Aᵀv − g, a pytree like w.
        theta: h − Bᵀv, a pytree like θ.
    """

    w: PyTree
    adjoint: PyTree
    theta: PyTree


def directions(inner: InnerTerms, outer: OuterTerms) -> Directions:
    """Return the three directions from the terms of an inner and an outer batch."""
    return Directions(
        inner.residual,
        tree.subtract(inner.transposed, outer.in_w),
        tree.subtract(outer.in_theta, inner.cross),
    )


@dataclass(frozen=True)
class Oracle:
    """The problem on its samples, as ``init`` and ``step`` of an algorithm see it.

    The terms of a batch are means over its samples, weighted if the last batch is smaller than the others: the mean of
    the terms over all batches is the mean over all samples.

    If the samples are divided into several shares, the oracle sees the samples of one share. The terms of a batch are
    then those of this share, and :meth:`average` takes the mean over the shares.

    Attributes:
        problem: the condition and the outer function.
        inner_samples: the inner samples in batches.
        outer_samples: the outer samples in batches.
        axes: the names of the axes over which the shares lie; () for one share without a mesh.
        project: the projection of θ onto a set, or None.
        local_shares: the number of shares whose tables lie in the memory of one device.
    """

    problem: Problem
    inner_samples: Samples
    outer_samples: Samples
    axes: tuple[str, ...] = ()
    project: Callable[[PyTree], PyTree] | None = None
    local_shares: int = 1

    def on_full_batches(self) -> "Oracle":
        """Return the oracle for steps that do not evaluate a smaller last batch."""
        inner, outer = (replace(samples, only_full=True) for samples in (self.inner_samples, self.outer_samples))
        return replace(self, inner_samples=inner, outer_samples=outer)

    def inner(self, number: jax.Array, w: PyTree, adjoint: PyTree, theta: PyTree) -> InnerTerms:
        """Return F, Aᵀv and Bᵀv on an inner batch, by one evaluation of F and one product with its derivatives."""
        return self.inner_samples.on_batch(lambda batch: self._inner_terms(w, adjoint, theta, batch), number)

    def outer(self, number: jax.Array, w: PyTree, theta: PyTree) -> OuterTerms:
        """Return the outer value, g and h on an outer batch, by one gradient."""
        return self.outer_samples.on_batch(lambda batch: self._outer_terms(w, theta, batch), number)

    def objective(self, number: jax.Array, w: PyTree, theta: PyTree) -> tuple[PyTree, PyTree]:
        """Return the gradients in w and in θ of the inner objective, for a condition that has one."""
        return self.inner_samples.on_batch(lambda batch: self._objective_gradients(w, theta, batch), number)

    def change(self, inner: jax.Array, outer: jax.Array, point: Point, previous: Point) -> Directions:
        """Return the directions on an inner and an outer batch at ``point``, minus those at ``previous``.

        A point is (w, adjoint, θ). Each batch is read once for both points.
        """

        def inner_change(batch):
            return tree.subtract(self._inner_terms(*point, batch), self._inner_terms(*previous, batch))

        def outer_change(batch):
            (w, _, theta), (old_w, _, old_theta) = point, previous
            return tree.subtract(self._outer_terms(w, theta, batch), self._outer_terms(old_w, old_theta, batch))

        return directions(
            self.inner_samples.on_batch(inner_change, inner), self.outer_samples.on_batch(outer_change, outer)
        )

    def full(self, w: PyTree, adjoint: PyTree, theta: PyTree) -> Directions:
        """Return the directions over all samples of all shares, by one evaluation on each inner and outer sample."""
        inner = self.inner_samples.mean(lambda batch: self._inner_terms(w, adjoint, theta, batch))
        outer = self.outer_samples.mean(lambda batch: self._outer_terms(w, theta, batch))
        return self.average(directions(inner, outer))

    def average(self, terms: PyTree) -> PyTree:
        """Return the mean of a pytree over the shares. Leaves that are not floating point are kept."""
        if not self.axes:
            return terms
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, self.axes) if tree.is_floating(leaf) else leaf, terms)

    def move_theta(self, rate: Any, state: State, direction: PyTree) -> tuple[PyTree, PyTree]:
        """Return θ after a step against the direction, projected, and the state of the optimiser."""
        if is_transformation(rate):
            import optax  # optax is slow to import, so it is imported when needed

            with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
                updates, optimizer = rate.update(direction, state.optimizer, state.theta)
            theta = optax.apply_updates(state.theta, updates)
        else:
            theta, optimizer = descend(state.theta, at_step(rate, state.step), direction), state.optimizer
        if self.project is not None:
            theta = tree.like(self.project(theta), state.theta)
        return tree.with_others(theta, state.theta), optimizer

    def _inner_terms(self, w, adjoint, theta, batch):
        w, adjoint, theta, batch = tree.match_varying_axes(w, adjoint, theta, batch)
        condition = self.problem.condition
        if is_gradient(condition) and _has_forward_mode(condition.potential, w, theta, batch):
            # A is symmetric, so Aᵀv and Bᵀv are the derivatives along v of the objective's gradients in w and in θ.
            # Forward over reverse mode reads the samples fewer times than two reverse passes do.
            def gradients(w):
                in_w, in_theta = jax.grad(condition.potential, (0, 1), allow_int=True)(w, theta, batch)
                return in_w, tree.with_zeros(in_theta, theta)

            (residual, _), (transposed, cross) = jax.jvp(gradients, (w,), (adjoint,))
        else:
            residual, pull_back = jax.vjp(lambda w, theta: condition.residual(w, theta, batch), w, theta)
            transposed, cross = pull_back(adjoint)
        return InnerTerms(residual, transposed, tree.with_zeros(cross, theta))

    def _objective_gradients(self, w, theta, batch):
        w, theta, batch = tree.match_varying_axes(w, theta, batch)
        potential: Any = self.problem.condition.potential  # type: ignore[attr-defined]  # minimize checks it
        in_w, in_theta = jax.grad(potential, (0, 1), allow_int=True)(w, theta, batch)
        return in_w, tree.with_zeros(in_theta, theta)

    def _outer_terms(self, w, theta, batch):
        w, theta, batch = tree.match_varying_axes(w, theta, batch)
        differentiate = jax.value_and_grad(self.problem.outer, (0, 1), has_aux=self.problem.has_aux, allow_int=True)
        value, (in_w, in_theta) = differentiate(w, theta, batch)
        return OuterTerms(value[0] if self.problem.has_aux else value, in_w, tree.with_zeros(in_theta, theta))


def _has_forward_mode(function, *arguments):
    """Return whether a function has a forward-mode derivative: whether it calls no ``custom_vjp``, as odeint does."""
    return "custom_vjp_call" not in str(jax.make_jaxpr(function)(*arguments))


def is_mean_over_samples(condition: Condition) -> bool:
    """Return whether the residual on a batch is the mean of the residuals on its samples.

    It is not if the condition applies a projection or a proximal operator after the mean over the batch.
    """
    return not isinstance(condition, Projected | ProximalGradient)


def register(*numbers: str) -> Callable[[type[Class]], type[Class]]:
    """Return a decorator that registers a dataclass as a pytree whose children are the named fields.

    Numbers in the named fields are arguments of the compiled program. A function in a named field, and every other
    field, is a constant of the program.
    """

    def decorate(cls: type[Class]) -> type[Class]:
        others = [item.name for item in fields(cls) if item.name not in numbers]  # type: ignore[arg-type]
        return jax.tree_util.register_dataclass(cls, list(numbers), others)

    return decorate


class Algorithm(Protocol):
    """A stochastic algorithm: settings, and two pure functions on a :class:`State`.

    It is a frozen dataclass, so that it can be hashed and equal algorithms are compiled once. If it is registered with
    ``jax.tree_util.register_dataclass``, with its numbers as data fields, algorithms that differ only in these numbers
    share one compiled program too.

    If the samples do not divide into equal batches, and a step evaluates no batches but those drawn for this same step,
    the class may declare ``evaluates_only_draws = True``. Its steps on small batches then need no branch for the
    smaller last batch, except the steps that draw it. If a step evaluates other batches in spite of the declaration,
    its numbers are wrong. A subclass has to repeat the declaration.

    Example:
        Move w and v on one inner batch, and θ on another one:

        >>> import bilevel as bl, jax.numpy as jnp
        >>> from dataclasses import dataclass, replace
        >>> from bilevel.stochastic.rates import descend
        >>> @dataclass(frozen=True)
        ... class Alternating:
        ...     rate: float
        ...     inner_batch: int = 1
        ...     outer_batch: int = 1
        ...     sampling: str = "with_replacement"
        ...     draws = (2, 1)  # a step draws two inner batches and one outer batch
        ...     def init(self, oracle, state):
        ...         return state
        ...     def step(self, oracle, state, draws):
        ...         outer = oracle.outer(draws.outer[0], state.w, state.theta)
        ...         terms = oracle.inner(draws.inner[0], state.w, state.adjoint, state.theta)
        ...         moves = oracle.average(bl.stochastic.directions(terms, outer))
        ...         w, adjoint = descend((state.w, state.adjoint), self.rate, (moves.w, moves.adjoint))
        ...         terms = oracle.inner(draws.inner[1], w, adjoint, state.theta)
        ...         moves = oracle.average(bl.stochastic.directions(terms, outer))
        ...         theta, optimizer = oracle.move_theta(self.rate, state, moves.theta)
        ...         return replace(state, w=w, adjoint=adjoint, theta=theta, optimizer=optimizer)
        >>> problem = bl.Problem(
        ...     bl.Stationary(lambda w, theta, x: 0.5 * jnp.mean((w - theta * x) ** 2)),
        ...     lambda w, theta, y: 0.5 * jnp.mean((w - y) ** 2),
        ... )
        >>> ones = jnp.ones(4)
        >>> found = bl.stochastic.minimize(problem, 0.0, 0.0, ones, 3 * ones, Alternating(0.2), steps=500)
        >>> round(float(found.theta), 3)
        3.0
    """

    @property
    def inner_batch(self) -> int:
        """Samples in an inner batch."""
        ...

    @property
    def outer_batch(self) -> int:
        """Samples in an outer batch."""
        ...

    @property
    def sampling(self) -> Sampling:
        """``"with_replacement"`` or ``"without_replacement"``."""
        ...

    @property
    def draws(self) -> tuple[int, int]:
        """The number of inner and of outer batches that a step draws."""
        ...

    def init(self, oracle: Oracle, state: State) -> State:
        """Return the first state: the given one with ``memory`` and ``tables``."""
        ...

    def step(self, oracle: Oracle, state: State, draws: Draws) -> State:
        """Return the state after a step. The loop itself advances ``state.step``."""
        ...
