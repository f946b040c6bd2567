"""The report of one run: a single HTML file that needs no script, no network and no other file."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imaml.datasets import Dataset
from imaml.errors import InputError
from imaml.learning.tasks import Episode
from imaml.reports import calibration, classification, regression, training
from imaml.reports.comparison import result
from imaml.reports.html import Html, element, page, section, table
from imaml.runs.evaluation import evaluate_classes, normalisations, resolved
from imaml.runs.outcomes import outcomes
from imaml.runs.prediction import DRAWINGS
from imaml.runs.progress import duration
from imaml.runs.results import Run
from imaml.runs.summary import Summary, summary
from imaml.settings.preset import Preset
from imaml.storage.files import write_whole

FILE = "report.html"
EXPLAINED = {
    "query batch": "batch normalisation over the query batch, as published (transductive)",
    "support set": "batch normalisation by the statistics of the support set",
    "none": "no batch normalisation",
}


def report(
    run: str | Path | Run,
    path: str | Path | None = None,
    preset: Preset | None = None,
    *,
    tasks: int | None = None,
    data: str | Path | None = None,
    dataset: str | Dataset | None = None,
    on_event: Callable[[str], None] = lambda message: None,
    on_warning: Callable[[str], None] = warnings.warn,
) -> Path:
    """Write a report of a run as one HTML file, and return the file's path.

    The report has the learning curve, the residuals and statuses over training, the evaluation with the statistics of
    the query batch and of the support set, the settings, and those settings that differ from the preset. For held-out
    tasks, it shows how well the probabilities are calibrated, which classes are taken for which, and example tasks with
    their images and predictions. For a regression it shows example curves instead. The file needs no script, font or
    image from elsewhere.

    Args:
        run: a run's folder or a :class:`imaml.Run`. The run need not be finished.
        path: the file, which is replaced if it exists. By default ``report.html`` in the run's folder.
        preset: the preset that the run was trained with, if it has types of your own, as in :func:`imaml.evaluate`.
        tasks: number of held-out tasks for calibration, confusion and examples, at least 2. By default, the tasks are
            those of the run's evaluation, or 600 tasks if the run has none.
        data: the folder of the data, as in :func:`imaml.evaluate`.
        dataset: one's own data, as in :func:`imaml.evaluate`.
        on_event: called with a message before the data are read, and before θ is adapted to the tasks.
        on_warning: called with a message if a checkpoint or the copy of the glyphs is damaged, if classes are left out,
            or if outputs of the network are not finite.

    Raises:
        InputError: if the folder holds no intact checkpoint, if ``tasks`` is less than 2, and as
            :func:`imaml.evaluate` does.
        OSError: if the file cannot be written.

    ``imaml.report("runs/first")`` writes ``runs/first/report.html``.
    """
    directory = run.directory if isinstance(run, Run) else Path(run)
    found = summary(directory)
    on_event("reading the data")
    theta, preset, classes = resolved(run, preset, data, None, on_warning, dataset, "test")
    if tasks is None:
        tasks = int(found.evaluations[0]["tasks"]) if found.evaluations else 600
    if tasks < 2:
        raise InputError(f"a report needs at least 2 tasks, got {tasks}")
    on_event(f"adapting to {tasks} tasks of held-out {preset.episode.kind}")
    computed = evaluate_classes(theta, preset, classes, tasks, on_warning).records() if not found.evaluations else None
    sections = [
        _head(found, preset, computed),
        training.training(found),
        _evaluation(found, preset, computed),
        *_tasks(theta, preset, classes, tasks),
        training.settings(found),
    ]
    title = f"{found.preset} on {preset.dataset}"
    content = page(title, *sections).encode()
    path = directory / FILE if path is None else Path(path)
    write_whole(path, lambda stream: stream.write(content))
    return path


def _head(run: Summary, preset: Preset, computed) -> Html:
    """Return the title and the most important numbers."""
    found = run.evaluations or computed
    steps = f"{run.step:,}" if run.ended else f"{run.step:,} of {run.settings['outer.steps']:,}"
    unfinished = "" if run.ended or run.evaluations else ", not finished"
    tiles = []
    for each in found:
        over = f", normalised over the {each['normalisation']}" if len(found) > 1 else ""
        tiles.append((_result(each), f"test {each['metric']}{over}{unfinished}"))
    tiles += [
        (steps, "meta-steps"),
        (f"{run.tasks:,}", "training tasks"),
        (duration(run.seconds), "training time"),
    ]
    shown = [element("div", element("b", value), element("span", what), class_="tile") for value, what in tiles]
    return element(
        "header",
        element("h1", f"{run.preset} on {preset.dataset}"),
        element("p", preset.title, ", in ", element("code", str(run.directory))),
        element("div", *shown, class_="tiles"),
    )


def _result(evaluation):
    """Return the value and the interval, with a line break allowed only before the interval."""
    return (
        result(evaluation)
        .removeprefix("error ")
        .replace(" %", "\N{NO-BREAK SPACE}%")
        .replace("± ", "±\N{NO-BREAK SPACE}")
    )


def _evaluation(run: Summary, preset: Preset, computed) -> Html:
    """Return the section with the evaluations of the run."""
    found: Any = run.evaluations or computed
    rows = [
        [_result(each), f"{each['tasks']:,}", EXPLAINED.get(each["normalisation"], each["normalisation"])]
        for each in found
    ]
    chance = found[0].get("chance")
    what = "The mean over tasks of held-out " + preset.episode.kind + ", ± half the width of its 95 % interval."
    texts = [what + ("" if chance is None else f" Guessing gets {chance:.0%} right.")]
    if run.best_step is not None:
        texts.append(f"The parameters are those after {run.best_step:,} meta-steps, which had the best validation.")
    elif not run.evaluations and not run.ended:
        texts.append(
            f"The run is not finished: this is the evaluation of its parameters after {run.step:,} meta-steps."
        )
    return section(
        "Evaluation",
        *(element("p", text) for text in texts),
        table([found[0]["metric"], "tasks", "normalisation"], rows, numbers=(1,)),
    )


def _tasks(theta, preset, classes, tasks):
    """Return the sections about held-out tasks."""
    found = outcomes(theta, preset, classes, tasks)
    if preset.episode.metric != "accuracy":
        return [regression.curves(found, theta, preset, classes)]
    black = preset.dataset in DRAWINGS
    sections = [calibration.reliability(found, normalisations(preset)), classification.confusion(found, classes, black)]
    if isinstance(preset.episode, Episode):
        sections.append(classification.examples(found, preset, classes, black))
    return sections
