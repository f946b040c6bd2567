"""The meta-step, a pure function: it draws tasks, calls :func:`imaml.meta_gradient` on them, and updates θ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imaml.learning.meta_gradient import MetaGradient, meta_gradient
from imaml.parallel.devices import AXIS, SHARED, SPREAD, global_mesh, over_tasks
from imaml.settings.parts import Outer
from imaml.settings.preset import Preset

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State of training between two meta-steps.

    Attributes:
        theta: the learned parameters θ.
        optimizer: the state of Adam.
        key: typed random key of the training tasks; it stays the same during a run.
        step: number of meta-steps done, an int32 scalar. Key and step together determine the next step's tasks.
    """

    theta: dict
    optimizer: Any
    key: jax.Array
    step: jax.Array


_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("value", "gradient", "accuracy", "tasks"), SHARED),
    **dict.fromkeys(("inner_residual", "linear_residual", "status"), SPREAD),
}
_LAYOUT = MetaGradient(**_FIELDS)
"""Sharding of a report. Means are equal on all devices. Arrays with one entry per task are spread over the devices."""


def optimizer(outer: Outer) -> "optax.GradientTransformation":
    """Return Adam (Kingma and Ba 2015) with the learning rate and ε of ``outer``.

    The rate is constant if ``final_fraction`` is 1. Otherwise it follows half a cosine from ``learning_rate`` to
    ``final_fraction * learning_rate`` over the run.
    """
    import optax  # Import on use: optax takes long to import, and some commands do not need it.

    rate = optax.cosine_decay_schedule(outer.learning_rate, outer.steps, alpha=outer.final_fraction)
    return optax.adam(rate, eps=outer.epsilon)


def initial_state(preset: Preset) -> TrainState:
    """Return the state before the first meta-step: θ drawn with the seed's key, and Adam's initial state."""

    @jax.jit  # One program for all operations compiles faster than one program for each.
    def drawn(keys):
        theta = preset.functions.init(keys.init)
        return TrainState(theta, optimizer(preset.outer).init(theta), keys.train, jnp.int32(0))

    return drawn(preset.keys)


def meta_step(preset: Preset, mesh: Mesh | None = None) -> Callable[[TrainState, Any], tuple[TrainState, MetaGradient]]:
    """Return the function of one meta-step: draw tasks, compute their mean meta-gradient, update θ by Adam.

    Args:
        preset: the settings.
        mesh: the devices that the tasks are spread over; by default the largest number of devices that divides the
            number of tasks.

    Returns:
        A pure function ``step(state, source) -> (state, report)``. ``source`` is the attribute ``source`` of the
        training classes, such as the pixels of :class:`.ImageClasses`; for curves it is the empty tuple. If no task has
        a usable gradient, θ and Adam's state stay unchanged.

    Source: Rajeswaran et al. (2019), algorithm 1, with Adam as the outer optimiser.
    """
    import optax

    outer, episode = preset.outer, preset.training_episode
    gradient = meta_gradient(preset.learner, axis=AXIS, at_once=outer.at_once)

    def on_each_device(fixed, keys):
        theta, source = fixed
        return gradient(theta, episode.batch(source, keys, preset.turns(training=True)))

    spread = over_tasks(on_each_device, mesh or global_mesh(outer.tasks), _LAYOUT)

    def step(state, source):
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), outer.tasks)
        report = spread((state.theta, source), keys)
        updates, memory = optimizer(outer).update(report.gradient, state.optimizer, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        usable = report.tasks > 0
        theta, memory = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old), (theta, memory), (state.theta, state.optimizer)
        )
        return TrainState(theta, memory, state.key, state.step + 1), report

    return step
