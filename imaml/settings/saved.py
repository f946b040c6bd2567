"""Settings that a run saved, read back by a version whose records have gained or renamed fields since.

Checkpoints, the records of :mod:`imaml.reproduction` and ``result.json`` hold what :meth:`imaml.Preset.config` gave.
Those files are never rewritten: :func:`completed` translates what was read.
"""

import dataclasses
import json
from typing import Any

from imaml.errors import InputError, check
from imaml.settings.preset import NO_SETTINGS, Preset
from imaml.settings.renamed import with_current_names


def completed(record: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config``, saved by this or an earlier version, with the fields that this version has.

    A renamed field gets its present name; see :data:`imaml.settings.renamed.RENAMED`. A field that was added later gets
    its default, which is what was done before there was the field.

    Args:
        record: a preset of the kind that the config was saved of.
        config: what its :meth:`Preset.config` was then.
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
    """``chosen`` with the settings that :meth:`Preset.config` once gave, of this or a former version.

    Raises:
        InputError: for settings this version does not know, or that it needs and the other did not have.
    """
    foreign = f"the settings of {chosen.name} were saved by another version"
    try:
        chosen = chosen.using(config.get("algorithm", "imaml"))
        config = completed(chosen, config)
        restored = _with_settings(chosen, config)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{foreign}: {error}") from error
    check(restored.config() == config, f"{foreign}, which had others")
    return restored


def _with_settings(record, config):
    def value_of(key, value):
        if isinstance(value, dict):
            return _with_settings(getattr(record, key), value)
        return tuple(value) if isinstance(value, list) else value

    return dataclasses.replace(record, **{key: value_of(key, value) for key, value in config.items()})
