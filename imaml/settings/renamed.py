"""Renamed settings: a table from old to new field names, for saved runs and for the command line.

An entry of the table applies to a record only if the record has the new field and lacks the old one.
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    "inner": {"steps": "max_steps"},
    "linear": {"maxiter": "max_steps"},
    "baselines.*.inner": {"steps": "max_steps"},
}
"""For the dotted path of a record, the new names of its renamed fields by their old names. ``*`` matches any text."""


def with_current_names(record: Any, config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return a copy of ``config`` with the present name of each renamed field.

    Fields that ``record`` does not have under any name keep their names, so that the caller can refuse them.

    Args:
        record: a preset, one of its components, or the class of a component. The class is that of the saved record.
        config: the saved fields of ``record`` as nested dictionaries: the result of :meth:`imaml.Preset.config` in this
            or an earlier version, or the entry of a component in it.
        path: the dotted path of ``record`` in the preset; empty for the preset.
    """
    current = {}
    for name, value in config.items():
        name = _current_name(record, path, name, taken=config)
        if isinstance(value, dict) and dataclasses.is_dataclass(inner := getattr(record, name, None)):
            value = with_current_names(inner, value, f"{path}.{name}" if path else name)
        current[name] = value
    return current


def current_path(record: Any, path: str) -> str:
    """Return the present dotted path of a setting: ``"inner.max_steps"`` for the old path ``"inner.steps"``.

    A path that was not renamed, or that does not exist, is returned unchanged.

    Args:
        record: the preset.
        path: the dotted path as typed.
    """
    parent, _, name = path.rpartition(".")
    for part in filter(None, parent.split(".")):
        record = getattr(record, part, None)
    return f"{parent}.{_current_name(record, parent, name)}" if parent else path


def _current_name(record, path, name, taken=()):
    """Return the new name of a field, or ``name`` if it was not renamed or if its new name is in ``taken``."""
    if not dataclasses.is_dataclass(record):
        return name
    present = {field.name for field in dataclasses.fields(record)}
    for pattern, names in RENAMED.items():
        new = names.get(name)
        if fnmatchcase(path, pattern) and new in present and name not in present and new not in taken:
            return new
    return name
