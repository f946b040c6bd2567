"""Names of types and functions in settings.

The config of a preset has the values of fields, but not the types of the records that have these fields. A subclass
with the same fields gives the same config, although its tasks or its network are different. A run therefore saves the
names of the types as well.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imaml.errors import InputError

OWN_PACKAGES = ("imaml", "bilevel")
"""Types of these packages are named without their module, so that a later version may move them to another module."""


def type_name(kind: type) -> str:
    """Return the name under which a type is saved, such as ``"imaml.Episode"`` or ``"my_module.MyNetwork"``."""
    package = kind.__module__.partition(".")[0]
    return f"{package if package in OWN_PACKAGES else _imported_name(kind.__module__)}.{kind.__qualname__}"


def _imported_name(module):
    """Return the name of a module; for the running script, the name by which another script would import it."""
    running = sys.modules.get(module)
    if module != "__main__" or running is None:
        return module
    spec, file = getattr(running, "__spec__", None), getattr(running, "__file__", None)
    return spec.name if spec else Path(file).stem if file else module


def types_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path and the type's name of ``value``, if it is a record, and of each record inside it.

    Records are dataclasses and named tuples. Lists, tuples and dictionaries are searched for records.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, dict):
        inside = value
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value))
    else:
        return
    if type(value) not in (dict, list, tuple):
        yield path, type_name(type(value))
    for name, part in inside.items():
        yield from types_of(part, f"{path}.{name}" if path else str(name))


def plain(value: Any) -> Any:
    """Return a record as a dictionary of its fields, and a function or class by its name.

    ``json.dumps`` calls this function for each value that is not a JSON type.

    Raises:
        InputError: for other values, and for functions that have no name in a module, such as a lambda.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    name = getattr(value, "__qualname__", "")
    try:
        found = functools.reduce(getattr, name.split("."), sys.modules[value.__module__])
    except (AttributeError, KeyError):
        found = None
    if found is None or found is not value:
        raise InputError(
            f"the settings contain {value!r}, which a run's folder cannot store: settings are numbers, words, records, "
            "and functions that are defined at the top of a module"
        )
    return f"{_imported_name(value.__module__)}.{name}"
