"""Diagnosis of a learner: a comparison with classifiers on its features without adaptation, and its calibration."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.datasets import Dataset
from imaml.errors import check
from imaml.parallel.devices import SPREAD, local_mesh, on_all, over_tasks
from imaml.runs.evaluation import check_tasks, keys_of, mean_scores, normalisations, resolved
from imaml.runs.results import Evaluation, Run
from imaml.settings.preset import Preset

BINS = 15
"""Number of bins of the confidence, as in Guo et al. (2017)."""
PROBE_STEPS = 200
"""Steps of the fit of the linear probe."""


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence, the largest probability, lies in an interval.

    Attributes:
        low: lower end of the interval, which does not belong to it.
        high: upper end of the interval, which belongs to it.
        count: number of predictions.
        confidence: their mean confidence; NaN if there are none.
        accuracy: the fraction of them that are right; NaN if there are none.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How well probabilities agree with frequencies.

    Attributes:
        expected_error: the expected calibration error, Σ over bins of |accuracy − confidence| · count / examples.
        negative_log_likelihood: mean of −log of the probability of the right class, in nats.
        bins: :data:`BINS` equal intervals of the confidence from 0 to 1, the data of a reliability diagram.
        examples: number of predictions.

    Source: Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017.
    """

    expected_error: float
    negative_log_likelihood: float
    bins: tuple[Bin, ...] = field(repr=False)
    examples: int


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`.

    Attributes:
        adapted: accuracy of the adapted network, the same as that of :func:`imaml.evaluate`.
        nearest_mean: accuracy of assigning each query image to the class whose support images have the nearest mean.
            The distance is Euclidean, in the features of the trained θ without adaptation. None if the network has no
            function ``features``.
        linear_probe: accuracy of logistic regression on the same features, fitted to the support images. As in
            scikit-learn by default, it minimises the sum of the losses plus ½‖weights‖². None if the network has no
            function ``features``.
        calibration: calibration of the probabilities of the adapted network, over all query images of all tasks.
        beside: the diagnosis with the support set's statistics in batch normalisation. None for a network without batch
            normalisation, and in the diagnosis that is itself ``beside`` another one.
    """

    adapted: Evaluation
    nearest_mean: Evaluation | None
    linear_probe: Evaluation | None
    calibration: Calibration
    beside: "Diagnosis | None" = None

    def record(self) -> dict[str, Any]:
        """Return the diagnosis as a dictionary of JSON types. NaN, such as the mean of an empty bin, becomes None."""
        return _without_nan(asdict(self))

    def __str__(self) -> str:
        rows = {"adapted": self.adapted, "nearest mean": self.nearest_mean, "linear probe": self.linear_probe}
        lines = [f"statistics of batch normalisation: {self.adapted.normalisation}"]
        lines += [f"  {name:<14}{row.value:.2%} ± {row.interval:.2%}" for name, row in rows.items() if row is not None]
        lines.append(
            f"  expected calibration error {self.calibration.expected_error:.2%}, negative log-likelihood "
            f"{self.calibration.negative_log_likelihood:.3f} nats"
        )
        return "\n".join(lines + ([] if self.beside is None else [str(self.beside)]))


def diagnose(
    run: str | Path | Run | Any,
    preset: Preset | None = None,
    tasks: int = 600,
    data: str | Path | None = None,
    best: bool | None = None,
    on_event: Callable[[str], None] = warnings.warn,
    *,
    dataset: str | Dataset | None = None,
    part: str = "test",
) -> Diagnosis:
    """Compare a learner with simple classifiers on its own features, and measure the calibration of its probabilities.

    The tasks are those of :func:`imaml.evaluate`. If the nearest mean or the linear probe is as accurate as the adapted
    network, then the adaptation adds nothing to the features of θ.

    Args:
        run, preset, tasks, data, best, on_event, dataset, part: as in :func:`imaml.evaluate`.

    Raises:
        InputError: for a regression, and as :func:`imaml.evaluate` does.

    ``found = imaml.diagnose("runs/glyphs-5way-1shot-gd")`` compares the run of the default preset. ``print(found)``
    prints accuracies and calibration for both kinds of statistics, and ``found.calibration.bins`` has the data of a
    reliability diagram.
    """
    theta, preset, classes = resolved(run, preset, data, best, on_event, dataset, part)
    check(preset.episode.metric == "accuracy", f"{preset.name} is a regression: its outputs are no probabilities")
    check_tasks(preset, classes, tasks)
    mesh = local_mesh(tasks)
    program = jax.jit(over_tasks(_task_outputs(preset), mesh, SPREAD))
    outputs = program((on_all(theta, mesh), on_all(classes.source, mesh)), keys_of(preset, classes, tasks))
    labels, *each = jax.tree.map(np.asarray, outputs)
    found = None
    for name, (logits, nearest, probed) in reversed(list(zip(normalisations(preset), each, strict=True))):
        broken = ~np.isfinite(logits).all((1, 2))
        right = np.where(broken[:, None], np.nan, logits.argmax(-1) == labels).mean(1)
        columns = [right] + [(guess == labels).mean(1) for guess in (nearest, probed) if guess is not None]
        means, intervals = mean_scores(np.stack(columns, 1).astype(np.float32), on_event)
        chance = preset.episode.chance
        rows = [
            Evaluation("accuracy", float(mean), float(interval), chance, tasks, name, part=part)
            for mean, interval in zip(means, intervals, strict=True)
        ]
        nearest_mean, linear_probe = rows[1:] or (None, None)
        found = Diagnosis(rows[0], nearest_mean, linear_probe, calibration(logits, labels), found)
    assert found is not None
    return found


def calibration(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """Return the calibration of softmax probabilities.

    Args:
        logits: ``[..., classes]``.
        labels: the right classes, integers ``[...]``.
    """
    logits = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    labels = np.asarray(labels).reshape(-1)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    confidence, right = np.exp(log_probabilities.max(-1)), logits.argmax(-1) == labels
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in range(BINS):
        inside = index == number
        means = (float(values[inside].mean()) if inside.any() else float("nan") for values in (confidence, right))
        bins.append(Bin(number / BINS, (number + 1) / BINS, int(inside.sum()), *means))
    gaps = [each.count / len(labels) * abs(each.accuracy - each.confidence) for each in bins if each.count]
    likelihood = float(-log_probabilities[np.arange(len(labels)), labels].mean())
    return Calibration(float(sum(gaps)), likelihood, tuple(bins), len(labels))


def _task_outputs(preset: Preset) -> Callable[[tuple[Any, Any], jax.Array], Any]:
    """Return a function ``((theta, source), keys) -> (labels, *outputs)``, with outputs for each normalisation.

    Each output is a triple: the logits of the adapted network, the classes that the nearest mean predicts, and the
    classes that the linear probe predicts. The last two are None if the network has no function ``features``.
    """
    learner, network = preset.test_learner, preset.functions

    def one(theta, source, key):
        task = preset.episode.sample(source, key, preset.turns(training=False))
        phi = learner.adapt(theta, task).w
        fitted = None if network.features is None else _fit(network.features(theta, task.support_x), task, preset)
        functions: list = [(learner.apply, network.features, ())]
        if network.apply_with_support_statistics is not None:
            support = (task.support_x,)
            functions.append((network.apply_with_support_statistics, network.features_with_support_statistics, support))
        found = []
        for apply, features, support in functions:
            guesses = (None, None)
            if fitted is not None:
                check(features is not None, "the network has features, but no features_with_support_statistics")
                guesses = _guess(fitted, features(theta, task.query_x, *support))
            found.append((apply(phi, task.query_x, *support), *guesses))
        return (task.query_y, *found)

    return lambda fixed, keys: jax.lax.map(lambda key: one(*fixed, key), keys)


def _fit(features, task, preset):
    """Return the mean features of each class, and the linear probe as a matrix whose last row holds the biases."""
    one_hot = jax.nn.one_hot(task.support_y, preset.episode.ways, dtype=features.dtype)
    return one_hot.T @ features / one_hot.sum(0)[:, None], fit_probe(features, one_hot)


def fit_probe(features: jax.Array, one_hot: jax.Array) -> jax.Array:
    """Minimise the sum of the cross-entropies plus ½‖weights‖² over weights and biases.

    Each of the :data:`PROBE_STEPS` steps replaces the Hessian of the cross-entropy by the constant ½ XᵀX for each
    class, which is an upper bound. Nesterov's extrapolation accelerates the steps, and is restarted when it points
    uphill.

    Args:
        features: ``[examples, features]``.
        one_hot: the classes, ``[examples, classes]``.

    Returns:
        The weights with the biases as last row, ``[features + 1, classes]``.

    Source: Böhning, Multinomial Logistic Regression Algorithm, 1992, for the bound; O'Donoghue and Candès, Adaptive
    Restart for Accelerated Gradient Schemes, 2015.
    """
    x = _with_ones(features)
    penalty = jnp.ones(x.shape[1], x.dtype).at[-1].set(0)
    factor = jax.scipy.linalg.cho_factor(0.5 * x.T @ x + jnp.diag(penalty))

    def step(_, carry):
        probe, before, age = carry
        point = probe + age / (age + 3) * (probe - before)
        gradient = x.T @ (jax.nn.softmax(x @ point) - one_hot) + penalty[:, None] * point
        after = point - jax.scipy.linalg.cho_solve(factor, gradient)
        uphill = jnp.vdot(gradient, after - probe) > 0
        return after, probe, jnp.where(uphill, 0.0, age + 1)

    start = jnp.zeros((x.shape[1], one_hot.shape[1]), x.dtype)
    return jax.lax.fori_loop(0, PROBE_STEPS, step, (start, start, 0.0))[0]


def _with_ones(features):
    return jnp.concatenate([features, jnp.ones((len(features), 1), features.dtype)], 1)


def _guess(fitted, features):
    means, probe = fitted
    distances = jnp.square(features[:, None] - means).sum(-1)
    return distances.argmin(-1), (_with_ones(features) @ probe).argmax(-1)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and np.isnan(value) else value
