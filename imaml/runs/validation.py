"""Validation during training: it chooses the best meta-step of a run, and may end the run early.

Validation tasks are drawn from validation classes. The test classes are not used.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from imaml.errors import check
from imaml.parallel.devices import from_first
from imaml.runs.evaluation import mean_scores, scores_of
from imaml.runs.log import Progress
from imaml.settings.preset import Preset


@dataclass(frozen=True)
class Selection:
    """The best validation of a run so far.

    Attributes:
        step: number of meta-steps before the best validation; 0 if there was no validation yet.
        value: accuracy or mean squared error of the best validation; NaN if there was none.
        waited: number of validations since the best one.
    """

    step: int = 0
    value: float = math.nan
    waited: int = 0

    def after(self, step: int, value: float, metric: str) -> "Selection":
        """Return the selection after another validation. Of two equal values, the earlier one counts as better."""
        better = value > self.value if metric == "accuracy" else value < self.value
        if self.step == 0 or better or (math.isnan(self.value) and not math.isnan(value)):
            return Selection(step, value)
        return replace(self, waited=self.waited + 1)

    def facts(self) -> dict[str, Any]:
        """Return the entry of a checkpoint's description, in JSON types."""
        return {"validation": asdict(self)}


class Validator:
    """The validations of a training run.

    Args:
        preset: the settings. ``preset.validation`` says when to validate.
        classes: the validation classes, or None for a run without validation.
        on_warning: called with a message if outputs of the network are not finite.

    Raises:
        InputError: if ``patience`` or ``held_out`` is set, but not ``every``.
    """

    def __init__(self, preset: Preset, classes: Any, on_warning: Callable[[str], None]):
        self._preset, self._settings, self._on_warning = preset, preset.validation, on_warning
        unused = not self._settings.every and (self._settings.patience or self._settings.held_out)
        check(not unused, "validation.patience and validation.held_out need validation.every, which is 0")
        self._scores = None if classes is None else scores_of(preset, classes, self._settings.tasks)

    def begin(self, saved: dict[str, Any] | None) -> Selection:
        """Return, in every process, the selection that process 0 has read from a checkpoint.

        Args:
            saved: the entry ``"validation"`` in a checkpoint's description, or None.
        """
        selection = Selection(**saved or {})
        step, value, waited = from_first(np.array([selection.step, selection.value, selection.waited], np.float64))
        return Selection(int(step), float(value), int(waited))

    def validated(self, progress: Progress, theta: Any) -> Progress:
        """Return ``progress`` with the validation of θ, if one is due after its meta-step."""
        due = self._settings.every and progress.step % self._settings.every == 0
        if self._scores is None or not (due or progress.step == progress.steps):
            return progress
        scores = self._scores(theta)
        values, intervals = mean_scores(scores, self._on_warning)
        found = from_first(np.array([values[0], intervals[0]], np.float64))
        return replace(progress, validation=float(found[0]), validation_interval=float(found[1]))

    def chosen(self, selection: Selection, progress: Progress) -> Selection:
        """Return the selection after a meta-step."""
        if progress.validation is None:
            return selection
        return selection.after(progress.step, progress.validation, self._preset.episode.metric)

    def ends(self, selection: Selection) -> bool:
        """Return True if the run stops early, because ``patience`` validations in a row were not better."""
        return 0 < self._settings.patience <= selection.waited

    def saved(self, selection: Selection, step: int) -> tuple[dict[str, Any], float | None]:
        """Return the facts about validation, and the loss, that a checkpoint after ``step`` meta-steps saves.

        The best checkpoint is the one with the least loss. The loss is finite only if the validation at ``step`` is the
        best so far. In a run without validation, there are no facts, and the loss is None.
        """
        if self._scores is None:
            return {}, None
        loss = 1 - selection.value if self._preset.episode.metric == "accuracy" else selection.value
        return selection.facts(), loss if step == selection.step and math.isfinite(loss) else math.inf
