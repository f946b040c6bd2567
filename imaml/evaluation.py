"""The paper's protocol: accuracy over many held-out tasks, with the interval of their mean."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml import checkpoints, datasets
from imaml.datasets.images import ImageClasses
from imaml.devices import SPREAD, local_mesh, on_all, over_tasks
from imaml.errors import InputError
from imaml.meta_step import initial_state
from imaml.presets import Preset, restore

if TYPE_CHECKING:
    from imaml.training import Run


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on the query images of tasks from held-out classes.

    Attributes:
        accuracy: mean over tasks, in [0, 1].
        interval: half the width of its 95 % interval, 1.96 · standard deviation / √tasks.
        chance: what guessing reaches, 1 / ways.
        tasks: how many tasks.
        normalisation: which images batch normalisation saw when it judged the query set.
    """

    accuracy: float
    interval: float
    chance: float
    tasks: int
    normalisation: str = "query batch, as published (transductive)"

    def __str__(self) -> str:
        return (
            f"test accuracy {self.accuracy:.2%} ± {self.interval:.2%} on {self.tasks} tasks of held-out classes "
            f"(chance {self.chance:.0%}); batch normalisation over the {self.normalisation}"
        )


def evaluate(
    run: "str | Path | Run | dict",
    preset: Preset | None = None,
    tasks: int = 600,
    data: str | Path | None = None,
    best: bool = False,
    on_event: Callable[[str], None] = warnings.warn,
) -> Evaluation:
    """Accuracy on the held-out classes, by the protocol of the paper: 600 tasks, as many queries as shots.

    Args:
        run: a run's folder, a :class:`imaml.Run`, or parameters θ.
        preset: the settings; needed with θ, and otherwise the run's own by default.
        tasks: how many.
        data: the folder of the dataset's archives, for a dataset that is not embedded.
        best: of a folder, the whole checkpoint with the least loss on training classes instead of the last one.
        on_event: told where the last checkpoint is damaged and the one before is taken.

    Raises:
        InputError: for a folder without a whole checkpoint, data that cannot be used or are not those the run
            was trained on, or θ without a preset.
    """
    theta: Any = run
    fingerprint = None
    if isinstance(run, str | Path):
        preset, theta, fingerprint = _restore(Path(run), preset, best, on_event)
    elif not isinstance(run, dict):
        preset, theta = preset or run.preset, run.theta
    if preset is None:
        raise InputError("parameters alone do not say what they are for: pass the preset as well")
    dataset = datasets.load(preset.dataset, data)
    if fingerprint not in (None, dataset.fingerprint()):
        raise InputError(
            f"{run} was trained on other data than this {preset.dataset}, so its held-out classes may be among those "
            "it was trained on; glyphs differ between versions of matplotlib"
        )
    return evaluate_classes(theta, preset, dataset.test, tasks)


def _restore(directory, preset, best, on_event):
    """The preset and θ of a checkpoint in a folder, and the fingerprint of the data it was trained on."""
    if best:
        found = checkpoints.best(directory)
    else:
        found = checkpoints.newest(directory, lambda _, message: on_event(f"{message}; the one before is taken"))
    if found is None:
        raise InputError(f"there is no run in {directory}: it holds no whole checkpoint")
    description = found.description
    preset = preset or restore(description["preset"], description["config"])
    fingerprint = description["data"] if preset.dataset == description["config"]["dataset"] else None
    return preset, found.restore(initial_state(preset)).theta, fingerprint


def evaluate_classes(theta: dict, preset: Preset, classes: ImageClasses, tasks: int) -> Evaluation:
    """Accuracy of θ on ``tasks`` tasks drawn from ``classes`` by the preset's seed.

    Raises:
        InputError: where the classes cannot fill a task, or for fewer than two tasks.
    """
    preset.episode.check(classes, preset.dataset)
    if tasks < 2:
        raise InputError(f"an interval needs at least 2 tasks, got {tasks}")
    mesh = local_mesh(tasks)
    spread = over_tasks(task_accuracies(preset), mesh, SPREAD)
    keys = jax.random.split(preset.keys.test, tasks)
    accuracies = np.asarray(jax.jit(spread)(on_all((theta, classes.pixels), mesh), keys))
    interval = 1.96 * accuracies.std(ddof=1) / np.sqrt(tasks)
    return Evaluation(float(accuracies.mean()), float(interval), 1 / preset.episode.ways, tasks)


def task_accuracies(preset: Preset) -> Callable[[tuple[dict, jax.Array], jax.Array], jax.Array]:
    """``accuracies((theta, pixels), keys [tasks]) -> float32 [tasks]``: adapt to each task's support set, judge."""
    learner = preset.learner

    def accuracy(theta, pixels, key):
        task = preset.episode.sample(pixels, key, preset.rotations.test)
        outputs = learner.apply(learner.adapt(theta, task).w, task.query_x)
        return (outputs.argmax(-1) == task.query_y).mean(dtype=jnp.float32)

    return lambda fixed, keys: jax.lax.map(lambda key: accuracy(*fixed, key), keys)
