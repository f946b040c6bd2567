"""The sections of a report about the tasks of a classifier: which classes it confuses, and some example tasks."""

from typing import Any

import numpy as np

from imaml.learning.tasks import Task
from imaml.reports.html import Html, element, image, section
from imaml.runs import outcomes as run_outcomes
from imaml.runs.outcomes import Outcomes
from imaml.settings.preset import Preset

LARGEST_MATRIX = 20
"""The largest number of classes for which a matrix can be read. With more, the report lists the hardest classes."""
HARDEST = 12
"""The largest number of classes in the list of the hardest classes."""
SUPPORT_SHOWN, QUERIES_SHOWN = 5, 3
"""The largest numbers of support and query images of each class that an example task shows."""


def confusion(found: Outcomes, classes: Any, paper_is_black: bool) -> Html:
    """Return the section that says which classes are taken for which.

    Args:
        found: the outcomes of the tasks of an evaluation.
        classes: the held-out classes.
        paper_is_black: see :func:`examples`.
    """
    tasks, queries = found.targets.shape
    ways = found.outputs.shape[-1]
    positions = (
        f"A task gives its {ways} classes the labels 1 to {ways} at random, so the labels are equally hard. A learner "
        "that prefers one label shows a column with larger numbers than the others."
    )
    parts = [element("p", f"All {tasks * queries:,} query images of {tasks:,} tasks.")]
    if found.drawn is not None and len(classes) <= LARGEST_MATRIX:
        parts += [
            element("h3", "By class"),
            element("p", "Rows: the true class. Columns: the predicted class.", class_="note"),
            _matrix(found.confusion(len(classes)), classes.labels),
        ]
    elif found.drawn is not None:
        parts += [
            element("h3", "The hardest classes"),
            element(
                "p",
                f"Up to {HARDEST} of {len(classes)} classes: those with the most query images that were not "
                "recognised. Each class is in only a few tasks, so these counts are rough.",
                class_="note",
            ),
            _hardest(found.confusion(len(classes)), classes, paper_is_black),
        ]
    if ways <= LARGEST_MATRIX:
        parts += [
            element("h3", "By label within the task"),
            element("p", positions, class_="note"),
            _matrix(found.confusion(), [str(label + 1) for label in range(ways)]),
        ]
    return section("Confusion", *parts)


def _matrix(counts, labels):
    """Return a matrix of counts, shaded by their shares of the row."""
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))

    def cell(row, column):
        share = shares[row, column]
        kind = ("diagonal " if row == column else "") + ("strong" if share > 0.6 else "")
        text = f"{counts[row, column]:,}" if counts[row, column] else ""
        what = f"{labels[row]} taken for {labels[column]}: {share:.1%}"
        return element("td", text, class_=kind.strip() or None, style=f"--share:{share:.3f}", title=what)

    head = element("tr", *(element("th", text) for text in ("true ╲ predicted", *labels)))
    rows = [
        element("tr", element("th", label), *(cell(row, column) for column in range(len(labels))))
        for row, label in enumerate(labels)
    ]
    return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide matrix")


def _hardest(counts, classes, paper_is_black):
    """Return a card for each of the hardest classes, which names up to three classes that it is taken for."""
    asked, missed = counts.sum(1), counts.sum(1) - np.diag(counts)

    def named(index, *lines):
        label = classes.labels[index]
        picture = image(_paper(_first_image(classes, index), paper_is_black), label)
        return element("div", picture, element("div", label, *(element("div", line) for line in lines)), class_="query")

    cards = []
    for index in np.argsort(-missed, kind="stable")[:HARDEST]:
        if missed[index]:
            others = np.where(np.arange(len(counts)) == index, 0, counts[index])
            taken = [
                named(other, "once" if others[other] == 1 else f"{others[other]} times")
                for other in np.argsort(-others, kind="stable")[:3]
                if others[other]
            ]
            title = named(index, f"missed {missed[index]} of {asked[index]}; taken for")
            cards.append(element("div", title, element("div", *taken, class_="queries"), class_="task"))
    return element("div", *cards, class_="tasks hardest") if cards else element("p", "No query image was missed.")


def _first_image(classes, index):
    source = classes.source
    return source.pixels[source.starts[index]] if hasattr(source, "starts") else source[index, 0]


def examples(found: Outcomes, preset: Preset, classes: Any, paper_is_black: bool) -> Html:
    """Return the section with the example tasks that :func:`chosen` selects.

    Args:
        found: the outcomes of the tasks of an evaluation.
        preset: the settings.
        classes: the held-out classes.
        paper_is_black: whether the images are drawings with bright ink on black paper. They are then shown with dark
            ink on white paper.
    """
    indices, tasks = chosen(found), len(found.targets)
    note = (
        "The first two tasks of the evaluation, and the next two that have a mistake. The images without a frame are "
        "support images, to which the network is adapted. The images with a frame are query images, with the "
        "predicted class and its probability."
    )
    mistakes = (found.predicted != found.targets).sum(1)
    cards = [
        element("div", _title(index, mistakes[index]), *_classes(found, preset, classes, index, tasks, paper_is_black),
                class_="task")
        for index in indices
    ]  # fmt: skip
    return section("Example tasks", element("p", note, class_="note"), element("div", *cards, class_="tasks"))


def chosen(found: Outcomes) -> list[int]:
    """Return the indices of the tasks that a report shows: the first two, and the next two that have a mistake."""
    first = list(range(min(2, len(found.targets))))
    wrong = np.flatnonzero((found.predicted != found.targets).any(1))
    return first + [int(index) for index in wrong if index not in first][:2]


def _title(index, mistakes):
    what = "no mistake" if not mistakes else f"{mistakes} mistake" + ("s" if mistakes > 1 else "")
    return element("h3", f"Task {index + 1}: {what}")


def _classes(found, preset, classes, index, tasks, paper_is_black):
    """Yield a row for each class of a task, with support images of the class, and query images with predictions."""
    task: Task = run_outcomes.task(preset, classes, index, tasks)
    names = _names(found, classes, index)
    black = paper_is_black and not preset.episode.bright_paper
    probabilities, predicted = found.probabilities[index], found.predicted[index]
    for label, name in enumerate(names):
        support = np.flatnonzero(task.support_y == label)[:SUPPORT_SHOWN]
        queries = np.flatnonzero(task.query_y == label)
        queries = queries[np.argsort(predicted[queries] == label, kind="stable")][:QUERIES_SHOWN]  # mistakes first
        pictures = [image(_paper(task.support_x[i], black), f"support image of {name}") for i in support]
        left = element("div", element("div", name, class_="name"), element("div", *pictures, class_="support"))
        right = [
            _query(_paper(task.query_x[i], black), probabilities[i], label, int(predicted[i]), names) for i in queries
        ]
        yield element("div", left, element("div", *right, class_="queries"), class_="class")


def _query(pixels, probabilities, label, predicted, names):
    right = label == predicted
    mark = element("b", "✓\N{NO-BREAK SPACE}" if right else "✗\N{NO-BREAK SPACE}")
    shown = [mark, f"{names[predicted]}, {probabilities[predicted]:.0%}"]
    true = None if right else element("div", f"true class: {probabilities[label]:.0%}")
    what = element("div", *shown, true)
    picture = image(pixels, f"query image of {names[label]}")
    return element("div", picture, what, class_=f"query {'green' if right else 'red'}")


def _names(found, classes, index):
    if found.drawn is None:
        return [f"class {label + 1}" for label in range(found.outputs.shape[-1])]
    return [classes.labels[drawn] for drawn in found.drawn[index]]


def _paper(pixels, black):
    if not black:
        return pixels
    return 255 - pixels if pixels.dtype == np.uint8 else 1 - pixels
