"""The sections of a report about training and settings, made from the files in a run's folder."""

from collections import Counter
from typing import Any

import numpy as np

import bilevel as bl
from imaml.reports.charts import Series, binned, chart, shares
from imaml.reports.html import Html, element, joined, section, table
from imaml.runs.log import Progress
from imaml.runs.summary import Summary, flat
from imaml.settings.preset import Preset
from imaml.settings.published_presets import preset, presets

STATUS_STYLES = {
    "CONVERGED": "green", "BUDGET_USED": "blue", "ILL_CONDITIONED": "teal", "STAGNATION": "yellow", "STOPPED": "yellow",
    "MAX_STEPS": "orange", "BREAKDOWN": "orange", "NONSYMMETRIC": "purple", "NEGATIVE_CURVATURE": "purple",
    "SINGULAR": "red", "NONFINITE": "red",
}  # fmt: skip
"""The CSS class of each status."""


def training(run: Summary) -> Html:
    """Return the section with the learning curve, the residuals and the statuses."""
    log = run.log
    if not log:
        return section("Training", element("p", "The folder has no log of the training."))
    smoothed = "Each line shows means over stretches of meta-steps. Its band goes from the 10th to the 90th percentile."
    charts = [_error(run)] if log[0].accuracy is None else [_accuracy(run), _loss(log)]
    charts += [_residuals(log), _statuses(log)]
    return section(
        "Training", element("p", smoothed, class_="note"), element("div", *charts, class_="charts"), *_ends(log)
    )


def _accuracy(run):
    log = run.log
    found = [_mean("training classes", "blue", log, [p.accuracy for p in log])]
    found += _validations(log, "validation classes")
    found += _evaluations(run, "test classes")
    if run.evaluations and (chance := run.evaluations[0].get("chance")):
        ends = np.array([log[0].step, log[-1].step])
        found.append(Series(f"chance {chance:.0%}", "grey", ends, np.full(2, chance), kind="dashed"))
    return chart("Query accuracy after adaptation", found, "meta-step", limits=(0, 1), shown="{:.0%}".format)


def _loss(log):
    found = [_mean("training classes", "blue", log, [p.loss for p in log])]
    return chart("Query loss (nats)", found, "meta-step", limits=(0, None))


def _error(run):
    log = run.log
    found = [_mean("training tasks", "blue", log, [p.loss for p in log]), *_validations(log, "validation tasks")]
    found += _evaluations(run, "test tasks")
    return chart("Query mean squared error after adaptation", found, "meta-step", log=True)


def _validations(log, label):
    """Return the series of the validations in a log, in a list that is empty if there are none."""
    entries = [p for p in log if p.validation is not None]
    if not entries:
        return []
    steps, values, intervals = (
        np.array([getattr(p, name) for p in entries], float) for name in ("step", "validation", "validation_interval")
    )
    return [Series(label, "green", steps, values, values - intervals, values + intervals, "dots")]


def _evaluations(run, label):
    """Return a point for each evaluation on test tasks, at the meta-step whose parameters were evaluated."""
    words = {"query batch": ", query batch", "support set": ", support statistics"}
    found = []
    for evaluation, style in zip(run.evaluations, ("orange", "purple"), strict=False):
        value, interval = evaluation["value"], evaluation["interval"]
        ends = np.array([[run.best_step or run.log[-1].step], [value], [value - interval], [value + interval]], float)
        name = label + words.get(evaluation["normalisation"], "")
        found.append(Series(name, style, *ends, kind="dots"))
    return found


def _residuals(log):
    found = [_mean("inner: gradient of the inner objective", "blue", log, [p.inner_residual for p in log])]
    if any(p.linear_residual for p in log):  # only implicit MAML solves a linear system
        found.append(_mean("linear: ‖v − (I + H/λ)g‖ / ‖v‖", "orange", log, [p.linear_residual for p in log]))
    return chart("Residuals, median over the tasks of a meta-step", found, "meta-step", log=True)


def _statuses(log):
    counts = Counter()
    for entry in log:
        counts.update(entry.statuses)
    names = sorted(counts, key=lambda name: getattr(bl.Status, name, len(bl.Status)))
    stretches = np.array_split(np.arange(len(log)), min(60, len(log)))
    drawn = np.array([[sum(log[i].statuses.get(name, 0) for i in each) for name in names] for each in stretches], float)
    totals = drawn.sum(1, keepdims=True)
    if not names or not totals.all():
        return chart("Statuses of the tasks", [], "meta-step")
    ends = np.array([log[each[-1]].step for each in stretches], float)
    styles = [STATUS_STYLES.get(name, "grey") for name in names]
    return shares("Statuses of the tasks", names, styles, ends, drawn / totals)


def _ends(log):
    """Return a sentence about tasks that were left out, and a list of the statuses.

    The list has the number of tasks and the meaning of each status.
    """
    counts = Counter()
    for entry in log:
        counts.update(entry.statuses)
    total = sum(counts.values())
    if not total:
        return []
    left_out = total - sum(entry.tasks for entry in log)
    note = (
        f"{left_out:,} of {total:,} tasks were left out of the mean gradient, because their numbers were not finite or "
        "the relative residual of their linear system was above 1."
        if left_out
        else f"All {total:,} tasks were part of a mean gradient."
    )
    items = [
        element("li", element("b", name), f": {count:,} tasks, {count / total:.1%}. {_meaning(name)}")
        for name, count in counts.most_common()
    ]
    explained = element("details", element("summary", "What the statuses mean"), element("ul", *items))
    return [element("p", note), explained]


def _meaning(name):
    if name not in bl.Status.__members__:
        return "This version does not have the status."
    message = bl.Status[name].message
    return f"{message[:1].upper()}{message[1:].removesuffix('.')}."


def _mean(label, style, log: list[Progress], values):
    steps = np.array([entry.step for entry in log], float)
    x, mean, low, high = binned(steps, np.array(values, float))
    return Series(label, style, x, mean, low, high)


def settings(run: Summary) -> Html:
    """Return the section with the settings: first those that differ from the preset, then all."""
    base = _published(run)
    usual = {} if base is None else flat(base.config())
    changed = {path: value for path, value in run.settings.items() if base is not None and usual.get(path) != value}
    if base is None:
        what = (
            f"{run.preset} is no preset that this installation knows, so there is nothing to compare the settings with."
        )
        first = element("p", what)
    elif changed:
        rows = [[element("code", path), _word(value), _word(usual.get(path))] for path, value in changed.items()]
        first = joined(
            element("p", f"The run departs from the preset {run.preset} in these settings."),
            table(["setting", "this run", "preset"], rows),
        )
    else:
        first = element("p", f"The settings are those of the preset {run.preset}.")
    rows = [
        [element("code", path, class_="changed" if path in changed else None), _word(value)]
        for path, value in run.settings.items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    return section(
        "Settings",
        first,
        element("details", element("summary", "All settings"), table(["setting", "value"], rows)),
        _citation(base or run.restored),
        element("p", f"Last trained with {versions}. Data: ", element("code", run.data), class_="note"),
    )


def _published(run) -> Preset | None:
    """Return the preset that has the name of the run's preset, with the run's algorithm; None if it is not known."""
    if run.preset not in presets():
        return None
    found = preset(run.preset)
    return found if found.baselines is None else found.using(run.algorithm)


def _citation(chosen):
    if chosen is None:
        return None
    departures = [element("li", sentence) for sentence in chosen.deviations()]
    title = f"Where the preset departs from its source: {chosen.citation}"
    return element("details", element("summary", title), element("ul", *departures)) if departures else None


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
