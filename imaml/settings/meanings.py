"""The settings of all presets with their meanings, read from the source of the records without importing them.

``imaml train --help`` lists every setting. A setting is a field of a record, such as a preset or a solver. The modules
that define the records import JAX, which takes most of a second. This module therefore parses their source files, and
takes the meaning of each field from the ``Args:`` section of its record.
:func:`imaml.settings.overrides.settings` returns the settings of one preset with their values.
"""

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

NO_SETTINGS = ("citation", "departures", "baselines")
"""Fields of a preset that :meth:`imaml.Preset.config` leaves out, because they do not affect the results of a run."""
FIXED = ("name", "dataset", "fidelity", *NO_SETTINGS)
"""Fields of a preset that cannot be changed on the command line."""

VALUES = {"bool": "true|false", "int": "N", "float": "X", "str": "WORD"}
"""The types of settings, each with a placeholder for its value."""


@dataclass(frozen=True)
class Setting:
    """A setting that some preset has.

    Attributes:
        path: the dotted path, such as ``"inner.max_steps"``.
        value: a placeholder for the value: ``"N"``, ``"X"``, ``"WORD"`` or ``"true|false"``.
        meaning: a description in plain text. A component of a preset can have several types: ``inner`` can be one of
            two solvers. If these types give the setting different meanings, or if only some of them have it, the
            description has the name of each type before the meaning for that type.
    """

    path: str
    value: str
    meaning: str


def settings_with_meanings() -> tuple[Setting, ...]:
    """Return the settings of all presets whose components have the types that :class:`imaml.Preset` declares.

    The settings are in the order of the fields of the preset.

    >>> next(setting for setting in settings_with_meanings() if setting.path == "outer.steps")
    Setting(path='outer.steps', value='N', meaning='meta-steps of a run.')
    """
    preset = _find("imaml.settings.preset", "Preset")
    found = []
    for field in _fields(preset):
        if field.name in FIXED:
            continue
        if field.value:
            found.append(Setting(field.name, field.value, field.meaning))
            continue
        kinds = [_find(preset.module, name) for name in field.records]
        inside: dict[str, dict[str, _Field]] = {}
        for kind in kinds:
            for inner in _fields(kind):
                if inner.value:
                    inside.setdefault(inner.name, {})[kind.node.name] = inner
        for name, by_kind in inside.items():
            value = next(iter(by_kind.values())).value
            found.append(Setting(f"{field.name}.{name}", value, _joined(by_kind, len(kinds))))
    return tuple(found)


def _joined(by_kind, kinds):
    """Return the meanings of a setting as one text.

    The text names the types if they give the setting different meanings, or if some type does not have the setting.
    """
    meanings = {kind: field.meaning for kind, field in by_kind.items()}
    if len(set(meanings.values())) == 1 and len(meanings) == kinds:
        return next(iter(meanings.values()))
    return " ".join(f"{kind}: {meaning}" for kind, meaning in meanings.items())


# --- Records in source files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """A class definition, and the module that contains it."""

    module: str
    node: ast.ClassDef


@dataclass(frozen=True)
class _Field:
    """A field of a record. It is a setting if ``value`` is not empty.

    Otherwise ``records`` has the names of the records that the field may hold.
    """

    name: str
    value: str
    records: tuple[str, ...]
    meaning: str


def _find(module: str, name: str) -> _Record:
    """Return the class called ``name`` in a module.

    The module must define or import the class, or import the module of the class under an alias. With an alias ``bl``,
    ``name`` is ``bl.Name``.
    """
    first, _, rest = name.partition(".")
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Record(module, node)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == first and not rest:
                    return _find(node.module, alias.name)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name) == first and rest:
                    return _find(alias.name, rest)
    raise LookupError(f"{module} neither defines nor imports {name}")


@functools.cache
def _tree(module: str) -> ast.Module:
    package, *parts = module.split(".")
    spec = find_spec(package)  # the spec of a package is found without importing the package
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], *parts)
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))


def _fields(record: _Record) -> Iterator[_Field]:
    meanings = _arguments(inspect.cleandoc(ast.get_docstring(record.node) or ""))
    for node in record.node.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotated = ast.unparse(node.annotation).split(" | ")
            kinds = [kind for kind in annotated if kind != "None"]
            word = "WORD" if kinds[0].startswith("Literal[") else VALUES.get(kinds[0], "")
            plain = word and "None" not in annotated  # a field that may be None is not a setting
            records = tuple(kind for kind in kinds if re.fullmatch(r"(\w+\.)?[A-Z]\w*", kind))
            yield _Field(node.target.id, word if plain else "", records, meanings.get(node.target.id, ""))


def _arguments(docstring: str) -> dict[str, str]:
    """Return the descriptions in the ``Args:`` section of a docstring, without markup, by the name of the argument."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: _plain(" ".join(text.split())) for name, text in entries}


def _plain(text: str) -> str:
    """Return a text without the markup of docstrings: roles such as ``:func:`name```, and literals."""
    return re.sub(r"(:\w+:)?`{1,2}[~.]?([^`]+)`{1,2}", r"\2", text)
