"""Records of the benchmark on disk, and the tables and pictures made from them."""

import json
import statistics
from pathlib import Path

import numpy as np

from benchmarks.bilevel.contenders import PLANS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "stochastic-benchmark.md"
BEGIN, END = "% begin of the tables\n", "\n% end of the tables"
TIMES = (0.3, 1.0, 3.0, 8.0)
NAMES = {
    "gap": "h(x) − h*", "gradient": "‖∇h(x)‖", "validation_loss": "validation loss", "test_error": "test error",
}  # fmt: skip
FORMATS = {"gap": ".1e", "gradient": ".1e", "validation_loss": ".4f", "test_error": ".4f"}
"""How the tables show a measure. Losses and errors do not tend to zero, so their digits behind the first two matter."""
FLOOR = 1e-16
"""Values below this one are drawn at this height, because such gaps are rounding errors of h."""


def save(folder: Path, name: str, record: dict) -> None:
    """Write ``FOLDER/bilevel-NAME.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"bilevel-{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path, name: str) -> dict:
    """Return the record in ``FOLDER/bilevel-NAME.json``."""
    return json.loads((folder / f"bilevel-{name}.json").read_text())


def recorded(folder: Path) -> list[str]:
    """Return the problems that have a record in the folder."""
    return [name for name in PLANS if (folder / f"bilevel-{name}.json").exists()]


def at(run: dict, metric: str, seconds: float) -> float:
    """Return a measure of the last point that a run had reached by a time; NaN if it had no point by then."""
    reached = [value for time, value in zip(run["seconds"], run[metric], strict=True) if time <= seconds]
    return reached[-1] if reached else float("nan")


def median_at(runs: list[dict], metric: str, seconds: float) -> float:
    """Return the median over seeds of a measure at a time."""
    return statistics.median(at(run, metric, seconds) for run in runs)


def seconds_until(run: dict, metric: str, value: float) -> float:
    """Return the time of the first point at which a measure is at most ``value``; infinity if there is none."""
    return next((t for t, v in zip(run["seconds"], run[metric], strict=True) if v <= value), float("inf"))


def steps_each_second(runs: list[dict]) -> float:
    """Return the median over seeds of steps per second."""
    return statistics.median(run["steps"][-1] / run["seconds"][-1] for run in runs)


def rows(record: dict, metric: str) -> list[str]:
    """Return a Markdown table of a measure at the times of the tables, one row for each contender."""
    times = [time for time in TIMES if time <= record["seconds"]]
    found = [f"| {NAMES[metric]} after | " + " | ".join(f"{time:g} s" for time in times) + " | steps/s |"]
    found.append("|" + "---|" * (len(times) + 2))
    for label, contender in record["contenders"].items():
        values = [f"{median_at(contender['runs'], metric, time):{FORMATS[metric]}}" for time in times]
        found.append(f"| {label} | " + " | ".join(values) + f" | {steps_each_second(contender['runs']):,.0f} |")
    return found


def comparisons(record: dict) -> dict[str, dict[str, float]]:
    """Compare each of our stochastic algorithms with the peer's of the same name and settings.

    Returns:
        by algorithm: ``"steps"``, our steps per second divided by the peer's; and ``"seconds"``, the peer's time until
        its measure is at most a level, divided by our time. The level is the larger of the last measures of both runs.
        Both entries come from medians over seeds.
    """
    metric, found = record["metric"], {}
    for ours in record["contenders"].values():
        theirs = record["contenders"].get(f"{ours['algorithm']}, benchmark_bilevel")
        if not ours["ours"] or theirs is None:
            continue
        ratios = []
        for run, other in zip(ours["runs"], theirs["runs"], strict=True):
            level = max(run[metric][-1], other[metric][-1])
            ratios.append(seconds_until(other, metric, level) / seconds_until(run, metric, level))
        found[ours["algorithm"]] = {
            "steps": steps_each_second(ours["runs"]) / steps_each_second(theirs["runs"]),
            "seconds": statistics.median(ratios),
        }
    return found


def best(record: dict) -> list[str]:
    """Return a Markdown table of the least measures of each side at the times of the tables, and who reached them."""
    times = [time for time in TIMES if time <= record["seconds"]]
    found = [
        "| the best after | " + " | ".join(f"{time:g} s" for time in times) + " |",
        "|" + "---|" * (len(times) + 1),
    ]
    for side, ours in (("bilevel", True), ("benchmark_bilevel", False)):
        group = {k: v for k, v in record["contenders"].items() if v["ours"] is ours}
        for metric in record["metrics"] if group else ():
            cells = []
            for time in times:
                values = {label: median_at(c["runs"], metric, time) for label, c in group.items()}
                value, label = min(((v, k) for k, v in values.items() if v == v), default=(float("nan"), "none"))
                cells.append(f"{value:{FORMATS[metric]}} ({label.partition(',')[0]})")
            found.append(f"| {side}, {NAMES[metric]} | " + " | ".join(cells) + " |")
    return found


def table(folder: Path) -> str:
    """Return the Markdown tables of all records in a folder."""
    parts = []
    for name in recorded(folder):
        record = load(folder, name)
        parts.append(f"### {name}")
        length, seeds = f"{record['seconds']:g} s", len(record["seeds"])
        machine = record["machine"]
        host = f"{machine['processor']}, {machine['cores']} cores at load {machine['load']:.0f}"
        parts.append(f"Runs of {length}, {seeds} {'seed' if seeds == 1 else 'seeds'}, {host}.")
        parts += ["\n".join(rows(record, metric)) for metric in record["metrics"]] + ["\n".join(best(record))]
        if compared := comparisons(record):
            lines = ["| algorithm | steps per second, ours / theirs | seconds to the same value, theirs / ours |"]
            lines.append("|---|---|---|")
            lines += [f"| {k} | {v['steps']:.2f} | {v['seconds']:.2f} |" for k, v in compared.items()]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def in_page(page: str) -> str:
    """Return the tables that a page has between its two marks."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def fill(page: str, tables: str) -> str:
    """Return the page with ``tables`` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}"


def plot(folder: Path, images: Path) -> list[Path]:
    """Draw, for each record, both measures against seconds and the first against oracle calls; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = []
    for name in recorded(folder):
        record = load(folder, name)
        panels = [
            (record["metrics"][0], "seconds"),
            (record["metrics"][1], "seconds"),
            (record["metrics"][0], "oracles"),
        ]
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        colours: dict[str, str] = {}
        for axis, (metric, against) in zip(axes, panels, strict=True):
            for label, contender in record["contenders"].items():
                kind = label.partition(",")[0]
                colour = colours.setdefault(kind, f"C{len(colours)}")
                for number, run in enumerate(contender["runs"]):
                    axis.plot(
                        run[against], np.maximum(run[metric], FLOOR), color=colour, lw=1.4,
                        ls="-" if contender["ours"] else "--", alpha=1.0 if number == 0 else 0.35,
                        label=label if number == 0 else None,
                    )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            if against == "seconds":
                axis.set_xlim(left=0.03)
            axis.xaxis.set_minor_formatter("")
            axis.set_xlabel("seconds of the solver" if against == "seconds" else "oracle calls")
            axis.set_ylabel(NAMES[metric])
            axis.grid(alpha=0.25)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        files.append(images / f"stochastic-{name}.png")
        images.mkdir(parents=True, exist_ok=True)
        figure.savefig(files[-1], dpi=130)
        plt.close(figure)
    return files
