"""The meta-step: one pure, compiled program that draws its tasks, adapts, differentiates and updates θ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from imaml.learning.algorithms import MetaGradient, meta_gradient
from imaml.parallel.devices import AXIS, SHARED, SPREAD, global_mesh, over_tasks
from imaml.settings.parts import Outer
from imaml.settings.preset import Preset

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that one meta-step hands to the next.

    Attributes:
        theta: the parameters that are learned.
        optimizer: the state of Adam.
        key: of the training tasks, a typed key that stays the same.
        step: meta-steps done, an int32 scalar; with the key it decides the tasks of the next one.
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
"""Of a report, over the devices: means are equal on all of them, the tasks' own numbers are not."""


def optimizer(outer: Outer) -> "optax.GradientTransformation":
    """Adam (Kingma and Ba 2015) with the preset's rate, constant or along half a cosine."""
    import optax  # optax takes a while to import: only when it is used

    rate = optax.cosine_decay_schedule(outer.learning_rate, outer.steps, alpha=outer.final_fraction)
    return optax.adam(rate, eps=outer.epsilon)


def initial_state(preset: Preset) -> TrainState:
    """θ drawn by the seed, and an optimiser that has seen nothing."""

    @jax.jit  # one program, not one for each operation
    def drawn(keys):
        theta = preset.functions.init(keys.init)
        return TrainState(theta, optimizer(preset.outer).init(theta), keys.train, jnp.int32(0))

    return drawn(preset.keys)


def meta_step(preset: Preset, mesh: Mesh | None = None) -> Callable[[TrainState, Any], tuple[TrainState, MetaGradient]]:
    """One step of the outer loop: draw tasks, meta-gradient, Adam.

    Args:
        preset: the settings.
        mesh: over which tasks are spread; default: all devices, as far as their number divides the tasks.

    Returns:
        ``step(state, source) -> (state, report)``, pure; of images the source is the training classes' pixels, uint8
        ``[classes, samples, height, width, channels]``, of curves it is empty. Where no task's gradient counts θ and
        the optimiser stay as they are.
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
