"""Conversion of saved settings to this version, in which fields may have been added or renamed since.

Checkpoints, the records of :mod:`imaml.reproduction` and ``result.json`` contain the result of
:meth:`imaml.Preset.config`. These files are never rewritten: :func:`completed` translates their content after reading.
"""

import dataclasses
import json
from typing import Any

from imaml.errors import InputError, check
from imaml.settings.preset import NO_SETTINGS, Preset
from imaml.settings.renamed import with_current_names


def completed(record: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config with the field names of this version, and with the fields that were added since.

    A renamed field gets its present name; see :data:`imaml.settings.renamed.RENAMED`. A field that was added later gets
    its default, which is the behaviour of the versions before it.

    Args:
        record: a preset with the same kinds of parts as the one that was saved.
        config: the result of :meth:`Preset.config`, from this or an earlier version. It is not modified.
    """
    return _with_defaults(record, with_current_names(record, config))


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


def with_config(chosen: Preset, config: dict[str, Any]) -> Preset:
    """Return a copy of a preset with the settings of a saved config.

    Args:
        chosen: the preset of the name that was saved.
        config: the result of :meth:`Preset.config`, from this or an earlier version.

    Raises:
        InputError: if this version does not know a setting of the config, requires a setting that the config lacks, or
            refuses a value.
    """
    foreign = f"the settings of {chosen.name} were saved by another version"
    try:
        chosen = chosen.using(config.get("algorithm", "imaml"))
        config = completed(chosen, config)
        restored = _with_settings(chosen, config)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{foreign}: {error}") from error
    check(restored.config() == config, f"{foreign}, with different fields")
    return restored


def _with_settings(record, config):
    def value_of(key, value):
        if isinstance(value, dict):
            return _with_settings(getattr(record, key), value)
        return tuple(value) if isinstance(value, list) else value

    return dataclasses.replace(record, **{key: value_of(key, value) for key, value in config.items()})
