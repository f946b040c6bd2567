"""The settings, the progress and the results of a run, read from the files in its folder for tables and reports."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaml.errors import InputError
from imaml.runs import checkpoints
from imaml.runs.folder import RESULT
from imaml.runs.log import Progress, read_log, time_of
from imaml.settings.paths import flat
from imaml.settings.preset import Preset
from imaml.settings.published_presets import restore


@dataclass(frozen=True)
class Summary:
    """Settings, progress and results of a run.

    Attributes:
        directory: the run's folder.
        preset: the name of the run's preset.
        settings: all settings by dotted path, as this version names them. If ``restored`` is None, the names are those
            in the checkpoint.
        types: the result of :meth:`Preset.types` for the run's preset. Empty for a run of a version that did not save
            it.
        data: the fingerprint of the data.
        versions: versions of Python, this package, jax, jaxlib and numpy, and the devices.
        step: number of meta-steps done.
        best_step: number of meta-steps before the best validation, whose parameters are the result; None if there
            was no validation.
        seconds: wall time of training, summed over resumptions.
        evaluations: the evaluations in ``result.json`` as dictionaries; empty if the run is not finished or was not
            evaluated.
        log: the entries of the run's log.
        restored: the preset. None if it cannot be restored, for example because it has a type of one's own.
    """

    directory: Path
    preset: str
    settings: dict[str, Any]
    types: dict[str, str]
    data: str
    versions: dict[str, str]
    step: int
    best_step: int | None
    seconds: float
    evaluations: tuple[dict[str, Any], ...]
    log: list[Progress]
    restored: Preset | None

    @property
    def tasks(self) -> int:
        """Number of training tasks that the run has seen."""
        return self.step * self.settings["outer.tasks"]

    @property
    def ended(self) -> bool:
        """True if the run has taken all of its meta-steps."""
        return self.step == self.settings["outer.steps"]

    @property
    def algorithm(self) -> str:
        """The algorithm, such as ``"imaml"``."""
        return self.settings.get("algorithm", "imaml")


def summary(directory: str | Path) -> Summary:
    """Return the summary of a run from the files in its folder.

    Args:
        directory: the run's folder. The run need not be finished.

    Raises:
        InputError: if the folder holds no intact checkpoint, a damaged result, or a checkpoint in a format that this
            version does not read.
    """
    directory = Path(directory)
    found = checkpoints.newest(directory)
    if found is None:
        raise InputError(f"there is no run in {directory}: it holds no intact checkpoint")
    description, log = found.description, read_log(directory)
    name, config, types = description["preset"], description["config"], description.get("types")
    try:
        restored = restore(name, config, types)
    except InputError:
        restored = None
    return Summary(
        directory=directory,
        preset=name,
        settings=flat(config if restored is None else restored.config()),
        types=types or {},
        data=description["data"],
        versions=description["versions"],
        step=found.step,
        best_step=description.get("validation", {}).get("step") or None,
        seconds=time_of(log)[0],
        evaluations=_evaluations(directory / RESULT),
        log=log,
        restored=restored,
    )


def evaluations_in(result: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the evaluations in the content of ``result.json``.

    Earlier versions wrote one evaluation only, with the query batch's statistics.
    """
    if "evaluations" in result:
        return tuple(result["evaluations"])
    former = dict(result["evaluation"])
    accuracy, normalisation = former.pop("accuracy"), former.pop("normalisation").split(",")[0]
    return ({"metric": "accuracy", "value": accuracy} | former | {"normalisation": normalisation},)


def _evaluations(path):
    try:
        return evaluations_in(json.loads(path.read_text()))
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged: it holds no evaluation") from error
