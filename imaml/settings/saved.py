"""Conversion of saved settings to the fields of this version, which may have added or renamed fields.

Checkpoints, the records of :mod:`imaml.reproduction` and ``result.json`` contain the result of
:meth:`imaml.Preset.config`. Checkpoints and ``result.json`` also contain the result of :meth:`imaml.Preset.types`. No
file is rewritten for a new version. :func:`completed` converts the settings after they are read.
"""

import dataclasses
import json
from typing import Any

import bilevel as bl
from imaml.errors import InputError, check
from imaml.learning.tasks import Curve, Episode
from imaml.settings.meanings import NO_SETTINGS
from imaml.settings.parts import MLP, Conv4, Outer, Rotations
from imaml.settings.preset import SAVED_IF_CHANGED, Preset
from imaml.settings.renamed import with_current_names
from imaml.settings.types import plain, type_name

PARTS: dict[str, Any] = {
    type_name(kind): kind
    for kind in (Episode, Curve, Rotations, Conv4, MLP, Outer, bl.GradientDescent, bl.HessianFree, bl.CG)
}
"""The types of a preset's components that can be restored from a file, by their saved names.

A component of another type is restored only if the preset to start from, for example a registered one, has a component
of that type in the same place. No type is imported by its name.
"""


def completed(record: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config with the field names of this version, and with the fields that were added since.

    A renamed field gets its present name; see :data:`imaml.settings.renamed.RENAMED`. A field that was added later gets
    its default, which stands for the behaviour of the versions without that field.

    Args:
        record: a preset whose components have the same types as those of the one that was saved.
        config: the result of :meth:`Preset.config`, from this or an earlier version. It is not modified.
    """
    filled = _with_defaults(record, with_current_names(record, config))
    return filled if not isinstance(record, Preset) else _as_saved(filled)


def _as_saved(config):
    """Leave out the fields that :meth:`Preset.config` leaves out while they have their defaults."""
    defaults = {name: dataclasses.asdict(value) for name, value in SAVED_IF_CHANGED.items()}
    return {name: value for name, value in config.items() if defaults.get(name, ...) != value}


def _with_defaults(record, config):
    filled = dict(config)
    for each in dataclasses.fields(record):
        if each.name in NO_SETTINGS:
            continue
        if each.default is not dataclasses.MISSING and each.name not in filled:
            filled[each.name] = json.loads(json.dumps(each.default, default=dataclasses.asdict))
        present = getattr(record, each.name)
        if dataclasses.is_dataclass(present) and isinstance(filled.get(each.name), dict):
            filled[each.name] = _with_defaults(present, filled[each.name])
    return filled


def with_config(chosen: Preset, config: dict[str, Any], types: dict[str, str] | None = None) -> Preset:
    """Return a copy of a preset with the settings of a saved config.

    Args:
        chosen: the preset to start from. It gives the fields that a config does not have, such as the citation.
        config: the result of :meth:`Preset.config`, from this or an earlier version.
        types: the result of :meth:`Preset.types` of the saved preset. None for a config of a version that did not save
            the types, which are then those of ``chosen``.

    Raises:
        InputError: if ``types`` has a type that neither this package nor ``chosen`` has, or if this version does not
            know a setting of the config, requires a setting that the config lacks, or refuses a value.
    """
    foreign = f"the settings of {chosen.name} were saved by another version"
    try:
        algorithm = config.get("algorithm", "imaml")
        chosen = chosen.using(algorithm) if types is None else _with_parts(chosen, config, types)
        config = completed(chosen, config)
        chosen = dataclasses.replace(chosen, **{k: v for k, v in SAVED_IF_CHANGED.items() if k not in config})
        restored = _with_settings(chosen, config)
    except InputError:
        raise
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise InputError(f"{foreign}: {error}") from error
    check(restored.config() == config, f"{foreign}, with different fields")
    return restored


def _with_parts(chosen, config, types):
    """Return a copy of a preset with the algorithm of a config, and with components of the saved types."""
    own = chosen.types()
    foreign = [
        f"{path} is {name}"
        for path, name in types.items()
        if own.get(path) != name and (name not in PARTS or path == "preset" or "." in path)
    ]
    if foreign:
        raise InputError(f"the preset {chosen.name} has a type that imaml does not define ({', '.join(foreign)})")
    parts = {}
    for path, name in types.items():
        if path == "preset" or "." in path:  # a record inside a component is restored with it
            continue
        if name in PARTS:
            fields = with_current_names(PARTS[name], config[path], path)
            parts[path] = PARTS[name](**{field: _as_setting(value) for field, value in fields.items()})
        else:
            part = getattr(chosen, path)
            parts[path] = _with_settings(part, with_current_names(part, config[path], path))
    algorithm = config["algorithm"]
    if algorithm != chosen.algorithm and chosen.baselines is not None:
        chosen = chosen.using(algorithm)  # with the citation and the departures of that algorithm
    return dataclasses.replace(chosen, algorithm=algorithm, fidelity=config["fidelity"], **parts)


def _with_settings(record, config):
    def value_of(key, value):
        present = getattr(record, key)
        if isinstance(value, dict):
            return _with_settings(present, value)
        if isinstance(present, type) or (callable(present) and not dataclasses.is_dataclass(present)):
            # A class or a function is saved by its name.
            check(plain(present) == value, f"{key} was {value} and is {plain(present)} now")
            return present
        return _as_setting(value)

    return dataclasses.replace(record, **{key: value_of(key, value) for key, value in config.items()})


def _as_setting(value):
    return tuple(value) if isinstance(value, list) else value
