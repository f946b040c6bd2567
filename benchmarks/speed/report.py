"""Records of the speed benchmark on disk, and the tables and the picture made from them."""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "speed.png"
REPEATS = 20
"""Number of repetitions in ``20 gradients`` and ``20 outer gradients``. Also the number of products that
``linearise, 21`` computes in addition to the one of ``linearise, 1``."""


def save(name: str, record: dict) -> None:
    """Write ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def load(name: str) -> dict:
    """Return the record in ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def show(title: str, record: dict) -> None:
    """Print a record of :func:`benchmarks.speed.harness.alternate`."""
    print(f"{title}, {record['rounds']} alternated rounds")
    print("\n".join(rows(record)))


def rows(record: dict) -> list[str]:
    """Return the lines of a Markdown table with one row for each contender.

    The columns are median seconds, ratio to the first contender with its range, relative error if known, and versions.
    """
    found = ["| | seconds | ratio (least to largest) | error | versions |", "|---|---|---|---|---|"]
    for label, seconds in record["seconds"].items():
        ratio, error = record["ratios"][label], record.get("relative_error", {}).get(label)
        spread = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"
        libraries = {k: v for k, v in record["versions"][label].items() if k not in ("python", "numpy", "jaxlib")}
        versions = ", ".join(f"{name} {number}" for name, number in libraries.items())
        accuracy = "" if error is None else f"{error:.1e}"
        found.append(f"| {label} | {statistics.median(seconds):.3f} | {spread} | {accuracy} | {versions} |")
    return found


def floor(item, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return milliseconds per task of the meta-gradient and of its parts, from the least time of all rounds.

    The parts are one inner gradient for each step, one outer gradient, one linearisation at the adapted parameters φ,
    one product for each CG iteration, and one product for the true residual. The linearisation also computes the inner
    gradient at φ.

    Args:
        item: the few-shot workload.
        seconds: seconds of each program by round.
    """
    least = {name: 1e3 * min(times) for name, times in seconds.items()}
    product = (least["linearise, 21"] - least["linearise, 1"]) / REPEATS
    parts = {
        "gradient": least["20 gradients"] / REPEATS,
        "outer gradient": least["20 outer gradients"] / REPEATS,
        "product": product,
        "linearise": least["linearise, 1"] - product,
    }
    rest = parts["outer gradient"] + parts["linearise"]
    whole = least["meta-gradient"] / item.tasks
    total = item.steps * parts["gradient"] + rest + (item.products + 1) * product
    return parts | {"whole": whole, "sum of parts": total, "share": total / whole}


def table() -> str:
    """Return Markdown tables of the records of W1, W2, ridge, logistic, devices and tasks, as far as they exist."""
    names = [name for name in ("W1", "W2", "ridge", "logistic", "devices", "tasks") if _path(name).exists()]
    return "\n\n".join(f"### {name}\n\n" + "\n".join(rows(load(f"speed-{name}"))) for name in names)


def plot() -> Path:
    """Draw the median and range of each contender's times in multiples of ours; return the file's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in ("W1", "W2", "ridge", "logistic") if _path(name).exists()]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), layout="constrained", squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        ratios = load(f"speed-{name}")["ratios"]
        middle = [ratio["median"] for ratio in ratios.values()]
        spread = [
            [r["median"] - r["least"] for r in ratios.values()],
            [r["largest"] - r["median"] for r in ratios.values()],
        ]
        axis.barh(range(len(middle)), middle, xerr=spread, color=["C0"] + ["0.7"] * (len(middle) - 1), ecolor="0.3")
        axis.set_yticks(range(len(middle)), [label.replace(", ", "\n") for label in ratios], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(name)
        axis.set_xlabel("time, in multiples of ours")
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)
    return PICTURE


def _path(name):
    return RESULTS / f"speed-{name}.json"
