"""Fields of settings that were renamed: their old names in saved runs, and on the command line.

A field counts as renamed for a record that has the new name and not the old one. So the table may name a field before
the class that holds it is changed.
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    "inner": {"steps": "max_steps"},
    "linear": {"maxiter": "max_steps"},
    "baselines.*.inner": {"steps": "max_steps"},
}
"""Old field names with their new ones, by the dotted path of the record that holds them; ``*`` is any one name."""


def with_current_names(record: Any, config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return a copy of ``config`` with each renamed field under the name that ``record`` has for it now.

    Args:
        record: a dataclass of the kind that the config was saved of, here the preset itself.
        config: nested dictionaries, as :meth:`imaml.Preset.config` gave them in this version or an earlier one. Fields
            that no record has keep their names, for the caller to refuse.
        path: the dotted path of ``record`` in the preset; empty for the preset itself.
    """
    current = {}
    for name, value in config.items():
        name = _current_name(record, path, name, taken=config)
        if isinstance(value, dict) and dataclasses.is_dataclass(inner := getattr(record, name, None)):
            value = with_current_names(inner, value, f"{path}.{name}" if path else name)
        current[name] = value
    return current


def current_path(record: Any, path: str) -> str:
    """Return the dotted path that a setting has now: ``"inner.max_steps"`` for ``"inner.steps"``, once it is renamed.

    A path that was not renamed, or does not exist, is returned as it is.
    """
    parent, _, name = path.rpartition(".")
    for part in filter(None, parent.split(".")):
        record = getattr(record, part, None)
    return f"{parent}.{_current_name(record, parent, name)}" if parent else path


def _current_name(record, path, name, taken=()):
    """The new name of a field, or ``name`` itself where it was not renamed or its new name is ``taken`` as well."""
    if not dataclasses.is_dataclass(record):
        return name
    present = {field.name for field in dataclasses.fields(record)}
    for pattern, names in RENAMED.items():
        new = names.get(name)
        if fnmatchcase(path, pattern) and new in present and name not in present and new not in taken:
            return new
    return name
