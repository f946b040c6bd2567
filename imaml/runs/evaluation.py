"""Evaluation as in the paper: the mean accuracy or error over many held-out tasks, with a 95 % interval of the mean.

Batch normalisation computes mean and variance either from the query batch, as published, or from the support set alone.
With the query batch, the prediction for a query image depends on the other query images. Every :class:`Evaluation`
states which of the two was used.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.datasets import Dataset
from imaml.datasets.omniglot_alphabets import is_other_split
from imaml.errors import InputError, check_choice
from imaml.parallel.devices import SPREAD, local_mesh, on_all, over_tasks
from imaml.runs import checkpoints, parameters
from imaml.runs import data as run_data
from imaml.runs.folder import differences
from imaml.runs.meta_step import initial_state
from imaml.runs.results import NO_NORMALISATION, QUERY_BATCH, SUPPORT_SET, Evaluation, Run
from imaml.settings.preset import Preset
from imaml.settings.published_presets import restore

_OTHER_GLYPHS = (
    "The glyphs of version 0.1 differ between versions of matplotlib. Since version 0.2, a run keeps a copy of its "
    "glyphs; for an earlier run, install the matplotlib that it was trained with, and version 0.1 of this package"
)


def evaluate(
    run: str | Path | Run | Any,
    preset: Preset | None = None,
    tasks: int = 600,
    data: str | Path | None = None,
    best: bool | None = None,
    on_event: Callable[[str], None] = warnings.warn,
    *,
    dataset: str | Dataset | None = None,
    part: str = "test",
) -> Evaluation:
    """Evaluate a run on held-out tasks, by default on 600 as in the paper.

    A run of glyphs is evaluated on the copy of them in its folder, even if this version of the package draws others.
    For a run on one's own folder of images, or on a registered dataset, the data are read again. The evaluation is
    refused if they have changed, because their held-out classes may then include training classes of the run.

    The result is the mean accuracy, or the mean squared error of a regression. If the network has batch normalisation,
    the same tasks are evaluated twice: the result uses the statistics of the query batch, as published, and its field
    ``beside`` uses those of the support set.

    Args:
        run: a run's folder, a :class:`imaml.Run`, or parameters θ, a pytree of arrays.
        preset: the settings. They are required with θ. They are also required for a folder whose run has settings of
            types that neither this package nor a registered preset of the same name has, such as a network class of
            your own. Otherwise the default is the run's settings. The preset and its components, such as ``network``,
            must have the types that the run was trained with. With θ, any types are accepted.
        tasks: number of tasks, at least 2.
        data: the folder of the dataset's files, for a dataset that is read from files. For a run on a folder of images
            that has been moved, this is the new place of the folder.
        best: which checkpoint of a folder to take. True for the one with the best validation or, in a run without
            validation, with the least loss on training classes. False for the last one. None for the one with the best
            validation or, in a run without validation, the last one.
        on_event: called with a message if the checkpoint is missing or damaged and another one is used, if the copy of
            the glyphs is damaged, if outputs of the network are not finite, or if classes have too few images and are
            left out.
        dataset: one's own data, as in :func:`imaml.train`. It is required for a folder whose run was trained on an
            object that cannot be read again. A dataset of another name than in training may have any contents, but a
            run on ``omniglot`` is not evaluated on ``omniglot-alphabets``, and the other way round.
        part: ``"test"`` or ``"validation"``. Choose settings by the validation classes, and keep the test classes for
            the result.

    Raises:
        InputError: for a folder without an intact checkpoint, for settings that cannot be restored or have other types,
            for data that cannot be used, for θ without a preset, for fewer than 2 tasks, or for a part that the dataset
            does not have. If ``run`` is a folder, or a :class:`imaml.Run` on one's own data, also if the dataset has
            the same name as in training but other contents. For a folder or a :class:`imaml.Run`, also if it was
            trained on another split of Omniglot's characters.

    Source: Rajeswaran et al. (2019), table 2.
    """
    theta, preset, classes = resolved(run, preset, data, best, on_event, dataset, part)
    return evaluate_classes(theta, preset, classes, tasks, on_event, part)


def resolved(
    run: str | Path | Run | Any,
    preset: Preset | None,
    data: str | Path | None,
    best: bool | None,
    on_event: Callable[[str], None],
    dataset: str | Dataset | None,
    part: str,
) -> tuple[Any, Preset, Any]:
    """Return the parameters θ, the preset and the classes that the arguments of :func:`evaluate` mean.

    Raises:
        InputError: as :func:`evaluate` does.
    """
    check_choice("part of a dataset", part, ("test", "validation"))
    theta: Any = run
    directory = source = None
    trained_on: dict[str, str] = {}
    trained_name = ""
    if isinstance(run, str | Path):
        directory = Path(run)
        preset, theta, trained_on, source = _restore(directory, preset, best, on_event)
        (trained_name,) = trained_on
    elif isinstance(run, Run):
        directory, theta, trained_name = run.directory, run.theta, run.preset.dataset
        check_types(directory, run.preset.types(), preset)
        preset = preset or run.preset
        if run.dataset is not None:
            trained_on = {run.dataset.name: run.dataset.fingerprint()}
            dataset = run.dataset if dataset is None and data is None else dataset
    if preset is None:
        raise InputError("parameters alone do not determine the settings: pass the preset as well")
    if source is not None and dataset is None:
        present = run_data.read_again(directory, source, data)
        preset = replace(preset, dataset=present.name)
    else:
        preset, present, source = run_data.choose(preset, data, dataset, directory, on_warning=on_event)
    _check_same_split(directory, trained_name, preset.dataset)
    if (fingerprint := trained_on.get(preset.dataset)) is not None:
        check_same_data(run, preset.dataset, present.fingerprint(), fingerprint, (source or {}).get("directory"))
    return theta, preset, run_data.usable(preset, present, part, on_event)


def _check_same_split(run, trained_on, present):
    """Raise InputError if a run on one split of Omniglot would be evaluated on another split of it."""
    if is_other_split(trained_on, present):
        raise InputError(
            f"{run} was trained on {trained_on}, and {present} splits the same characters in another way: many "
            f"characters that {present} holds out were training characters of the run. Evaluate the run on "
            f"{trained_on}, or train a new run on {present}"
        )


def check_same_data(run: object, dataset_name: str, present: str, trained_on: str, place: str | None = None) -> None:
    """Raise InputError if a run was trained on other data than the present ones.

    Args:
        run: the run's folder or name, for the message.
        dataset_name: the name of the dataset.
        present: the fingerprint of the present data.
        trained_on: the fingerprint of the data that the run was trained on.
        place: the folder from which the present data were read, if they are one's own.
    """
    if present != trained_on:
        remedy = _OTHER_GLYPHS if dataset_name == run_data.KEPT else ""
        remedy = f"Restore the files in {place}, or train a new run on the present ones" if place else remedy
        raise InputError(
            f"{run} was trained on other data than the present {dataset_name} data, whose held-out classes may "
            f"include training classes of the run. {remedy}".rstrip()
        )


def trained(
    directory: Path, best: bool | None = None, on_event: Callable[[str], None] = warnings.warn
) -> checkpoints.Checkpoint:
    """Return a checkpoint of a run's folder.

    Args:
        directory: the run's folder.
        best: which checkpoint to return, as in :func:`evaluate`.
        on_event: called with a message if that checkpoint is missing or damaged and another one is returned.

    Raises:
        InputError: if there is no intact checkpoint.
    """
    found = checkpoints.newest(directory, lambda _, message: on_event(f"{message}; an older checkpoint is used"))
    if found is None:
        is_record = str(directory) in parameters.names()
        hint = f"; imaml evaluate --record {directory} evaluates the record of this name" if is_record else ""
        raise InputError(f"there is no run in {directory}: it holds no intact checkpoint{hint}")
    validated = found.description.get("validation", {}).get("step", 0)
    if best is False or not (best or validated):
        return found
    chosen = checkpoints.best(directory) or found
    if validated and chosen.step != validated:
        on_event(
            f"the checkpoint after meta-step {validated}, which had the best validation, is missing or damaged; the "
            f"one after meta-step {chosen.step} is used"
        )
    return chosen


def _restore(directory, preset, best, on_event):
    """Return the preset, θ, the dataset's fingerprint by its name, and the source of one's own data."""
    found = trained(directory, best, on_event)
    description = found.description
    preset = preset_of(directory, description, preset)
    trained_on = {description["config"]["dataset"]: description["data"]}
    return preset, found.restore(initial_state(preset)).theta, trained_on, description.get("source")


def preset_of(where: Path, description: dict[str, Any], given: Preset | None = None, call: str = "evaluate") -> Preset:
    """Return the preset that a checkpoint or a file of trained parameters describes.

    Args:
        where: the run's folder or the file, for messages.
        description: the description in the file, with ``preset``, ``config`` and ``types``. Earlier versions did not
            save ``types``.
        given: the preset that a user passed, which is returned if it and its components have the saved types.
        call: the function of :mod:`imaml` that takes the preset, for the message.

    Raises:
        InputError: if ``given`` or one of its components has another type, or if nothing is given and the preset
            cannot be restored.
    """
    types = description.get("types")
    if types is not None:
        check_types(where, types, given)
    try:
        return given or restore(description["preset"], description["config"], types)
    except InputError as error:
        raise InputError(
            f"the settings of {where} cannot be restored: {error}. In Python, pass the preset that it was trained "
            f"with: imaml.{call}(run, preset)"
        ) from error


def check_types(where: Path, saved: dict[str, str], preset: Preset | None) -> None:
    """Raise InputError if ``preset`` is given, and it or a component has another type than the one saved with a run.

    Args:
        where: the run's folder or a file of trained parameters, for the message.
        saved: the saved result of :meth:`Preset.types`.
        preset: the preset that a user passed, or None.
    """
    if preset is not None and (found := differences(saved, preset.types())):
        raise InputError(
            f"{where} was trained with other types than the given preset and its components have "
            f"({'; '.join(found)}): pass the preset that it was trained with. To evaluate its parameters with the "
            "given preset, pass the parameters instead of the run: imaml.evaluate(theta, preset)"
        )


def evaluate_classes(
    theta: Any,
    preset: Preset,
    classes: Any,
    tasks: int,
    on_event: Callable[[str], None] = warnings.warn,
    part: str = "test",
) -> Evaluation:
    """Evaluate θ on tasks drawn from ``classes``, with the random key of the preset's seed.

    Args:
        theta: the parameters θ.
        preset: the settings.
        classes: images by class (:class:`imaml.datasets.images.ImageClasses`), or the curves of a regression.
        tasks: number of tasks, at least 2.
        on_event: called with a message if the outputs of a task are not finite. The mean is then NaN.
        part: the part of the dataset that ``classes`` is.

    Raises:
        InputError: if the classes cannot fill a task, or for fewer than 2 tasks.
    """
    check_tasks(preset, classes, tasks)
    means, intervals = mean_scores(scores_of(preset, classes, tasks)(theta), on_event)
    found = zip(normalisations(preset), means, intervals, strict=True)
    metric, chance = preset.episode.metric, preset.episode.chance
    published, *others = (
        Evaluation(metric, float(mean), float(interval), chance, tasks, name, part=part)
        for name, mean, interval in found
    )
    return replace(published, beside=next(iter(others), None))


def check_tasks(preset: Preset, classes: Any, tasks: int) -> None:
    """Raise InputError if the classes cannot fill a task, or for fewer than 2 tasks."""
    preset.episode.check(classes, preset.dataset)
    if tasks < 2:
        raise InputError(f"a confidence interval needs at least 2 tasks, got {tasks}")


def scores_of(preset: Preset, classes: Any, tasks: int) -> Callable[[Any], np.ndarray]:
    """Return a compiled function from θ to the scores of tasks that are drawn from ``classes``.

    Args:
        preset: the settings.
        classes: images by class, or the curves of a regression. If they have an integer attribute ``stream``, the
            tasks depend on it. Parts with the same contents, such as those of the sinusoids, differ in ``stream``.
        tasks: number of tasks, at least 2.

    Returns:
        A function that returns float32 ``[tasks, normalisations]``; see :func:`task_scores`.
    """
    mesh = local_mesh(tasks)
    program = jax.jit(over_tasks(task_scores(preset), mesh, SPREAD))
    keys, source = keys_of(preset, classes, tasks), on_all(classes.source, mesh)
    return lambda theta: np.asarray(program((on_all(theta, mesh), source), keys))


def keys_of(preset: Preset, classes: Any, tasks: int) -> jax.Array:
    """Return the random keys of the tasks of an evaluation; for ``classes`` see :func:`scores_of`."""
    stream = getattr(classes, "stream", 0)
    return jax.random.split(jax.random.fold_in(preset.keys.test, stream) if stream else preset.keys.test, tasks)


def mean_scores(scores: np.ndarray, on_event: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of the scores of tasks, and half the widths of their 95 % intervals.

    Args:
        scores: float32 ``[tasks, normalisations]``.
        on_event: called with a message if the outputs of a task were not finite. The mean is then NaN.
    """
    tasks = len(scores)
    if broken := int((~np.isfinite(scores)).any(1).sum()):
        on_event(
            f"the outputs of {broken} of {tasks} tasks are not finite, so the mean is NaN: the parameters or the data "
            "contain numbers that are not finite, or the inner steps diverge"
        )
    return scores.mean(0), 1.96 * scores.std(0, ddof=1) / np.sqrt(tasks)


def normalisations(preset: Preset) -> tuple[str, ...]:
    """Return the batch-normalisation statistics that a preset is evaluated with, the published ones first."""
    return (NO_NORMALISATION,) if preset.functions.apply_with_support_statistics is None else (QUERY_BATCH, SUPPORT_SET)


def task_scores(preset: Preset) -> Callable[[tuple[dict, Any], jax.Array], jax.Array]:
    """Return a function that adapts θ to each task and scores the query set.

    Its signature is ``scores((theta, source), keys) -> float32 [tasks, normalisations]``, with ``keys`` of shape
    ``[tasks]``. A score is an accuracy in [0, 1], or a mean squared error. The accuracy of outputs that are not finite
    is NaN. There is one column for each entry of :func:`normalisations`.
    """
    learner, with_support, together = (
        preset.test_learner,
        preset.functions.apply_with_support_statistics,
        preset.outer.at_once,
    )

    def score(outputs, y):
        if preset.episode.metric == "accuracy":  # argmax of NaN is an index like any other, and would count as a guess
            correct = (outputs.argmax(-1) == y).mean(dtype=jnp.float32)
            return jnp.where(jnp.isfinite(outputs).all(), correct, jnp.nan)
        return jnp.square(outputs - y).mean(dtype=jnp.float32)

    def scores(theta, source, key):
        task = preset.episode.sample(source, key, preset.turns(training=False))
        phi = learner.adapt(theta, task).w
        outputs = [learner.apply(phi, task.query_x)]
        if with_support is not None:
            outputs.append(with_support(phi, task.query_x, task.support_x))
        return jnp.stack([score(each, task.query_y) for each in outputs])

    batch = {"batch_size": together} if together > 1 else {}
    return lambda fixed, keys: jax.lax.map(lambda key: scores(*fixed, key), keys, **batch)
