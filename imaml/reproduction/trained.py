"""The trained parameters of recorded runs: ``NAME.safetensors`` next to the record ``NAME.json``."""

from pathlib import Path
from typing import Any

import imaml.datasets as datasets
from imaml.errors import check_choice
from imaml.reproduction import records
from imaml.runs import parameters
from imaml.runs.evaluation import check_same_data, evaluate_classes
from imaml.runs.results import Evaluation
from imaml.settings.preset import Preset
from imaml.settings.published_presets import restore


def save(path: Path, theta: Any, preset: Preset, record: records.Record) -> None:
    """Write parameters to a safetensors file that :func:`imaml.load` reads.

    Args:
        path: the file to create or to replace.
        theta: a pytree of arrays.
        preset: the preset that they were trained with.
        record: the record of the run that trained them.
    """
    facts: dict[str, Any] = {"data": record.split, "step": record.meta_steps, "versions": record.versions}
    if record.start:
        facts["start"] = {"from": record.start}
    parameters.write(path, theta, preset, facts)


def load(path: Path, preset: Preset) -> Any:
    """Return the parameters that :func:`save` wrote, as a pytree like the parameters of the preset's network.

    Raises:
        InputError: if there is no such file, if it is damaged, or if its arrays do not fit the network.
    """
    return parameters.restored_in_the_networks_dtypes(path, parameters.read(path)[1], preset)


def evaluate(name: str, tasks: int = 600, data: str | Path | None = None, directory: Path = records.KEPT) -> Evaluation:
    """Evaluate the trained parameters of a record, by default on the 600 tasks of the recorded evaluation.

    Args:
        name: one of :func:`.parameters.names`.
        tasks: number of tasks, at least 2.
        data: the folder of the dataset's files, for a dataset that is read from files.
        directory: the folder of the records.

    Raises:
        InputError: if no record of that name has parameters, if one of its files is damaged, if the data differ from
            those of the recorded run, or for fewer than 2 tasks.
    """
    check_choice("record with trained parameters", name, parameters.names(directory))
    record = records.read_one(directory / f"{name}.json")
    preset = restore(record.preset, record.config)
    theta = load(directory / f"{name}{parameters.SAFETENSORS}", preset)
    dataset = datasets.load(preset.dataset, data)
    check_same_data(name, preset.dataset, dataset.fingerprint(), record.split)
    return evaluate_classes(theta, preset, dataset.test, tasks)
