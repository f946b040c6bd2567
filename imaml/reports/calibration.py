"""The section of a report about calibration: whether the probabilities of predictions agree with frequencies."""

import numpy as np

from imaml.reports.charts import Series, chart
from imaml.reports.html import Html, element, section, table
from imaml.runs.diagnosis import BINS, Calibration, calibration
from imaml.runs.outcomes import Outcomes

FEWEST = 10
"""Bins with fewer predictions are left out of the diagram, because the accuracy of few predictions is mostly chance."""
STYLES = ("orange", "purple")
"""The CSS class of each kind of statistics, as in the chart of the accuracy."""


def reliability(found: Outcomes, normalisations: tuple[str, ...]) -> Html:
    """Return the section with a reliability diagram and the expected calibration errors.

    Args:
        found: the outcomes of the tasks of an evaluation.
        normalisations: the names of the statistics of batch normalisation, the published ones first.
    """
    outputs = [each for each in (found.outputs, found.support_outputs) if each is not None]
    if not all(np.isfinite(each).all() for each in outputs):
        return section("Calibration", element("p", "Some outputs of the network are not finite."))
    measured = {name: calibration(each, found.targets) for name, each in zip(normalisations, outputs, strict=True)}
    explanation = (
        "The confidence of a prediction is the largest probability. Probabilities are calibrated if, of the "
        "predictions with a confidence of 80 %, 80 % are right. The expected calibration error is the distance between "
        f"accuracy and confidence in each of {BINS} bins of the confidence, averaged over the predictions. The log "
        "loss is the mean of −log of the probability of the true class."
    )
    rows = [
        [name, f"{each.expected_error:.2%}", f"{each.negative_log_likelihood:.3f} nats"]
        for name, each in measured.items()
    ]
    header = ["normalised over", "calibration error", "log loss"]
    bins = [_bins(name, each) for name, each in measured.items()]
    return section(
        "Calibration",
        element("p", explanation),
        element("div", _diagram(measured), element("div", table(header, rows, (1, 2)), *bins), class_="charts tabled"),
    )


def _diagram(measured: dict[str, Calibration]) -> Html:
    ends = np.array([0.0, 1.0])
    series = [Series("calibrated", "grey", ends, ends, kind="dashed")]
    for (name, each), style in zip(measured.items(), STYLES, strict=False):
        drawn = [bin for bin in each.bins if bin.count >= FEWEST]
        x, y = ([getattr(bin, part) for bin in drawn] for part in ("confidence", "accuracy"))
        series.append(Series(_label(name), style, x, y, kind="dots"))
    note = (
        "Below the dashed line, predictions are right less often than they claim, and above it more often. Bins with "
        f"fewer than {FEWEST} predictions are not drawn."
    )
    return chart("Accuracy by confidence", series, "confidence", limits=(0, 1), shown="{:.0%}".format, note=note)


def _label(name):
    return "predictions" if name == "none" else f"statistics of the {name}"


def _bins(name, found: Calibration):
    """Return a table of the bins that have predictions."""
    rows = [
        [f"{100 * each.low:.0f}–{each.high:.0%}", f"{each.count:,}", f"{each.confidence:.1%}", f"{each.accuracy:.1%}"]
        for each in found.bins
        if each.count
    ]
    header = ["bin", "predictions", "confidence", "accuracy"]
    return element("details", element("summary", f"The bins: {_label(name)}"), table(header, rows, numbers=(1, 2, 3)))
