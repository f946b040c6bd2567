"""One outer step as a pure function, and the compiled loop over such steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.methods.protocol import Method, first_warm_start
from bilevel.outer.records import History, OuterState
from bilevel.problem import Problem
from bilevel.solvers import InnerSolver, new_memory, resumed
from bilevel.start import Program
from bilevel.types import Hypergradient, PyTree, Status

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True)
class Setup:
    """The parts of a loop that are not arrays. Equal setups that can be hashed share one compiled loop.

    Attributes:
        program: the caller's start function in a loop without warm starts; None with warm starts, or without a start
            function.
    """

    problem: Problem
    solver: InnerSolver
    method: Method
    optimizer: "optax.GradientTransformation"
    warm_start: bool
    program: Program | None = None


def state_before(setup: Setup, theta: PyTree, w: PyTree) -> OuterState:
    """Return the state before the first step, from θ and the start of the inner solver."""
    memory = new_memory(setup.solver, w) if setup.warm_start else None
    warm_start = first_warm_start(setup.method, w, memory)
    return tree.strongly_typed(OuterState(theta, w, setup.optimizer.init(theta), warm_start, memory, jnp.int32(0)))


def outer_step(
    setup: Setup, state: OuterState, start: PyTree, data: PyTree, halt: jax.Array
) -> tuple[OuterState, History, Hypergradient]:
    """Take one outer step.

    Args:
        setup: the parts that are not arrays.
        state: the state before the step.
        start: without warm starts, the start of the inner solver, or the arrays that the start function captured. It
            is not used with warm starts.
        data: a batch.
        halt: whether a step with a failed status changes nothing and is not counted. Without ``halt``, a step with
            status NONFINITE, or whose gradient has a norm that overflows, is counted, and changes nothing else.

    Returns:
        the state after the step, its record, and the hypergradient.
    """
    import optax  # optax is slow to import, so it is imported when needed

    method, solver = setup.method, setup.solver

    def solve(theta: PyTree, w: PyTree, warm_start: PyTree, memory: PyTree) -> Hypergradient:
        if setup.warm_start:
            return method(setup.problem, resumed(solver, memory), theta, w, data, warm_start)
        return method(setup.problem, solver, theta, setup.program.bind(start) if setup.program else start, data, None)

    out = solve(state.theta, state.w, state.warm_start, state.memory)
    warm_start = out.warm_start
    if warm_start is None:
        warm_start = state.warm_start if out.linear is None else out.linear.solution
    memory = state.memory if out.inner.memory is None else out.inner.memory
    value_fn = _with_hypergradient(lambda theta: solve(theta, out.inner.w, warm_start, memory))
    update = optax.with_extra_args_support(setup.optimizer).update
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
        updates, optimizer = update(
            out.gradient, state.optimizer, state.theta, value=out.value, grad=out.gradient, value_fn=value_fn
        )
        theta = tree.with_others(optax.apply_updates(state.theta, updates), state.theta)
    size = tree.norm(out.gradient)
    halted = halt & (out.status > int(Status.ILL_CONDITIONED))
    sound = jnp.isfinite(size) & (out.status != int(Status.NONFINITE)) & ~halted
    after = OuterState(theta, out.inner.w, optimizer, warm_start, memory, state.step)
    after = jax.tree.map(partial(_new_if_sound, sound), after, state)
    after = replace(after, step=jnp.where(halted, state.step, state.step + 1))
    # A NaN from a compiled program would be an error under jax_debug_nans, so the host writes it into the history.
    linear = jnp.zeros_like(size) if out.linear is None else out.linear.relative_residual
    return after, History(out.value, size, out.inner.residual_norm, linear, out.status), out


def _new_if_sound(sound: jax.Array, new: Any, old: jax.Array) -> jax.Array:
    """Return ``new`` in the dtype of ``old`` if ``sound`` is True, so that the step changes the state, else ``old``.

    Without the cast, an integer array in the optimiser's state, such as the momentum of an integer leaf of θ, could
    become a float array.
    """
    new = jnp.asarray(new)
    return jnp.where(sound, new if new.dtype == old.dtype else new.astype(old.dtype), old)


def _with_hypergradient(solve: Callable[[PyTree], Hypergradient]) -> Callable[[PyTree], jax.Array]:
    """Return the outer value as a function of θ whose derivative is the hypergradient of the chosen method."""

    @jax.custom_vjp
    def value(theta: PyTree) -> jax.Array:
        return solve(theta).value

    def forwards(theta: PyTree) -> tuple[jax.Array, PyTree]:
        out = solve(theta)
        return out.value, out.gradient

    value.defvjp(forwards, lambda gradient, slope: (tree.scale(slope, gradient),))
    return lambda theta: value(theta)


@dataclass(frozen=True)
class Outline:
    """The properties of an outer step that its trace shows.

    Attributes:
        is_traced: whether a transformation of JAX traces its arguments, or arrays that its functions have captured.
        dtypes: the dtypes of the fields of its :class:`History`.
        solves_adjoint: whether its hypergradient has the report of a linear solve.
    """

    is_traced: bool
    dtypes: list[Any]
    solves_adjoint: bool


class CompiledLoop:
    """The compiled loop of a setup.

    Attributes:
        step: :func:`outer_step` of the setup, jitted.
        advance: ``advance(state, failed, start, data, steps, halt) -> (state, failed, rows, last)``. It takes up to
            ``steps`` steps on the same data. It takes none if ``failed`` is True, and stops at a failed step if
            ``halt`` is True. ``steps`` is traced, so that each value runs the same program and gives the same bits. The
            buffers of the state are donated. ``rows``, ``[capacity, 5]``, has the fields of :class:`History` for
            each step; the status is -1 in rows that were not reached. ``last`` is θ before the last step and the step's
            hypergradient. Without ``observe``, ``last`` is None, because each output of a compiled function costs the
            host a microsecond or two.
    """

    step: Callable[..., tuple[OuterState, History, Hypergradient]]
    advance: Callable[..., tuple[OuterState, jax.Array, jax.Array, tuple[PyTree, Hypergradient] | None]]

    def __init__(self, setup: Setup, capacity: int, observe: bool):
        self.step = jax.jit(partial(outer_step, setup))
        self.advance = jax.jit(partial(_advance, self.step, capacity, observe), donate_argnums=0)
        self._outlines: dict[Any, Outline] = {}

    def outline(self, *arguments: Any) -> Outline:
        """Return the outline of ``step(*arguments)``, cached by the arguments' types and the default float dtype."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple(map(jax.typeof, leaves)), jnp.result_type(float)
        arguments_are_traced = tree.is_traced(leaves)
        if key in self._outlines and not arguments_are_traced:
            return self._outlines[key]
        solves_adjoint = []

        def record(*arguments: Any) -> History:
            _, found, out = self.step(*arguments)
            solves_adjoint.append(out.linear is not None)
            return found

        # jit caches this trace of the step, so the compiled loop does not trace it again.
        traced = jax.make_jaxpr(record)(*arguments)
        is_traced = arguments_are_traced or tree.is_traced(traced.consts)
        found = Outline(is_traced, [leaf.dtype for leaf in traced.out_avals], solves_adjoint[0])
        if not is_traced:
            self._outlines[key] = found
        return found


_cached_loop = lru_cache(maxsize=64)(CompiledLoop)


def compiled_loop(setup: Setup, capacity: int, observe: bool) -> CompiledLoop:
    """Return the compiled loop of a setup, from a cache if the setup can be hashed."""
    try:
        return _cached_loop(setup, capacity, observe)
    except TypeError:  # a part cannot be hashed, for example because one of its fields is an array
        return CompiledLoop(setup, capacity, observe)


def _advance(
    step: Callable[..., tuple[OuterState, History, Hypergradient]],
    capacity: int,
    observe: bool,
    state: OuterState,
    failed: jax.Array,
    start: PyTree,
    data: PyTree,
    steps: jax.Array,
    halt: jax.Array,
) -> tuple[OuterState, jax.Array, jax.Array, tuple[PyTree, Hypergradient] | None]:
    structures = []

    def recorded(state: OuterState) -> Any:
        after, record, out = step(state, start, data, halt)
        failed = halt & (out.status > int(Status.ILL_CONDITIONED))
        row = jnp.stack(jax.tree.leaves(tree.widened(record)))
        # The last step is carried as leaves. eval_shape would rebuild a tree with types in place of arrays, which a
        # pytree class of the user may refuse.
        last, structure = jax.tree.flatten((state.theta, out) if observe else None)
        structures.append(structure)
        return tree.strongly_typed((after, failed, row, last))

    def unfinished(carry: Any) -> jax.Array:
        _, failed, _, taken, _ = carry
        return (taken < steps) & ~failed

    def advance(carry: Any) -> Any:
        state, _, rows, taken, _ = carry
        after, failed, row, last = recorded(state)
        return after, failed, rows.at[taken].set(row), taken + 1, last

    # jit caches this trace of the step, so the loop below does not trace it again.
    row, last = jax.eval_shape(lambda state: recorded(state)[2:], state)
    nothing = [jax.lax.full_like(leaf, 0) for leaf in last]
    rows = jnp.full((capacity, row.size), -1, row.dtype)
    state, failed, rows, _, last = jax.lax.while_loop(unfinished, advance, (state, failed, rows, jnp.int32(0), nothing))
    return state, failed, rows, jax.tree.unflatten(structures[0], last)
