"""The section of a report about the tasks of a regression: curves with the fit before and after adaptation."""

from typing import Any

import numpy as np

from imaml.reports.charts import Series, chart
from imaml.reports.html import Html, element, section
from imaml.runs import outcomes as run_outcomes
from imaml.runs.outcomes import Outcomes
from imaml.settings.preset import Preset

EXAMPLES = 6
"""The largest number of curves that a report shows."""


def curves(found: Outcomes, theta: Any, preset: Preset, classes: Any) -> Html:
    """Return the section with quantiles of the tasks' errors, and with curves from the smallest to the largest error.

    Curves are drawn only if inputs and outputs are single numbers.

    Args:
        found: the outcomes of the tasks of an evaluation.
        theta: the parameters θ.
        preset: the settings.
        classes: the part of the data from which the tasks are drawn.
    """
    errors = ((found.outputs - found.targets) ** 2).mean((1, 2))
    quantiles = np.quantile(errors, (0.1, 0.5, 0.9))
    text = element(
        "p",
        f"Over the tasks, the mean squared error has the median {quantiles[1]:.3f}, the 10th percentile "
        f"{quantiles[0]:.3f} and the 90th percentile {quantiles[2]:.3f}.",
    )
    if found.outputs.shape[-1] != 1:
        return section("Example tasks", text)
    ranks = np.linspace(0, len(errors) - 1, min(EXAMPLES, len(errors))).round().astype(int)
    charts = [_curve(theta, preset, classes, int(i), errors) for i in np.argsort(errors)[ranks]]
    note = "Tasks from the smallest to the largest error. The network is adapted to the support points alone."
    shown = [chart for chart in charts if chart is not None]
    return section(
        "Example tasks",
        text,
        element("p", note, class_="note") if shown else None,
        element("div", *shown, class_="charts"),
    )


def _curve(theta, preset, classes, index, errors):
    """Return the chart of one task; None if an input is not a single number."""
    task = run_outcomes.task(preset, classes, index, len(errors))
    if task.query_x.shape[1:] != (1,):
        return None
    x = np.concatenate([task.support_x, task.query_x])[:, 0]
    grid = np.linspace(x.min(), x.max(), 200)
    before, after = run_outcomes.fit(theta, preset, task, grid[:, None])
    order = np.argsort(task.query_x[:, 0])
    query_x, query_y = task.query_x[order, 0], task.query_y[order, 0]
    return chart(
        f"Task {index + 1}, error {errors[index]:.3f}",
        [
            Series("curve through the query points", "grey", query_x, query_y),
            Series("before adaptation", "orange", grid, before[:, 0], kind="dashed"),
            Series("after adaptation", "blue", grid, after[:, 0]),
            Series("support points", "green", task.support_x[:, 0], task.support_y[:, 0], kind="dots"),
        ],
        "x",
    )
