"""Print the tables and draw the pictures of :mod:`benchmarks.paper_study`, from its records.

    python -m benchmarks.paper_study_report [--records DIR] [--pictures DIR]

The records are those that :mod:`benchmarks.paper_study` wrote to ``benchmarks/results/paper_study``. The folder
``seed-1`` in it has the same variants with another seed, and the folder ``long`` has three variants that were trained
ten times as long. Omniglot is not needed.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from imaml.reports.plots import BLUE, GREY, ORANGE, new_figure, plain, save

RESULTS = Path(__file__).parent / "results" / "paper_study"
SEED_1, LONG = "seed-1", "long"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
LITERAL = "literal"
HEADER = (
    "what differs", "test accuracy, %", "with seed 1, %", "training, first and last 25 meta-steps, %",
    "H, lowest and highest Ritz value", "inner residual, final / initial", "linear residual", "negative curvature",
    "left out", "gradient off by",
)  # fmt: skip
COURSE_HEADER = ("meta-steps", "training accuracy, %", "inner residual", "linear residual", "negative curvature")
MILESTONES = (100, 400, 1000, 2000, 3000, 4000)
WINDOW = 100
"""Number of meta-steps, up to and including a milestone, over which :func:`course` averages."""
ACCURACY = "query accuracy, training classes"
DARK = "#4a5568"


def read(directory: Path = RESULTS) -> list[dict]:
    """Return the records of a folder: the literal setting first, then the others by falling test accuracy."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    return sorted(found, key=lambda record: (record["name"] != LITERAL, -record["test"]["accuracy"]))


def row(record: dict, again: dict | None = None) -> tuple[str, ...]:
    """Return the cells of a variant's line in :func:`table`, as formatted text.

    Ritz values, inner residual and the certificate's correction are those of the last probe. The linear residual is the
    median over the points of the learning curve. Negative curvature and tasks left out are means over these points.

    Args:
        record: the record of the variant.
        again: the record of the same variant with seed 1, or None.
    """
    curve, probe = record["curve"], record["probes"][-1]
    negative = statistics.mean(_negative(point) for point in curve)
    return (
        record["settings"]["factor"],
        _tested(record),
        _tested(again) if again else "—",
        f"{100 * curve[0]['accuracy']:.0f} → {100 * curve[-1]['accuracy']:.0f}",
        f"{min(probe['lowest_ritz']):.2g} to {max(probe['highest_ritz']):.2g}",
        f"{statistics.median(probe['inner_residual_left']):.0%}",
        f"{statistics.median(point['linear_residual'] for point in curve):.1%}",
        f"{negative:.0%}",
        f"{1 - statistics.mean(point['counted'] for point in curve):.0%}",
        _correction(probe),
    )


def _tested(record):
    test = record["test"]
    return f"{100 * test['accuracy']:.1f} ± {100 * test['interval']:.1f}"


def _negative(point):
    return point["statuses"].get("NEGATIVE_CURVATURE", 0.0)


FOLLOWED: dict[str, Callable[[dict], float]] = {
    ACCURACY: itemgetter("accuracy"),
    "inner residual": itemgetter("inner_residual"),
    "linear residual": itemgetter("linear_residual"),
    "tasks with negative curvature": _negative,
}
"""Quantities that :func:`course` and :func:`draw_long` show for a long run, as functions of a point of its curve."""


def _correction(probe):
    """Return the correction by ``bl.certify`` relative to the gradient as text, or "—" without a certificate.

    The number is in brackets if the certificate says that φ is too far from a solution for a first-order correction.
    """
    if "correction" not in probe:
        return "—"
    share = probe["correction"] / probe["gradient"]
    return f"{share:.0%}" if probe["first_order"] else f"({share:.0%})"


def table(records: list[dict], again: list[dict]) -> str:
    """Return the Markdown table of all variants.

    Args:
        records: the records, one for each line.
        again: records of the same variants with seed 1; some may be missing.
    """
    others = {record["name"]: record for record in again}
    return _markdown(HEADER, [row(record, others.get(record["name"])) for record in records])


def course(record: dict) -> str:
    """Return the Markdown table of a long run, with one line for each milestone in ``MILESTONES``."""
    lines = []
    for milestone in MILESTONES:
        points = [point for point in record["curve"] if milestone - WINDOW < point["step"] <= milestone]
        if points:
            accuracy, inner, linear, negative = (statistics.mean(map(of, points)) for of in FOLLOWED.values())
            line = f"{milestone:,}", f"{100 * accuracy:.0f}", f"{inner:.2f}", f"{linear:.2f}", f"{negative:.0%}"
            lines.append(line)
    return _markdown(COURSE_HEADER, lines)


def _markdown(header, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def draw(records: list[dict], path: Path) -> Path:
    """Draw the training accuracy over meta-steps, one panel for each variant, and return ``path``.

    Each panel also has the curve of the literal setting, in grey. The curve of a variant is blue if its test accuracy
    is higher than that of the literal setting by more than the sum of both intervals, orange if it is lower by more
    than this sum, and dark otherwise.
    """
    literal = next(record for record in records if record["name"] == LITERAL)
    others = [record for record in records if record is not literal]
    columns = 4
    lines = max(1, -(-len(others) // columns))
    figure = new_figure(2.7 * columns, 2.3 * lines + 0.4, facecolor="white")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, record in zip(panels, others, strict=False):
        _line(axes, literal, FOLLOWED[ACCURACY], GREY)
        better = record["test"]["accuracy"] - literal["test"]["accuracy"]
        clear = abs(better) > record["test"]["interval"] + literal["test"]["interval"]
        _line(axes, record, FOLLOWED[ACCURACY], (BLUE if better > 0 else ORANGE) if clear else DARK)
        axes.set_title(record["name"], fontsize="medium")
        _as_accuracy(axes)
        plain(axes)
    for axes in panels[len(others) :]:
        axes.set_visible(False)
    figure.supxlabel("meta-step", fontsize="medium")
    figure.supylabel(ACCURACY, fontsize="medium")
    figure.suptitle("One factor changed; grey: the literal setting", fontsize="medium")
    return save(figure, path)


def draw_long(records: list[dict], path: Path) -> Path:
    """Draw accuracy, both residuals and negative curvature of the long runs over meta-steps, and return ``path``."""
    figure = new_figure(11.0, 5.2, facecolor="white")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    colors = {LITERAL: ORANGE, "momentum": BLUE}
    for axes, (title, of) in zip(panels, FOLLOWED.items(), strict=True):
        for record in records:
            _line(axes, record, of, colors.get(record["name"], GREY), record["name"])
        axes.set_title(title, fontsize="medium")
        plain(axes)
    _as_accuracy(panels[0])
    panels[0].legend(frameon=False)
    figure.supxlabel("meta-step", fontsize="medium")
    return save(figure, path)


def _line(axes, record, of, color, label=None):
    points = record["curve"]
    axes.plot([point["step"] for point in points], list(map(of, points)), color=color, label=label)


def _as_accuracy(axes):
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def main() -> None:
    """Print the tables and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="the folder that pictures are written to")
    options = parser.parse_args()
    records, long = read(options.records), read(options.records / LONG)
    if LITERAL not in {record["name"] for record in records}:
        parser.error(f"{options.records} has no record of the literal setting: run 'python -m benchmarks.paper_study'")
    options.pictures.mkdir(parents=True, exist_ok=True)
    print(table(records, read(options.records / SEED_1)))
    print(draw(records, options.pictures / "paper_study.png"))
    for record in long:
        print(f"\n{record['settings']['factor']}: test accuracy {_tested(record)} %\n\n{course(record)}")
    if long:
        print(draw_long(long, options.pictures / "paper_study_long.png"))


if __name__ == "__main__":
    main()
