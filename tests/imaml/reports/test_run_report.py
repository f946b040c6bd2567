"""Tests of the report of a run: it needs no other file, and has the numbers of the run and of its evaluation."""

import itertools
import re
import signal
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import softmax
from tiny_preset import Normalised, dataset, tiny_preset

import imaml
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.reports import calibration, classification
from imaml.runs import outcomes as run_outcomes
from imaml.runs.evaluation import evaluate_classes

TASKS = 40
VOID = {"meta", "img"}
PRESET = replace(tiny_preset(3), episode=replace(tiny_preset(3).episode, ways=3, queries=2))


class Page(HTMLParser):
    """Parser that collects the elements and words of a page, and fails if an element is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def reported(tiny_pixels, tmp_path_factory):
    """A tiny run whose classes have names that are HTML, the outcomes of its tasks, and its report."""
    classes = [ImageClasses(tiny_pixels, tuple(f"<i>{part}{i}" for i in range(12))) for part in ("train", "test")]
    data, directory = ImageDataset("cards & <b>", *classes), tmp_path_factory.mktemp("run")
    run = imaml.train(PRESET, directory, dataset=data, evaluation_tasks=TASKS)
    path = imaml.report(run, dataset=data)
    found = run_outcomes.outcomes(run.theta, run.preset, data.test, TASKS)
    return SimpleNamespace(run=run, data=data, outcomes=found, path=path, html=path.read_text())


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_the_file_needs_no_other_file_and_is_well_formed(reported):
    page = Page(reported.html)
    assert {"script", "link", "iframe", "object", "i"} & {tag for tag, _ in page.elements} == set()
    for tag, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or tag != "img"
        assert not {"href", "srcset", "background"} & set(attributes)
    assert "url(" not in reported.html and "@import" not in reported.html
    assert "<i>test3" in page.text and "cards & <b>" in page.text
    assert reported.path == reported.run.directory / "report.html"


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_the_outcomes_are_those_of_the_tasks_of_the_evaluation(reported):
    found, evaluation = reported.outcomes, reported.run.evaluation
    counts = found.confusion()
    assert counts.sum() == TASKS * 6 and (counts.sum(1) == TASKS * 2).all()
    np.testing.assert_allclose(np.trace(counts) / counts.sum(), evaluation.value, rtol=1e-6)
    shown = Page(reported.html).text
    assert f"{100 * evaluation.value:.2f} % ± {100 * evaluation.interval:.2f} %" in shown
    assert f"All {counts.sum()} query images of {TASKS} tasks" in shown


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_each_label_of_a_task_is_the_class_whose_images_the_task_has(reported, tiny_pixels):
    for index in (0, TASKS - 1):
        task = run_outcomes.task(reported.run.preset, reported.data.test, index, TASKS)
        images = np.rint(255 * np.concatenate([task.support_x, task.query_x])).astype(np.uint8)
        labels = np.concatenate([task.support_y, task.query_y])
        for pixels, label in zip(images, labels, strict=True):
            drawn = reported.outcomes.drawn[index][label]
            assert (tiny_pixels[drawn] == pixels).all((1, 2, 3)).any()
    by_class = reported.outcomes.confusion(12)
    np.testing.assert_array_equal(by_class.sum(1), 2 * np.bincount(reported.outcomes.drawn.ravel(), minlength=12))
    assert np.trace(by_class) == np.trace(reported.outcomes.confusion())


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_the_examples_have_the_predictions_and_mistakes_of_the_tasks(reported):
    found = reported.outcomes
    indices = classification.chosen(found)
    wrong = (found.predicted != found.targets).sum(1)
    assert indices[:2] == [0, 1] and all(wrong[indices[2:]] > 0) and len(indices) == 4
    frames = [attributes["class"] for _, attributes in Page(reported.html).elements if "class" in attributes]
    assert frames.count("query red") == sum(wrong[indices])
    assert frames.count("query green") == len(indices) * 6 - sum(wrong[indices])
    text = Page(reported.html).text
    first = int(np.flatnonzero(found.targets[0] == 0)[0])
    name = reported.data.test.labels[found.drawn[0][found.predicted[0][first]]]
    assert f"{name}, {found.probabilities[0][first].max():.0%}" in text


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_the_calibration_is_that_of_the_probabilities_of_the_tasks(reported):
    found = reported.outcomes
    assert found.support_outputs is None  # the network has no batch normalisation
    text = Page(reported.html).text
    assert f"none {expected_error(found.outputs, found.targets):.2%}" in text
    assert text.count("The bins: ") == 1


def expected_error(outputs, targets):
    """Return the expected calibration error with 15 bins, from the definition of Guo et al. (2017)."""
    confidence, right = softmax(np.float64(outputs), -1).max(-1).ravel(), (outputs.argmax(-1) == targets).ravel()
    ends = np.linspace(0, 1, 16)
    inside = [(low < confidence) & (confidence <= high) for low, high in itertools.pairwise(ends)]
    return sum(abs(right[each].sum() - confidence[each].sum()) for each in inside) / len(right)


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_both_kinds_of_statistics_are_shown_side_by_side(tiny_pixels, tmp_path):
    preset, data = replace(PRESET, network=Normalised()), dataset(tiny_pixels)
    run = imaml.train(preset, tmp_path / "run", dataset=data, evaluation_tasks=TASKS)
    found = run_outcomes.outcomes(run.theta, preset, data.test, TASKS)
    for outputs, evaluation in zip((found.outputs, found.support_outputs), run.evaluation.each, strict=True):
        assert (outputs.argmax(-1) == found.targets).mean() == pytest.approx(evaluation.value, rel=1e-6)
    text = Page(imaml.report(run, preset=preset, dataset=data).read_text()).text
    assert run.evaluation.value != run.evaluation.beside.value
    for outputs, evaluation in zip((found.outputs, found.support_outputs), run.evaluation.each, strict=True):
        name, value = evaluation.normalisation, f"{100 * evaluation.value:.2f} % ± {100 * evaluation.interval:.2f} %"
        assert f"{value} test accuracy, normalised over the {name}" in text
        assert f"{name} {expected_error(outputs, found.targets):.2%}" in text
    assert text.count("The bins: ") == 2


def test_outputs_that_are_not_finite_have_no_calibration():
    found = run_outcomes.Outcomes(np.full((2, 3, 5), np.nan), np.zeros((2, 3), int), None)
    assert "not finite" in Page(calibration.reliability(found, ("none",))).text


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_the_report_of_a_run_without_an_evaluation_evaluates_its_parameters(reported, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("checkpoint-00000003.npz", "metrics.jsonl"):
        (copy / name).write_bytes((reported.run.directory / name).read_bytes())
    path = imaml.report(copy, tmp_path / "page.html", PRESET, dataset=reported.data, tasks=4)
    text = Page(path.read_text()).text
    expected = evaluate_classes(reported.run.theta, reported.run.preset, reported.data.test, 4)
    assert "not finished" not in text and f"{100 * expected.value:.2f} % ±" in text


@pytest.mark.slow("trains a run and adapts to its tasks")
def test_an_unfinished_run_is_called_so(reported, tmp_path):
    def stop_after_two_steps(progress):
        if progress.step == 2:
            signal.raise_signal(signal.SIGTERM)

    run = imaml.train(PRESET, tmp_path, dataset=reported.data, evaluation_tasks=4, on_progress=stop_after_two_steps)
    text = Page(imaml.report(tmp_path, preset=PRESET, dataset=reported.data, tasks=4).read_text()).text
    expected = evaluate_classes(run.theta, PRESET, reported.data.test, 4)
    assert run.step == 2 and run.evaluation is None
    assert "The run is not finished: this is the evaluation of its parameters after 2 meta-steps." in text
    assert f"{100 * expected.value:.2f} % ±" in text and "2 of 3" in text


@pytest.mark.slow("trains a regression")
def test_a_regression_has_curves_that_go_through_the_predictions(tmp_path):
    preset = imaml.preset("sinusoid-5shot-gd")
    preset = replace(preset, outer=replace(preset.outer, steps=2, tasks=2))
    run = imaml.train(preset, tmp_path / "run", evaluation_tasks=8)
    text = Page(imaml.report(run).read_text()).text
    assert text.count("after adaptation") >= 6 and "outer.steps 2 1500" in text and "Confusion" not in text
    classes = imaml.datasets.load("sinusoid").test
    found = run_outcomes.outcomes(run.theta, preset, classes, 8)
    np.testing.assert_allclose(((found.outputs - found.targets) ** 2).mean(), run.evaluation.value, rtol=1e-5)
    task = run_outcomes.task(preset, classes, 5, 8)
    _, after = run_outcomes.fit(run.theta, preset, task, task.query_x)
    np.testing.assert_allclose(after, found.outputs[5], rtol=1e-4, atol=1e-5)


def test_a_matrix_of_many_classes_is_replaced_by_the_hardest_ones(tiny_pixels):
    drawn = np.array([[0, 1], [2, 3], [0, 2]])
    outputs = np.array([[[1.0, 0], [1, 0]], [[0, 1], [0, 1]], [[1, 0], [0, 1]]])
    found = run_outcomes.Outcomes(outputs, np.array([[0, 1]] * 3), drawn)
    pixels = np.concatenate([tiny_pixels, tiny_pixels])
    classes = ImageClasses(pixels, tuple(f"class{i}" for i in range(24)))
    page = Page(classification.confusion(found, classes, False))
    assert "class1 missed 1 of 1; taken for class0 once" in page.text
    assert "class2 missed 1 of 2; taken for class3 once" in page.text and "missed 0" not in page.text
    few = Page(classification.confusion(found, dataset(tiny_pixels).test, False))
    titles = [attributes.get("title", "") for _, attributes in few.elements]
    assert "test1 taken for test0: 100.0%" in titles and "test0 taken for test0: 100.0%" in titles
