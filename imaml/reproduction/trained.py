"""The trained parameters of recorded runs: ``NAME.safetensors`` next to the record ``NAME.json``."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import imaml.datasets as datasets
from imaml.errors import InputError, check_choice
from imaml.reproduction import records
from imaml.runs.checkpoints import named_leaves
from imaml.runs.evaluation import check_same_data, evaluate_classes
from imaml.runs.results import Evaluation
from imaml.settings.preset import Preset
from imaml.settings.published_presets import restore
from imaml.storage import safetensors
from imaml.storage.arrays import DamagedFile

SUFFIX = ".safetensors"


def save(path: Path, theta: Any) -> None:
    """Write parameters to a safetensors file. The arrays have the names of the parameters, such as ``block0/kernel``.

    Args:
        path: the file to create or to replace.
        theta: a pytree of arrays.
    """
    safetensors.write(path, {name: np.asarray(leaf) for name, leaf in named_leaves(theta)}, {"format": "imaml"})


def load(path: Path, preset: Preset) -> Any:
    """Return the parameters that :func:`save` wrote, as a pytree like the parameters of the preset's network.

    Raises:
        InputError: if there is no such file, if it is damaged, or if its arrays do not fit the network.
    """
    try:
        found = safetensors.read(path)
    except FileNotFoundError:
        raise InputError(f"there are no trained parameters in {path}") from None
    except DamagedFile as error:
        raise InputError(f"{path} is damaged: {error}") from error
    like = jax.eval_shape(preset.functions.init, jax.random.key(0))
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in named_leaves(like)}
    if {name: (array.shape, array.dtype) for name, array in found.items()} != wanted:
        raise InputError(f"the arrays in {path} do not fit the network of {preset.name}")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(found[name]) for name in wanted])


def names(directory: Path = records.KEPT) -> tuple[str, ...]:
    """Return the names of the records in a folder that have trained parameters."""
    return tuple(sorted(path.stem for path in directory.glob(f"*{SUFFIX}")))


def evaluate(name: str, tasks: int = 600, data: str | Path | None = None, directory: Path = records.KEPT) -> Evaluation:
    """Evaluate the trained parameters of a record, by default on the 600 tasks of the recorded evaluation.

    Args:
        name: one of :func:`names`.
        tasks: number of tasks, at least 2.
        data: the folder of the dataset's files, for a dataset that is read from files.
        directory: the folder of the records.

    Raises:
        InputError: if no record of that name has parameters, if one of its files is damaged, if the data differ from
            those of the recorded run, or for fewer than 2 tasks.
    """
    check_choice("record with trained parameters", name, names(directory))
    record = records.read_one(directory / f"{name}.json")
    preset = restore(record.preset, record.config)
    theta = load(directory / f"{name}{SUFFIX}", preset)
    dataset = datasets.load(preset.dataset, data)
    check_same_data(name, preset.dataset, dataset.fingerprint(), record.split)
    return evaluate_classes(theta, preset, dataset.test, tasks)
