"""The learning curve of a run, drawn from the files in its folder.

Neither this module nor a module that it imports uses JAX. It imports matplotlib only when a picture is drawn.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imaml.runs.log import Progress, read_log
from imaml.storage.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "learning_curve.png"
BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#c05621", "#2f855a", "#718096"


def learning_curve(directory: Path, ways: int | None) -> Path:
    """Draw accuracy, loss, residuals and any validations over the meta-steps of the run in ``directory``.

    Args:
        directory: the run's folder, with its log and, if the run is finished, its result.
        ways: number of classes of a task, for a line at the chance level 1/ways. None for a regression: the picture
            then has no panel of accuracy.

    Returns:
        The path of the PNG file.
    """
    log, evaluations = read_log(directory), _evaluations(directory)
    panels = 2 if ways is None else 3
    figure = new_figure(11 * panels / 3, 4.2)
    *first, loss, residuals = figure.subplots(1, panels)
    if ways is None:
        _draw_error(loss, log, evaluations)
    else:
        _draw_accuracy(first[0], log, evaluations, 1 / ways)
        _draw_loss(loss, log)
    _draw_residuals(residuals, log)
    for axes in (*first, loss, residuals):
        axes.set_xlabel("meta-step")
        plain(axes)
    return save(figure, directory / PICTURE)


def new_figure(width: float, height: float, **style: Any) -> "Figure":
    """Return an empty figure of ``width`` times ``height`` inches that does not open a window.

    Args:
        width: in inches.
        height: in inches.
        style: further keyword arguments of ``matplotlib.figure.Figure``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", **style)
    FigureCanvasAgg(figure)
    return figure


def plain(axes: "Axes") -> None:
    """Draw a faint grid and remove the frame on the top and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: "Figure", path: Path) -> Path:
    """Write the figure to ``path`` as a PNG file, atomically, and return the path."""
    write_whole(path, lambda stream: figure.savefig(stream, dpi=150, format="png"))
    return path


def _draw_accuracy(axes, log: list[Progress], evaluations, chance):
    axes.set_title("query accuracy after adaptation")
    _smoothed(axes, log, [p.accuracy for p in log], BLUE, "training classes")
    _draw_validation(axes, log, "validation classes")
    axes.axhline(chance, color=GREY, linestyle=":", label=f"chance {chance:.0%}")
    for evaluation, marker in zip(evaluations, "os", strict=False):
        statistics = {"query batch": ", query batch", "support set": ", support statistics"}.get(
            evaluation["normalisation"], ""
        )
        _draw_evaluation(axes, log, evaluation, marker, f"held-out{statistics} {{value:.1%}} ± {{interval:.1%}}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(axes)


def _draw_error(axes, log, evaluations):
    axes.set_title("query mean squared error after adaptation")
    _smoothed(axes, log, [p.loss for p in log], BLUE, "training curves")
    _draw_validation(axes, log, "validation curves")
    for evaluation in evaluations:
        _draw_evaluation(axes, log, evaluation, "o", "test curves {value:.3f} ± {interval:.3f}")
    axes.set_yscale("log")
    _legend(axes)


def _draw_validation(axes, log, label):
    """Plot the validations with their 95 % intervals, if the run has any."""
    found = [entry for entry in log if entry.validation is not None]
    if found:
        values, intervals = [p.validation for p in found], [p.validation_interval for p in found]
        axes.errorbar(
            [p.step for p in found], values, intervals, color=GREEN, marker=".", elinewidth=0.7, linewidth=1.2,
            label=label,
        )  # fmt: skip


def _draw_evaluation(axes, log, evaluation, marker, label):
    step = evaluation.get("step") or (log[-1].step if log else 0)
    axes.errorbar(
        step, evaluation["value"], evaluation["interval"], color=ORANGE, marker=marker, capsize=4, zorder=5,
        label=label.format(**evaluation),
    )  # fmt: skip


def _draw_loss(axes, log):
    axes.set_title("query loss (nats)")
    _smoothed(axes, log, [p.loss for p in log], BLUE, None)
    axes.set_ylim(bottom=0)


def _draw_residuals(axes, log):
    axes.set_title("residuals, median over tasks")
    _smoothed(axes, log, [p.inner_residual for p in log], BLUE, "inner: gradient of the inner objective")
    if not log or any(p.linear_residual for p in log):  # only implicit MAML solves a linear system
        _smoothed(axes, log, [p.linear_residual for p in log], ORANGE, "linear: ‖v − (I + H/λ)g‖ / ‖v‖")
    axes.set_yscale("log")
    _legend(axes)


def _legend(axes):
    """Put the legend below the panel, so that it does not cover the curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.2), frameon=False, borderaxespad=0, fontsize="small")


def _smoothed(axes, log, values, color, label):
    """Plot the values faintly, and their running mean over 2 % of the log's entries.

    If the log is empty, for example because its file was deleted, only the label is added to the legend.
    """
    if not log:
        axes.plot([], [], color=color, label=label)
        return
    steps, values = np.array([p.step for p in log]), np.array(values)
    axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
    width = max(1, len(values) // 50)
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], means, color=color, linewidth=1.8, label=label)


def _evaluations(directory):
    """Return the evaluations in ``result.json``, with the field names of this version. Without that file, return [].

    In a run with validation, an evaluation has the ``step`` of the best validation, whose parameters were evaluated.
    """
    path = directory / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if former := result.get("evaluation"):
        # Earlier versions wrote a single evaluation, always with the query batch's statistics.
        return [{"value": former["accuracy"], "interval": former["interval"], "normalisation": "query batch"}]
    chosen = {"step": result["validation"]["step"]} if "validation" in result else {}
    return [evaluation | chosen for evaluation in result.get("evaluations", [])]
