"""Use of a trained learner: adapt its parameters to a few labelled examples, and predict the labels of other examples.

By default, batch normalisation takes its mean and variance from the support set. The prediction for an image then does
not depend on the images that are predicted with it. The published protocol is transductive: it takes the mean and
variance of the images that are predicted together.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from imaml.errors import InputError, check
from imaml.learning.tasks import Task
from imaml.parallel.devices import SPREAD, local_mesh, on_all, over_tasks
from imaml.runs import examples, parameters
from imaml.runs.evaluation import check_types, preset_of, trained
from imaml.runs.examples import Labels
from imaml.runs.results import Run
from imaml.settings.preset import Preset

CHUNK = 32
"""Images in one call of the compiled network. The last chunk is padded, so one program serves any number of images."""


def load(
    run: str | Path | Run,
    preset: Preset | None = None,
    best: bool | None = None,
    on_event: Callable[[str], None] = warnings.warn,
) -> "TrainedLearner":
    """Return the learner that a run trained, with the preset it was trained with.

    The parameters have the same bits as those that were trained or saved.

    Args:
        run: a run's folder, a file that :meth:`TrainedLearner.save` or ``imaml export`` wrote, an :class:`imaml.Run`,
            or the name of a record whose parameters come with the package, such as
            ``"omniglot-5way-1shot-gd-320000-tasks"``. A folder or file of that name comes first.
        preset: the preset that the run was trained with. It is required for a file without a description of the
            preset, such as a safetensors file that another library wrote. It is also required if the preset has a type
            of your own, such as a network class, unless it is registered (:func:`imaml.register_preset`) or offered by
            an installed package. By default, the preset is restored from ``run``.
        best: which checkpoint of a folder to take, as in :func:`imaml.evaluate`. By default it is the one with the best
            validation or, in a run without validation, the last one.
        on_event: called with a message if that checkpoint is missing or damaged and another one is used.

    Raises:
        InputError: if there is no run or file, if it is damaged, if its preset cannot be restored or has other types
            than ``preset``, or if the arrays do not fit the network.
        OSError: if a file cannot be read.

    >>> import os, tempfile
    >>> import imaml
    >>> preset = imaml.preset("sinusoid-5shot-gd")
    >>> theta = preset.functions.init(preset.keys.init)  # a run trains these parameters
    >>> file = os.path.join(tempfile.mkdtemp(), "theta.npz")
    >>> imaml.TrainedLearner(theta, preset).save(file)
    >>> learner = imaml.load(file)
    >>> learner.preset.name, bool((learner.theta["layer0"]["kernel"] == theta["layer0"]["kernel"]).all())
    ('sinusoid-5shot-gd', True)
    """
    if isinstance(run, Run):
        check_types(run.directory, run.preset.types(), preset)
        recipe = getattr(run.dataset, "recipe", None)
        return TrainedLearner(run.theta, preset or run.preset, {"step": run.best_step or run.step, "source": recipe})
    path = parameters.place_of(run)
    description, named = read_trained(path, best, on_event)
    if description is not None:
        preset = preset_of(path, description, preset, "load")
    if preset is None:
        raise InputError(f"{path} does not name its preset: pass the preset as well, imaml.load(file, preset)")
    facts = {name: value for name, value in (description or {}).items() if name in parameters.FACTS}
    return TrainedLearner(parameters.restored(path, named, preset), preset, facts)


def read_trained(
    path: Path, best: bool | None, on_event: Callable[[str], None]
) -> tuple[dict[str, Any] | None, parameters.Named]:
    """Return the description of a run's folder or of a file of parameters, and θ as arrays with their names.

    Args:
        path: the folder or the file; see :func:`.parameters.place_of` for the name of a record.
        best, on_event: as in :func:`load`.

    Raises:
        InputError: if there is no run or file, or if it is damaged.
    """
    if path.is_dir() or path.suffix not in parameters.SUFFIXES:
        checkpoint = trained(path, best, on_event)
        return checkpoint.description, parameters.of_checkpoint(checkpoint)
    return parameters.read(path)


@dataclass(frozen=True, eq=False)
class TrainedLearner:
    """Trained parameters θ with the preset that they were trained with. :func:`load` returns one.

    Args:
        theta: the parameters, a pytree like those of the preset's network.
        preset: the preset. Adaptation takes as many inner steps as an evaluation with this preset.
        facts: facts about the training that :meth:`save` writes, such as the number of meta-steps.

    >>> import imaml
    >>> preset = imaml.preset("sinusoid-5shot-gd")
    >>> learner = imaml.TrainedLearner(preset.functions.init(preset.keys.init), preset)
    >>> adapted = learner.adapt([-2.0, -1.0, 0.0, 1.0, 2.0], [-0.9, -0.8, 0.0, 0.8, 0.9])
    >>> adapted.predict([0.5, 1.5]).shape
    (2,)
    """

    theta: Any = field(repr=False)
    preset: Preset
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    def adapt(self, support_x: Any, support_y: Sequence[Hashable] | Any) -> "Adapted":
        """Adapt θ to the labelled examples of one task.

        The number of examples of a class need not be the preset's, and may differ between classes. A new number of
        examples compiles a new program.

        Args:
            support_x: images ``[images, height, width]`` or ``[images, height, width, channels]``. uint8 is divided by
                255, and floats must lie in [0, 1]. For drawings the ink is 255 or 1 and the paper 0, as in the
                datasets. For a regression ``[points]`` or ``[points, 1]``.
            support_y: one label for each image, of any hashable type. Output i of the network is the class
                with the i-th distinct label. The labels are in ascending order, or in the order of their first
                appearance if they cannot be sorted. For a regression, the targets ``[points]`` or ``[points, 1]``.

        Raises:
            InputError: for examples of another shape, dtype or range, for a number of classes that is not the preset's,
                or if the inner steps diverge.
        """
        x, y, labels, flat = self._support(support_x, support_y, axes=1)
        solution = self._adapt_one(self.theta, x, y)
        self._check_finite(solution)
        return Adapted(self, solution, jnp.asarray(x), labels, flat)

    def adapt_tasks(self, support_x: Any, support_y: Sequence[Sequence[Hashable]] | Any) -> "Adapted":
        """Adapt θ to each of many tasks, in one compiled program.

        The tasks are divided among the devices of this process. A device works on ``preset.outer.at_once`` of them
        together.

        Args:
            support_x: as in :meth:`adapt`, with one more leading axis, ``[tasks, images, …]``.
            support_y: the labels of each task, ``[tasks][images]``. Every task has labels of its own. For a regression
                the targets ``[tasks, points]`` or ``[tasks, points, 1]``.

        Returns:
            An :class:`Adapted` whose methods take arrays with a leading axis of tasks, and return one result per task.

        Raises:
            InputError: as in :meth:`adapt`.
        """
        x, y, labels, flat = self._support(support_x, support_y, axes=2)
        mesh = local_mesh(len(x))
        solution = self._adapt_many(mesh)(on_all(self.theta, mesh), (x, y))
        self._check_finite(solution)
        return Adapted(self, solution, jnp.asarray(x), labels, flat, True)

    def save(self, path: str | Path) -> None:
        """Write θ and the preset to a file that :func:`load` reads. An existing file is replaced.

        The arrays have the names of the parameters, such as ``block0/kernel``. The file can be read without this
        package, by the safetensors library or by ``numpy.load``.

        Args:
            path: the file, ``NAME.safetensors`` or ``NAME.npz``.

        Raises:
            InputError: for another suffix, for a preset with a setting that cannot be saved, such as a lambda, or for
                parameters of a dtype that the format does not have.
            OSError: if the file cannot be written.
        """
        parameters.write(Path(path), self.theta, self.preset, self.facts)

    def _support(self, x, y, axes):
        """Return inputs, targets, the distinct labels or None, and whether the targets had no axis of outputs."""
        x = examples.inputs(x, self.preset, "support_x", axes)
        labels, flat = None, False
        if not self._classifies:
            y, flat = examples.targets(y, self.preset.episode.outputs, axes)
        elif axes == 1:
            labels, y = examples.classes(y, self.preset)
        else:
            y = np.asarray(y) if isinstance(y, jax.Array) else y  # iterating over an array of JAX copies each row
            pairs = [examples.classes(each, self.preset, f" of task {index}") for index, each in enumerate(y)]
            labels = [names for names, _ in pairs]
            check(len({len(each) for _, each in pairs}) == 1, "all tasks must have the same number of labels")
            y = np.stack([each for _, each in pairs])
        if x.shape[:axes] != y.shape[:axes]:
            raise InputError(
                f"support_x has {_shown(x.shape[:axes])} examples, but support_y has {_shown(y.shape[:axes])} labels: "
                "pass one label for each example"
            )
        return x, y, labels, flat

    def _check_finite(self, solution):
        broken = np.flatnonzero(np.atleast_1d(solution.status) == bl.Status.NONFINITE)
        if len(broken):
            which = (
                f" of {len(broken)} tasks, the first of which is task {broken[0]}," if np.ndim(solution.status) else ""
            )
            raise InputError(
                f"the adapted parameters{which} are not finite: the inner steps diverge on these examples, or θ is not "
                "finite"
            )

    @property
    def _classifies(self):
        return self.preset.episode.metric == "accuracy"

    @functools.cached_property
    def _one(self):
        """Return the function (θ, support_x, support_y) → solution of the inner problem of one task."""
        learner = self.preset.test_learner
        return lambda theta, x, y: learner.adapt(theta, Task(x, y, x, y))  # the query set is not used

    @functools.cached_property
    def _adapt_one(self):
        return jax.jit(self._one)

    @functools.cached_property
    def _adapt_many(self):
        return functools.cache(lambda mesh: self._mapped(lambda theta, task: self._one(theta, *task), mesh))

    @functools.cached_property
    def _outputs(self):
        """Return the functions (φ, support_x, x) → outputs, by whether they are transductive."""
        network = self.preset.functions
        with_support = network.apply_with_support_statistics

        def transductive(phi, support_x, x):
            return network.apply(phi, x)

        def inductive(phi, support_x, x):
            assert with_support is not None
            return with_support(phi, x, support_x)

        return {True: transductive, False: transductive if with_support is None else inductive}

    @functools.cached_property
    def _outputs_of_one(self):
        return functools.cache(lambda transductive: jax.jit(self._outputs[transductive]))

    @functools.cached_property
    def _outputs_of_many(self):
        def program(mesh, transductive):
            return self._mapped(lambda _, task: self._outputs[transductive](*task), mesh)

        return functools.cache(program)

    def _mapped(self, function, mesh):
        """Compile ``function(fixed, task)`` over tasks that are divided among the devices of ``mesh``."""
        together = self.preset.outer.at_once
        batch = {"batch_size": together} if together > 1 else {}

        def over_share(fixed, tasks):
            return jax.lax.map(lambda task: function(fixed, task), tasks, **batch)

        return jax.jit(over_tasks(over_share, mesh, SPREAD))


@dataclass(frozen=True, eq=False)
class Adapted:
    """Parameters φ that were adapted to one task, or to each of many tasks. :meth:`TrainedLearner.adapt` returns one.

    After :meth:`TrainedLearner.adapt_tasks`, every array has one more leading axis, ``[tasks, …]``, and ``labels`` is a
    list with the labels of each task.

    Attributes:
        learner: the learner that was adapted.
        solution: the solution of the inner problem, with ``w`` = φ and the norm of its residual.
        support_x: the converted support inputs, from which batch normalisation takes its statistics.
        labels: the distinct labels in the order of the columns of :meth:`probabilities`; None for a regression.
    """

    learner: TrainedLearner
    solution: bl.Solution = field(repr=False)
    support_x: jax.Array = field(repr=False)
    labels: Any
    _flat: bool = field(default=False, repr=False)
    _many: bool = field(default=False, repr=False)

    def predict(self, x: Any, transductive: bool = False) -> Any:
        """Return the label of each image, or the value at each point of a regression.

        After :meth:`TrainedLearner.adapt`, and unless ``transductive`` is set, examples are computed in chunks of
        :data:`CHUNK`, the last of which is padded. On a CPU, the outputs for an example then have the same bits,
        whether it is passed alone or with other examples. On other devices, the rounding of a product may depend on the
        position in a chunk.

        Args:
            x: images as in :meth:`TrainedLearner.adapt`, of the same shape as the support images; points for a
                regression.
            transductive: False for the statistics of the support set in batch normalisation: the label of an image then
                does not depend on the other images. True for the statistics of ``x``, as published. The
                choice makes no difference for a network without batch normalisation.

        Returns:
            The labels as they were given: an array if ``support_y`` was an array, otherwise a list. After
            ``adapt_tasks`` a list with the labels of each task. For a regression a float array, which has an axis of
            outputs if ``support_y`` had one.

        Raises:
            InputError: for examples of another shape, dtype or range, for another number of tasks than those that were
                adapted to, or if outputs of the network are not finite.
        """
        outputs = self._outputs(x, transductive)
        if self.labels is None:
            return outputs[..., 0] if self._flat else outputs
        chosen = outputs.argmax(-1)
        if self._many:
            return [_pick(labels, each) for labels, each in zip(self.labels, chosen, strict=True)]
        return _pick(self.labels, chosen)

    def probabilities(self, x: Any, transductive: bool = False) -> np.ndarray:
        """Return the probability of each class, ``[images, classes]``, with the classes in the order of ``labels``.

        The probabilities are the softmax of the network's outputs. They are not calibrated on held-out tasks.

        Args:
            x: images, as in :meth:`predict`.
            transductive: as in :meth:`predict`.

        Raises:
            InputError: for a regression, and as in :meth:`predict`.
        """
        check(self.labels is not None, f"{self.learner.preset.name} is a regression without classes: call predict")
        outputs = self._outputs(x, transductive)
        powers = np.exp(outputs - outputs.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def _outputs(self, x, transductive):
        learner, axes, phi = self.learner, 2 if self._many else 1, self.solution.w
        x = examples.inputs(x, learner.preset, "x", axes, self.support_x.shape[axes:])
        if self._many:
            tasks = len(self.support_x)
            check(len(x) == tasks, f"x has examples of {len(x)} tasks, but θ was adapted to {tasks}: pass {tasks}")
            mesh = local_mesh(tasks)
            return _finite(learner._outputs_of_many(mesh, bool(transductive))((), (phi, self.support_x, x)))
        network = learner._outputs_of_one(bool(transductive))
        if transductive:  # the statistics are those of x, so x is neither divided nor padded
            return _finite(network(phi, self.support_x, x))
        padding = -len(x) % CHUNK
        chunks = np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)]).reshape(-1, CHUNK, *x.shape[1:])
        outputs = [np.asarray(network(phi, self.support_x, chunk)) for chunk in chunks]
        return _finite(np.concatenate(outputs)[: len(x)])


def _finite(outputs):
    outputs = np.asarray(outputs)
    check(bool(np.isfinite(outputs).all()), "outputs of the adapted network are not finite: θ or φ is too large")
    return outputs


def _pick(labels: Labels, chosen):
    return labels[chosen] if isinstance(labels, np.ndarray) else [labels[index] for index in chosen]


def _shown(lengths):
    return "×".join(map(str, lengths))
