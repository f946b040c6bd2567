"""The study of the paper's setting as a table and a picture, from its records alone.

    python -m benchmarks.paper_study_report [--records DIR] [--picture FILE]

Needs no JAX and no data: what :mod:`benchmarks.paper_study` measured lies in ``benchmarks/results/paper_study``.
"""

import argparse
import json
import statistics
from pathlib import Path

from imaml.files import write_whole

RESULTS = Path(__file__).parent / "results" / "paper_study"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "paper_study.png"
LITERAL = "literal"
HEADER = (
    "what differs", "test accuracy, %", "training, first and last stretch, %", "H, lowest and highest Ritz value",
    "inner residual left", "linear residual", "negative curvature", "left out", "gradient off by",
)  # fmt: skip
GREY, BLUE, ORANGE = "#718096", "#2b6cb0", "#c05621"


def read(directory: Path = RESULTS) -> list[dict]:
    """The records, the literal setting first, then by test accuracy."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    return sorted(found, key=lambda record: (record["name"] != LITERAL, -record["test"]["accuracy"]))


def row(record: dict) -> tuple[str, ...]:
    """A line of the table: at the end of the run, but where it says otherwise; medians are over the whole run."""
    curve, probe = record["curve"], record["probes"][-1]
    negative = statistics.mean(point["statuses"].get("NEGATIVE_CURVATURE", 0.0) for point in curve)
    test = record["test"]
    return (
        record["settings"]["factor"],
        f"{100 * test['accuracy']:.1f} ± {100 * test['interval']:.1f}",
        f"{100 * curve[0]['accuracy']:.0f} → {100 * curve[-1]['accuracy']:.0f}",
        f"{min(probe['lowest_ritz']):.2g} to {max(probe['highest_ritz']):.2g}",
        f"{statistics.median(probe['inner_residual_left']):.0%}",
        f"{statistics.median(point['linear_residual'] for point in curve):.1%}",
        f"{negative:.0%}",
        f"{1 - statistics.mean(point['counted'] for point in curve):.0%}",
        _off(probe),
    )


def _off(probe):
    """By the correction of ``bl.certify``; in brackets where the certificate says that it is no first-order one."""
    share = probe["correction"] / probe["gradient"]
    return f"{share:.0%}" if probe["first_order"] else f"({share:.0%})"


def table(records: list[dict]) -> str:
    """Markdown, with what holds for all of them above it."""
    lines = [HEADER, ["---"] * len(HEADER), *map(row, records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(records: list[dict], path: Path) -> Path:
    """Training accuracy of every variant over meta-steps, each beside the literal setting's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    literal = next(record for record in records if record["name"] == LITERAL)
    others = [record for record in records if record is not literal]
    columns = 4
    lines = max(1, -(-len(others) // columns))
    figure = Figure(figsize=(2.7 * columns, 2.3 * lines + 0.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, record in zip(panels, others, strict=False):
        _line(axes, literal, GREY, "the literal setting")
        better = record["test"]["accuracy"] - literal["test"]["accuracy"]
        clear = abs(better) > record["test"]["interval"] + literal["test"]["interval"]
        _line(axes, record, (BLUE if better > 0 else ORANGE) if clear else "#4a5568", record["name"])
        axes.set_title(record["name"], fontsize="medium")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(others) :]:
        axes.set_visible(False)
    figure.supxlabel("meta-step", fontsize="medium")
    figure.supylabel("query accuracy, training classes", fontsize="medium")
    figure.suptitle("One factor changed; grey: the literal setting", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda stream: figure.savefig(stream, dpi=150, format="png"))
    return path


def _line(axes, record, color, label):
    points = record["curve"]
    axes.plot([point["step"] for point in points], [point["accuracy"] for point in points], color=color, label=label)


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    records = read(options.records)
    if LITERAL not in {record["name"] for record in records}:
        parser.error(f"{options.records} has no record of the literal setting: run 'python -m benchmarks.paper_study'")
    print(table(records))
    print(draw(records, options.picture))


if __name__ == "__main__":
    main()
