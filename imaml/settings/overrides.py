"""Settings by their dotted paths, as the command line names them: ``inner.step_size``, ``outer.tasks``."""

import dataclasses
import difflib
import math
from typing import Any

from imaml.errors import InputError, check
from imaml.settings.preset import FIXED, Preset

CHOICES = {"linear.engine": ("jaxopt", "watched")}
"""The settings below the top level that are words, by path, with the words that each takes."""


def override(chosen: Preset, path: str, text: str) -> Preset:
    """``chosen`` with the field at ``path`` ("strength", "inner.steps") read from ``text``.

    Another algorithm comes with its own inner loop, see :meth:`Preset.using`: override it first.

    Raises:
        InputError: for a path that does not exist, with those that do, and for a value of another type.
    """
    paths = settings(chosen)
    if path not in paths:
        near = difflib.get_close_matches(path, paths, n=1)
        hint = f"did you mean --{near[0]}? " if near else ""
        raise InputError(f"there is no setting --{path}: {hint}known: {', '.join(f'--{p}' for p in paths)}")
    if path == "algorithm":
        return chosen.using(text)
    return _replace(chosen, path.split("."), _parse(path, text, paths[path]))


def settings(chosen: Preset) -> dict[str, Any]:
    """Every setting that can be overridden and has a part in the numbers, by its dotted path, with its value."""
    found: dict[str, Any] = {}
    for name, value in _fields(chosen).items():
        idle = chosen.algorithm != "imaml" and name in ("strength", "linear")
        if name in FIXED or idle or value is None:
            continue
        if dataclasses.is_dataclass(value):
            below = {f"{name}.{inner}": v for inner, v in _fields(value).items()}
            found |= {path: v for path, v in below.items() if isinstance(v, bool | int | float) or path in CHOICES}
        else:
            found[name] = value
    return found


def _fields(record):
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _parse(path, text, present):
    if isinstance(present, bool):
        values = {"true": True, "false": False}
        check(text.lower() in values, f"--{path} takes true or false, got {text!r}")
        return values[text.lower()]
    if path in CHOICES:
        check(text in CHOICES[path], f"--{path} takes {' or '.join(CHOICES[path])}, got {text!r}")
        return text
    kind, what = (int, "a whole number") if isinstance(present, int) else (float, "a number")
    try:
        value = kind(text)
    except ValueError:
        raise InputError(f"--{path} takes {what}, got {text!r}") from None
    # Beyond this no count fits the compiled loops, and no seed a key.
    check(math.isfinite(value) if kind is float else abs(value) < 2**32, f"--{path} is out of range: {text!r}")
    return value


def _replace(record, path, value):
    if len(path) > 1:
        value = _replace(getattr(record, path[0]), path[1:], value)
    try:
        return dataclasses.replace(record, **{path[0]: value})
    except InputError:
        raise
    except ValueError as error:  # the generic layer's own checks
        raise InputError(str(error)) from error
