"""Tests of nearest class mean, linear probe and calibration against scikit-learn and numbers computed by hand."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import NearestCentroid
from tiny_preset import Normalised, dataset, tiny_preset

import imaml
from imaml import InputError
from imaml.learning.tasks import Episode
from imaml.runs.diagnosis import BINS, calibration, fit_probe

pytestmark = pytest.mark.usefixtures("quick_compilation")
TASKS = 6


PRESET = replace(tiny_preset(1), episode=Episode(ways=3, shots=2, queries=3), network=Normalised())


@pytest.mark.slow("fits models of scikit-learn and runs a network operation by operation")
def test_the_classifiers_are_those_of_scikit_learn_and_the_network_is_that_of_an_evaluation(tiny_pixels):
    data, network = dataset(tiny_pixels), PRESET.functions
    theta = network.init(PRESET.keys.init)
    found = imaml.diagnose(theta, PRESET, TASKS, dataset=data)
    evaluation = imaml.evaluate(theta, PRESET, TASKS, dataset=data)
    assert replace(found.adapted, beside=found.beside.adapted) == evaluation
    expected = {"nearest_mean": [], "linear_probe": [], "logits": [], "labels": []}
    for key in jax.random.split(PRESET.keys.test, TASKS):
        task = PRESET.episode.sample(data.test.pixels, key, PRESET.turns(training=False))
        support, phi = network.features(theta, task.support_x), PRESET.test_learner.adapt(theta, task).w
        models = {
            "nearest_mean": NearestCentroid(), "linear_probe": LogisticRegression(C=1.0, tol=1e-8, max_iter=1000),
        }  # fmt: skip
        for name, model in models.items():
            model.fit(np.asarray(support), np.asarray(task.support_y))
            scores = [
                model.score(np.asarray(network.features(theta, task.query_x, reference)), np.asarray(task.query_y))
                for reference in (None, task.support_x)
            ]
            expected[name].append(scores)
        expected["logits"].append([network.apply(phi, task.query_x, each) for each in (None, task.support_x)])
        expected["labels"].append(task.query_y)
    for column, part in enumerate((found, found.beside)):
        for name in ("nearest_mean", "linear_probe"):
            scores = np.array(expected[name])[:, column]
            evaluated = getattr(part, name)
            np.testing.assert_allclose(evaluated.value, scores.mean(), atol=1e-6)
            np.testing.assert_allclose(evaluated.interval, 1.96 * scores.std(ddof=1) / np.sqrt(TASKS), atol=1e-6)
        logits = np.array(expected["logits"], np.float64)[:, column]
        labels = np.array(expected["labels"])
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        loss = log_loss(labels.reshape(-1), probabilities.reshape(-1, 3))
        np.testing.assert_allclose(part.calibration.negative_log_likelihood, loss, rtol=1e-4)
        assert part.calibration.examples == TASKS * 9
    assert "linear probe" in str(found) and "support set" in str(found)
    assert json.loads(json.dumps(found.record()))["beside"]["adapted"]["value"] == found.beside.adapted.value


@pytest.mark.slow("compiles the fit for several shapes", fast="25-*")
@pytest.mark.parametrize("examples, features, classes, size", [(5, 8, 5, 1.0), (25, 16, 5, 3.0), (40, 4, 20, 0.3)])
def test_the_probe_has_the_weights_of_scikit_learn(examples, features, classes, size):
    random, labels = np.random.default_rng(0), np.arange(examples) % classes
    x = size * random.normal(size=(examples, features)) + random.normal(size=(classes, features))[labels]
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, labels)
    found = np.asarray(fit_probe(np.float32(x), np.float32(np.eye(classes)[labels])))
    np.testing.assert_allclose(found[:-1], model.coef_.T, atol=2e-3)
    np.testing.assert_allclose(found[-1] - found[-1].mean(), model.intercept_ - model.intercept_.mean(), atol=2e-3)


def test_the_calibration_error_of_a_known_table():
    # Confidences 0.9 (right, wrong), 0.6 (right) and 0.55 (wrong) of two classes.
    confidence, right = np.array([0.9, 0.9, 0.6, 0.55]), np.array([True, False, True, False])
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], -1)
    found = calibration(logits, np.where(right, 0, 1))
    # 0.9 is in the bin (13/15, 14/15], 0.6 and 0.55 are in the bin (8/15, 9/15].
    expected = 0.5 * abs(0.5 - 0.9) + 0.5 * abs(0.5 - 0.575)
    assert found.expected_error == pytest.approx(expected)
    assert found.negative_log_likelihood == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.45]).mean())
    filled = {number: each.count for number, each in enumerate(found.bins) if each.count}
    assert len(found.bins) == BINS and filled == {8: 2, 13: 2}
    assert np.isnan(found.bins[0].accuracy) and found.bins[13].confidence == pytest.approx(0.9)


def test_probabilities_that_are_frequencies_are_calibrated():
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(20_000, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = (random.random((20_000, 1)) > probabilities.cumsum(-1)).sum(-1)
    assert calibration(logits, labels).expected_error < 0.02
    assert calibration(3 * logits, labels).expected_error > 0.1
    sure = calibration(1e4 * np.eye(3), np.arange(3))
    assert sure.expected_error == 0 and sure.bins[-1].count == 3


@pytest.mark.slow("compiles the adaptation of a network")
def test_a_network_that_does_not_tell_its_features_has_only_a_calibration(tiny_pixels):
    preset = replace(PRESET, network=Normalised(tells_features=False))
    found = imaml.diagnose(preset.functions.init(preset.keys.init), preset, 2, dataset=dataset(tiny_pixels))
    assert (found.nearest_mean, found.linear_probe) == (None, None) and found.calibration.examples == 18


def test_a_regression_is_refused():
    preset = imaml.preset("sinusoid-5shot-gd")
    with pytest.raises(InputError, match="is a regression: its outputs are no probabilities"):
        imaml.diagnose(preset.functions.init(preset.keys.init), preset)
