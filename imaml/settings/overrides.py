"""Overrides of single settings by their dotted path, such as ``inner.step_size`` or ``outer.tasks``."""

import dataclasses
import math
from typing import Any

from imaml.errors import InputError, check, nearest, suggestion
from imaml.learning.networks import PRODUCTS
from imaml.settings.meanings import FIXED
from imaml.settings.parts import CONVOLUTIONS
from imaml.settings.preset import Preset

CHOICES = {
    "linear.engine": ("jaxopt", "watched"),
    "network.convolutions": CONVOLUTIONS,
    "network.products": tuple(PRODUCTS),
}
"""The nested settings whose value is a word: the words that each setting accepts, by its dotted path."""


def override(chosen: Preset, path: str, text: str) -> Preset:
    """Return a copy of a preset with one setting changed.

    Override ``algorithm`` before any setting of the inner loop, because a change of the algorithm replaces the inner
    loop; see :meth:`Preset.using`.

    Args:
        chosen: the preset to start from.
        path: the dotted path of the setting, such as ``"strength"`` or ``"inner.max_steps"``.
        text: the new value as typed. The parsed value has the type of the present one.

    Raises:
        InputError: if the path is not one of :func:`settings`, if the text cannot be parsed, or if the preset refuses
            the value. For an unknown path, the message suggests a similar one, or lists all if none is similar.
    """
    paths = settings(chosen)
    if path not in paths:
        known = [f"--{each}" for each in paths]
        hint = suggestion(path, known, f"known: {', '.join(known)}")
        raise InputError(f"there is no setting --{path}: {hint}")
    if path == "algorithm":
        return chosen.using(text)
    return _replace(chosen, path.split("."), _parse(path, text, paths[path]))


def settings(chosen: Preset) -> dict[str, Any]:
    """Return the settings that can be overridden, as a dictionary from dotted path to present value.

    These are left out: the fields in ``FIXED``; fields that are None; nested values that are neither numbers nor
    switches, unless ``CHOICES`` lists them; and settings that the preset's algorithm does not use, such as ``strength``
    for MAML.
    """
    found: dict[str, Any] = {}
    for name, value in _fields(chosen).items():
        unused = chosen.algorithm != "imaml" and name in ("strength", "linear")
        if name in FIXED or unused or value is None:
            continue
        if dataclasses.is_dataclass(value):
            nested = {f"{name}.{inner}": v for inner, v in _fields(value).items()}
            found |= {path: v for path, v in nested.items() if isinstance(v, bool | int | float) or path in CHOICES}
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
        near = nearest(text, CHOICES[path])
        hint = f": did you mean {near}?" if near else ""
        check(text in CHOICES[path], f"--{path} takes {' or '.join(CHOICES[path])}, got {text!r}{hint}")
        return text
    kind, what = (int, "a whole number") if isinstance(present, int) else (float, "a number")
    try:
        value = kind(text)
    except ValueError:
        raise InputError(f"--{path} takes {what}, got {text!r}") from None
    # Loop counters of compiled programs and seeds of random keys have 32 bits.
    check(math.isfinite(value) if kind is float else abs(value) < 2**32, f"--{path} is out of range: {text!r}")
    return value


def _replace(record, path, value):
    if len(path) > 1:
        value = _replace(getattr(record, path[0]), path[1:], value)
    try:
        return dataclasses.replace(record, **{path[0]: value})
    except InputError:
        raise
    except ValueError as error:  # raised by the constructors of bilevel's solvers
        raise InputError(str(error)) from error
