"""The parameters that a run starts from instead of drawing them, for fine-tuning on other data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.runs import learner, parameters
from imaml.runs.checkpoints import named_leaves
from imaml.runs.results import Run
from imaml.settings.preset import Preset

ORIGIN = ("preset", "dataset", "step", "data")
"""The facts that a new run keeps about the run that trained its first parameters."""


def read_start(
    preset: Preset, start: str | Path | Run | Any, on_event: Callable[[str], None]
) -> tuple[Any, dict[str, Any]]:
    """Return the parameters θ that a run starts from, and where they come from.

    Args:
        preset: the settings of the new run.
        start: a run's folder, a file of trained parameters, the name of a record in the package, a
            :class:`imaml.Run`, a :class:`imaml.TrainedLearner` or parameters θ. None to draw θ with the seed of the
            preset.
        on_event: called with a message if the checkpoint of a run is missing or damaged and another one is used.

    Returns:
        θ, and a description in JSON types with the entry ``"start"``. The entry has ``from``, the place of the
        parameters in words; ``sha256``, the digest of the arrays and their names; and those facts in :data:`ORIGIN`
        that are known. If ``start`` is None, θ is None and the description is empty.

    Raises:
        InputError: if there is no run or file, if it is damaged, or if the arrays do not have the shapes and dtypes of
            the network's parameters.
    """
    if start is None:
        return None, {}
    where, named, origin = _read(start, on_event)
    theta = parameters.restored_in_the_networks_dtypes(where, named, preset)
    facts = {"from": str(where), "sha256": parameters.digest(named_leaves(theta))}
    return theta, {"start": facts | {key: origin[key] for key in ORIGIN if key in origin}}


def _read(start, on_event):
    """Return the place of a start in words, its arrays with their names, and facts about the run that trained them."""
    if isinstance(start, str | Path):
        place = parameters.place_of(start)
        description, named = learner.read_trained(place, None, on_event)
        description = description or {}
        dataset = description.get("config", {}).get("dataset")
        return place.absolute(), named, description | {"dataset": dataset}
    if isinstance(start, Run):
        data = {} if start.dataset is None else {"data": start.dataset.fingerprint()}
        facts = _of_preset(start.preset) | {"step": start.best_step or start.step, **data}
        return start.directory.absolute(), _named(start.theta), facts
    if isinstance(start, learner.TrainedLearner):
        return "a trained learner", _named(start.theta), dict(start.facts) | _of_preset(start.preset)
    return "parameters", _named(start), {}


def _of_preset(preset):
    return {"preset": preset.name, "dataset": preset.dataset}


def _named(theta):
    return [(name, np.asarray(leaf)) for name, leaf in named_leaves(jax.tree.map(jnp.asarray, theta))]
