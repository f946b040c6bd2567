"""The paper's protocol: accuracy, or error, over many held-out tasks, with the interval of their mean.

Batch normalisation may see the whole query batch, as published: a query image's class is then judged with the help of
the other query images. Or it takes mean and variance of the support set alone. Every evaluation says which.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml import datasets
from imaml.errors import InputError
from imaml.parallel.devices import SPREAD, local_mesh, on_all, over_tasks
from imaml.runs import checkpoints
from imaml.runs.meta_step import initial_state
from imaml.runs.results import NO_NORMALISATION, QUERY_BATCH, SUPPORT_SET, Evaluation, Run
from imaml.settings.preset import Preset
from imaml.settings.published_presets import restore


def evaluate(
    run: str | Path | Run | dict,
    preset: Preset | None = None,
    tasks: int = 600,
    data: str | Path | None = None,
    best: bool = False,
    on_event: Callable[[str], None] = warnings.warn,
) -> Evaluation:
    """Accuracy on the held-out classes, by the protocol of the paper: 600 tasks, as many queries as shots.

    Where the network normalises over batches the same tasks are judged twice: with the query batch, as published, and
    ``beside`` that with the support set's statistics. Of a regression it is the mean squared error.

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


def trained(
    directory: Path, best: bool = False, on_event: Callable[[str], None] = warnings.warn
) -> checkpoints.Checkpoint:
    """The last whole checkpoint in a run's folder, or the best one; InputError where there is none."""
    if best:
        found = checkpoints.best(directory)
    else:
        found = checkpoints.newest(directory, lambda _, message: on_event(f"{message}; the one before is taken"))
    if found is None:
        raise InputError(f"there is no run in {directory}: it holds no whole checkpoint")
    return found


def _restore(directory, preset, best, on_event):
    """The preset and θ of a checkpoint in a folder, and the fingerprint of the data it was trained on."""
    found = trained(directory, best, on_event)
    description = found.description
    preset = preset or restore(description["preset"], description["config"])
    fingerprint = description["data"] if preset.dataset == description["config"]["dataset"] else None
    return preset, found.restore(initial_state(preset)).theta, fingerprint


def evaluate_classes(theta: dict, preset: Preset, classes: Any, tasks: int) -> Evaluation:
    """θ on ``tasks`` tasks drawn from ``classes``, or curves, by the preset's seed.

    Raises:
        InputError: where the classes cannot fill a task, or for fewer than two tasks.
    """
    preset.episode.check(classes, preset.dataset)
    if tasks < 2:
        raise InputError(f"an interval needs at least 2 tasks, got {tasks}")
    mesh = local_mesh(tasks)
    spread = over_tasks(task_scores(preset), mesh, SPREAD)
    keys = jax.random.split(preset.keys.test, tasks)
    scores = np.asarray(jax.jit(spread)(on_all((theta, classes.source), mesh), keys))
    means, intervals = scores.mean(0), 1.96 * scores.std(0, ddof=1) / np.sqrt(tasks)
    found = zip(normalisations(preset), means, intervals, strict=True)
    metric, chance = preset.episode.metric, preset.episode.chance
    published, *others = (
        Evaluation(metric, float(mean), float(interval), chance, tasks, name) for name, mean, interval in found
    )
    return replace(published, beside=next(iter(others), None))


def normalisations(preset: Preset) -> tuple[str, ...]:
    """What a preset is evaluated with, the published protocol first."""
    return (NO_NORMALISATION,) if preset.functions.apply_beside is None else (QUERY_BATCH, SUPPORT_SET)


def task_scores(preset: Preset) -> Callable[[tuple[dict, Any], jax.Array], jax.Array]:
    """``scores((theta, source), keys [tasks]) -> float32 [tasks, normalisations]``: adapt to each task, and judge."""
    learner, beside, together = preset.test_learner, preset.functions.apply_beside, preset.outer.at_once

    def score(outputs, y):
        if preset.episode.metric == "accuracy":
            return (outputs.argmax(-1) == y).mean(dtype=jnp.float32)
        return jnp.square(outputs - y).mean(dtype=jnp.float32)

    def scores(theta, source, key):
        task = preset.episode.sample(source, key, preset.turns(training=False))
        phi = learner.adapt(theta, task).w
        outputs = [learner.apply(phi, task.query_x)]
        if beside is not None:
            outputs.append(beside(phi, task.query_x, task.support_x))
        return jnp.stack([score(each, task.query_y) for each in outputs])

    batch = {"batch_size": together} if together > 1 else {}
    return lambda fixed, keys: jax.lax.map(lambda key: scores(*fixed, key), keys, **batch)
