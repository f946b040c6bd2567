"""Sweep: train a preset with each combination of some settings, and choose the best one on validation classes.

The test classes are not looked at. After a sweep, train the chosen settings at full length and evaluate that run.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any

from imaml.datasets import Dataset
from imaml.errors import TrainingFailed, check
from imaml.runs.log import Progress, read_log, time_of
from imaml.runs.training import train
from imaml.settings.overrides import override, settings
from imaml.settings.preset import Preset
from imaml.settings.renamed import current_path
from imaml.tables import table

HELD_OUT = 0.1
"""The fraction of the training classes that a sweep holds out for validation if the preset does not validate.

It is used only for a dataset without validation classes, and only if ``preset.validation.held_out`` is 0.
"""


@dataclass(frozen=True)
class Trial:
    """One combination of a sweep.

    Attributes:
        settings: the varied settings by dotted path.
        preset: the preset with these settings.
        directory: the folder of the run.
        value: the best accuracy or mean squared error on the validation tasks. NaN if training failed, or was stopped
            before a validation.
        interval: half the width of the 95 % interval of ``value``.
        step: number of meta-steps before the best validation.
        seconds: wall time of training.
        failure: the message of an error in training, or None.
    """

    settings: dict[str, Any]
    preset: Preset
    directory: Path
    value: float
    interval: float
    step: int | None
    seconds: float
    failure: str | None = None

    @property
    def validated(self) -> bool:
        """True if the run was validated, so that ``value`` is a number and not NaN."""
        return not math.isnan(self.value)


@dataclass(frozen=True)
class Sweep:
    """Result of :func:`imaml.sweep`. It prints as a table, the best combination first.

    Attributes:
        preset: the name of the preset.
        metric: ``"accuracy"`` or ``"mean squared error"``, on validation tasks.
        trials: the combinations in the order of their training.
        stopped_by: the signal that stopped the sweep, or None. The same call resumes it.
    """

    preset: str
    metric: str
    trials: tuple[Trial, ...]
    stopped_by: Signals | None = None

    @property
    def ranked(self) -> tuple[Trial, ...]:
        """The combinations from the best to the worst; those without a validation come last."""
        sign = -1 if self.metric == "accuracy" else 1
        return tuple(sorted(self.trials, key=lambda trial: (not trial.validated, sign * trial.value)))

    @property
    def best(self) -> Trial | None:
        """The combination with the best validation; None if no combination was validated."""
        return next((trial for trial in self.ranked if trial.validated), None)

    def table(self, form: str = "terminal") -> str:
        """Return the combinations as a table, and a sentence about the best one.

        Args:
            form: ``"terminal"`` or ``"markdown"``.
        """
        paths = list(self.trials[0].settings) if self.trials else []
        header = [*paths, f"validation {self.metric}", "meta-step", "seconds", "run"]
        rows = [
            [*(str(trial.settings[path]) for path in paths), self._result(trial), str(trial.step or ""),
             f"{trial.seconds:.0f}", trial.directory.name]
            for trial in self.ranked
        ]  # fmt: skip
        return "\n".join([table(header, rows, form), "", self._conclusion()])

    def __str__(self) -> str:
        return self.table()

    def records(self) -> dict[str, Any]:
        """Return the sweep in JSON types, the best combination first."""
        trials = [
            {
                "settings": trial.settings,
                "run": str(trial.directory),
                "value": trial.value if trial.validated else None,
                "interval": trial.interval if trial.validated else None,
                "meta_step": trial.step,
                "seconds": round(trial.seconds, 1),
                "failure": trial.failure,
            }
            for trial in self.ranked
        ]
        best = None if self.best is None else self.best.settings
        return {"preset": self.preset, "metric": self.metric, "part": "validation", "best": best, "trials": trials}

    def _result(self, trial):
        if trial.failure is not None:
            return "training failed"
        if not trial.validated:
            return "not validated"
        if self.metric == "accuracy":
            return f"{trial.value:.2%} ± {trial.interval:.2%}"
        return f"{trial.value:.3f} ± {trial.interval:.3f}"

    def _conclusion(self):
        best = self.best
        if best is None:
            return "No combination was validated."
        options = " ".join(f"--{path} {value}" for path, value in best.settings.items())
        others = [trial for trial in self.trials if trial.validated and trial is not best]
        close = sum(abs(trial.value - best.value) <= trial.interval + best.interval for trial in others)
        tie = f" Its interval overlaps with those of {close} of {len(others)} others." if close else ""
        return f"Best on validation: {options}.{tie} Test classes were not looked at."


def sweep(
    preset: Preset,
    over: Mapping[str, Sequence[Any]],
    directory: str | Path,
    data: str | Path | None = None,
    *,
    dataset: str | Dataset | None = None,
    devices: int | str | None = None,
    on_event: Callable[[str], None] = lambda message: None,
    on_warning: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Sweep:
    """Train a preset with each combination of some settings, and compare them on validation classes.

    Each combination is a run of ``preset.outer.steps`` meta-steps in its own folder. The same call resumes a sweep that
    was stopped, and trains no finished run again. The test classes are not looked at. A combination whose training
    diverges, or finds no usable gradient, is listed as failed, and the sweep goes on.

    Args:
        preset: the settings that all combinations share. If ``preset.validation.every`` is 0, each run is validated
            after its last meta-step. If the dataset then has no validation classes, ``preset.validation.held_out`` of
            its training classes are held out, or a tenth if this fraction is 0.
        over: for each setting, by its dotted path as in ``imaml presets NAME``, the values to try.
        directory: the folder for the folders of the runs.
        data: the folder of the dataset's files, as in :func:`imaml.train`.
        dataset: one's own data, as in :func:`imaml.train`.
        devices: as in :func:`imaml.train`.
        on_event: called with a message before each combination, and as in :func:`imaml.train`.
        on_warning: as in :func:`imaml.train`.
        on_progress: called after every meta-step of every run.

    Returns:
        A :class:`Sweep`. ``found.best.preset`` has the best settings.

    Raises:
        InputError: before any training, if a setting or a value is not accepted; and as :func:`imaml.train` does.

    ``found = imaml.sweep(preset, {"inner.step_size": [0.05, 0.1], "strength": [1, 2]}, "sweeps/first")`` trains four
    runs. ``print(found)`` shows the table.
    """
    combinations = presets_over(preset, over)
    trials: list[Trial] = []
    for number, (varied, chosen) in enumerate(combinations, start=1):
        folder = Path(directory) / ",".join(f"{path}={value}" for path, value in varied.items())
        on_event(f"[{number}/{len(combinations)}] {folder.name}")
        failure = stopped_by = None
        try:
            run = train(
                chosen, folder, data, dataset=dataset, devices=devices, on_event=on_event, on_warning=on_warning,
                on_progress=on_progress, evaluation_tasks=0,
            )  # fmt: skip
            stopped_by = run.stopped_by
        except TrainingFailed as error:
            failure = str(error)
        trials.append(_trial(varied, chosen, folder, failure))
        if stopped_by is not None:
            return Sweep(preset.name, preset.episode.metric, tuple(trials), stopped_by)
    return Sweep(preset.name, preset.episode.metric, tuple(trials))


def presets_over(preset: Preset, over: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], Preset]]:
    """Return the combinations of a sweep: the varied settings by path, and the preset with these settings.

    Args:
        preset: the settings that all combinations share.
        over: the values of each varied setting, as numbers or as text.

    Raises:
        InputError: if a setting or a value is not accepted, if a value is given twice, or if there is nothing to vary.
    """
    enough = bool(over) and all(len(values) for values in over.values())
    check(enough, "a sweep needs a setting with values to try, such as over={'strength': [1, 2]}")
    check("outer.steps" not in over, "the runs of a sweep have the same number of meta-steps: do not vary outer.steps")
    if not preset.validation.every:
        validation = preset.validation
        held_out = validation.held_out or HELD_OUT
        preset = replace(preset, validation=replace(validation, every=preset.outer.steps, held_out=held_out))
    # Override the algorithm first: it replaces the inner loop, whose settings other paths may vary.
    paths = sorted(over, key=lambda path: path != "algorithm")
    found = []
    for values in itertools.product(*(over[path] for path in paths)):
        chosen, varied = preset, {}
        for path, value in zip(paths, values, strict=True):
            path = current_path(chosen, path)
            chosen = override(chosen, path, str(value))
            varied[path] = settings(chosen)[path]
        check(varied not in [other for other, _ in found], f"{varied} is there twice: give each value once")
        found.append((varied, chosen))
    return found


def _trial(varied, chosen, folder, failure):
    log = read_log(folder)
    validated = [entry for entry in log if entry.validation is not None and math.isfinite(entry.validation)]
    found = [] if failure is not None else validated
    pick: Any = max if chosen.episode.metric == "accuracy" else min
    best = pick(found, key=lambda entry: entry.validation, default=None)
    return Trial(
        settings=varied,
        preset=chosen,
        directory=folder,
        value=math.nan if best is None else best.validation,
        interval=math.nan if best is None else best.validation_interval,
        step=None if best is None else best.step,
        seconds=time_of(log)[0],
        failure=failure,
    )
