"""The tasks of an evaluation one by one: the outputs of the adapted network, and the classes of a task.

An evaluation keeps only the mean score over its tasks. This module computes the outputs for the same tasks, so that a
report can show which classes are taken for which.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.learning.tasks import Episode, Task
from imaml.parallel.devices import SPREAD, local_mesh, on_all, over_tasks
from imaml.runs.evaluation import keys_of
from imaml.settings.preset import Preset


@dataclass(frozen=True)
class Outcomes:
    """Outputs of the adapted networks on the query sets of the tasks of an evaluation.

    Attributes:
        outputs: float ``[tasks, examples, outputs]``, with the published normalisation, which takes the statistics of
            the query batch.
        targets: int ``[tasks, examples]``, the labels of the examples in their task. For a regression, float
            ``[tasks, examples, outputs]``.
        drawn: int ``[tasks, ways]``, the index of the class that has each label of a task. None for a regression, and
            for tasks of one's own whose classes are not known.
        support_outputs: like ``outputs``, with the statistics of the support set. None for a network without batch
            normalisation.
    """

    outputs: np.ndarray
    targets: np.ndarray
    drawn: np.ndarray | None
    support_outputs: np.ndarray | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the outputs, ``[tasks, examples, ways]``."""
        powers = np.exp(self.outputs - self.outputs.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    @property
    def predicted(self) -> np.ndarray:
        """The label with the largest output, ``[tasks, examples]``."""
        return self.outputs.argmax(-1)

    def confusion(self, classes: int | None = None) -> np.ndarray:
        """Count the examples by their true and their predicted label.

        Args:
            classes: None to count by the labels within a task, which are 0, 1, … in every task. To count by class
                instead, the number of classes of the data; ``drawn`` must not be None then.

        Returns:
            Integers ``[labels, labels]``: the row is the true label, and the column the predicted one.
        """
        true, predicted, size = self.targets, self.predicted, self.outputs.shape[-1]
        if classes is not None:
            assert self.drawn is not None
            true, predicted = (np.take_along_axis(self.drawn, labels, 1) for labels in (true, predicted))
            size = classes
        counts = np.zeros((size, size), int)
        np.add.at(counts, (true.ravel(), predicted.ravel()), 1)
        return counts


def outcomes(theta: Any, preset: Preset, classes: Any, tasks: int = 600) -> Outcomes:
    """Adapt θ to the tasks of an evaluation, and return the outputs on their query sets.

    The tasks are those of :func:`.evaluate_classes` with the same number of tasks.

    Args:
        theta: the parameters θ.
        preset: the settings.
        classes: the held-out classes, or the curves of a regression.
        tasks: number of tasks.
    """
    learner, episode, together = preset.test_learner, preset.episode, preset.outer.at_once
    with_support = preset.functions.apply_with_support_statistics

    def one(fixed, key):
        theta, source = fixed
        task = episode.sample(source, key, preset.turns(training=False))
        phi = learner.adapt(theta, task).w
        support = None if with_support is None else with_support(phi, task.query_x, task.support_x)
        return learner.apply(phi, task.query_x), task.query_y, support

    batch = {"batch_size": together} if together > 1 else {}
    mesh = local_mesh(tasks)
    spread = over_tasks(lambda fixed, keys: jax.lax.map(lambda key: one(fixed, key), keys, **batch), mesh, SPREAD)
    keys = keys_of(preset, classes, tasks)
    found = jax.jit(spread)(on_all((theta, classes.source), mesh), keys)
    outputs, targets, support_outputs = jax.tree.map(np.asarray, found)
    drawn = None
    if isinstance(episode, Episode) and type(episode).sample is Episode.sample:
        drawn = np.asarray(jax.vmap(lambda key: episode.drawn_classes(len(classes), key))(keys))
    return Outcomes(outputs, targets, drawn, support_outputs)


def task(preset: Preset, classes: Any, index: int, tasks: int = 600) -> Task:
    """Return the task with this index among those of :func:`outcomes`, as NumPy arrays."""
    key = keys_of(preset, classes, tasks)[index]
    drawn = preset.episode.sample(jax.tree.map(jnp.asarray, classes.source), key, preset.turns(training=False))
    return jax.tree.map(np.asarray, drawn)


def fit(theta: Any, preset: Preset, task: Task, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs at further points before and after the adaptation of θ to a task.

    Args:
        theta: the parameters θ.
        preset: the settings.
        task: the task.
        x: inputs of the same shape as those of the task, ``[points, ...]``.
    """
    learner = preset.test_learner
    program = jax.jit(lambda theta, task, x: (learner.apply(theta, x), learner.apply(learner.adapt(theta, task).w, x)))
    before, after = program(theta, jax.tree.map(jnp.asarray, task), jnp.asarray(x, task.query_x.dtype))
    return np.asarray(before), np.asarray(after)
