"""A table of several runs: their results, and the settings in which they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaml.errors import check
from imaml.runs.progress import duration
from imaml.runs.results import Run
from imaml.runs.summary import Summary, summary
from imaml.tables import table

HEADER = ("run", "preset", "algorithm", "meta-steps", "tasks seen", "test result", "normalised over", "time")


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side. It prints as a table of results and a table of differences.

    Attributes:
        runs: the summary of each run's files.
        differences: the settings in which the runs differ, by dotted path, with the value in each run. The preset's
            name is left out. The value is None for a run without the setting. If a component of the settings, such as
            ``inner``, has different types, they are listed as ``type of inner``. If the data differ, the first 12
            digits of their fingerprints are listed as ``data``.
    """

    runs: tuple[Summary, ...]
    differences: dict[str, tuple[Any, ...]]

    def table(self, form: str = "terminal") -> str:
        """Return the runs and their differences as two tables.

        Args:
            form: ``"terminal"`` or ``"markdown"``.
        """
        names = [str(run.directory) for run in self.runs]
        rows = [row for name, run in zip(names, self.runs, strict=True) for row in _rows(name, run)]
        shown = [table(HEADER, rows, form), ""]
        if not self.differences:
            return "\n".join([*shown, "The runs have the same settings and data."])
        header = ["setting", *names]
        lines = [[path, *map(_word, values)] for path, values in self.differences.items()]
        return "\n".join([*shown, table(header, lines, form)])

    def __str__(self) -> str:
        return self.table()

    def records(self) -> dict[str, Any]:
        """Return the comparison in JSON types."""
        runs = [
            {
                "run": str(run.directory),
                "preset": run.preset,
                "algorithm": run.algorithm,
                "dataset": run.settings["dataset"],
                "meta_steps": run.step,
                "planned_meta_steps": run.settings["outer.steps"],
                "tasks_seen": run.tasks,
                "seconds": round(run.seconds, 1),
                "evaluations": list(run.evaluations),
                "versions": run.versions,
            }
            for run in self.runs
        ]
        return {"runs": runs, "differences": {path: list(values) for path, values in self.differences.items()}}


def compare(runs: Sequence[str | Path | Run]) -> Comparison:
    """Compare finished or unfinished runs by the files in their folders. Nothing is evaluated.

    Args:
        runs: folders of runs, or :class:`imaml.Run` objects. At least one.

    Raises:
        InputError: if there is no run, or if a folder holds no intact checkpoint or a damaged result.

    ``print(imaml.compare(["runs/first", "runs/other"]))`` shows the tables.
    """
    check(len(runs) > 0, "there is no run to compare: name the folders of runs")
    found = tuple(summary(run.directory if isinstance(run, Run) else run) for run in runs)
    return Comparison(found, _differences(found))


def _differences(runs):
    typed = all(run.types for run in runs)  # earlier versions did not save the types
    described = [
        run.settings | {f"type of {path}": name for path, name in run.types.items() if typed} | {"data": run.data[:12]}
        for run in runs
    ]
    paths = sorted({path for each in described for path in each})
    values = {path: tuple(each.get(path) for each in described) for path in paths}
    # The name of a preset does not affect the results.
    return {path: each for path, each in values.items() if path != "name" and any(value != each[0] for value in each)}


def _rows(name, run):
    """Return a row for each evaluation of a run, or one row for a run without an evaluation."""
    steps = f"{run.step:,}" if run.ended else f"{run.step:,} of {run.settings['outer.steps']:,}"
    first = (name, run.preset, run.algorithm, steps, f"{run.tasks:,}")
    if not run.evaluations:
        return [[*first, "not evaluated" if run.ended else "not finished", "", duration(run.seconds)]]
    rows = [[*first, result(each), each["normalisation"], duration(run.seconds)] for each in run.evaluations]
    return [rows[0], *([*[""] * len(first), *row[len(first) : -1], ""] for row in rows[1:])]


def result(evaluation: dict[str, Any]) -> str:
    """Return the value and the interval of an evaluation, such as ``85.10 % ± 0.80 %`` or ``error 0.213 ± 0.011``."""
    value, interval = evaluation["value"], evaluation["interval"]
    if evaluation["metric"] == "accuracy":
        return f"{100 * value:.2f} % ± {100 * interval:.2f} %"
    return f"error {value:.3f} ± {interval:.3f}"


def _word(value):
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
