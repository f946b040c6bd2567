"""The TOML file of ``--config``: options and settings of a command."""

import argparse
import tomllib
from pathlib import Path
from typing import NamedTuple

from imaml.arguments.parser import Parser
from imaml.errors import InputError, unknown
from imaml.settings.paths import flat

SAME_AS = {"meta-steps": "outer.steps"}
"""The options that mean the same as a setting, each with the path of the setting."""


class Override(NamedTuple):
    """A setting as typed on the command line, or as written in a TOML file.

    Attributes:
        path: the dotted path.
        text: the value, or None if none was typed.
        file: the TOML file; None for the command line.
    """

    path: str
    text: str | None
    file: Path | None = None

    @property
    def name(self) -> str:
        """The setting as the user wrote it, for messages."""
        return f"--{self.path}" if self.file is None else self.path


def apply(file: Path, command: Parser, with_settings: bool) -> list[Override]:
    """Make the options in a TOML file the defaults of a command, and return the settings in the file.

    A key is the name of an option without dashes, the placeholder of a positional argument in lower case, or the path
    of a setting, which may be divided into tables. Underscores in the name of an option count as dashes.

    Args:
        file: the TOML file.
        command: the parser of the command. An argument that the file has is no longer required.
        with_settings: whether the command accepts settings. If so, each key that is not an option counts as a setting.

    Raises:
        InputError: if the file is not TOML, if a key is unknown, or if a value does not suit its option.
        OSError: if the file cannot be read.
    """
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not TOML: {error}") from error
    found = []
    for key, value in flat(content).items():
        name = key.replace("_", "-")
        if name == "config":
            raise InputError(f"{file}: a file cannot name another one: remove {key}")
        if name in SAME_AS and with_settings:
            found.append(Override(SAME_AS[name], _text(file, key, value), file))
        elif name in command.named:
            _set_default(file, key, command, command.named[name], value)
        elif with_settings:
            found.append(Override(key, _text(file, key, value), file))
        else:
            raise InputError(f"{file}: {unknown('option', key, [each for each in command.named if each != 'config'])}")
    return found


def _text(file, key, value):
    """Return a value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        return str(value)
    raise InputError(f"{file}: {key} takes one number, word or switch, got {value!r}")


def _set_default(file, key, command, action, value):
    switch = isinstance(action.const, bool)
    if switch != isinstance(value, bool):
        raise InputError(f"{file}: {key} takes {'true or false' if switch else 'a number or a word'}, got {value!r}")
    if switch:
        value = action.const if value else action.default  # action.const is False for --last
    elif isinstance(action.default, list):  # an option that can be given several times
        value = [_converted(file, key, action, each) for each in (value if isinstance(value, list) else [value])]
    else:
        value = _converted(file, key, action, value)
    command.set_defaults(**{action.dest: value})
    action.required = False


def _converted(file, key, action, value):
    """Return the value of an option, converted from its text as argparse would convert it."""
    text = _text(file, key, value)
    try:
        return text if action.type is None else action.type(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{file}: {key}: {error}") from error
    except ValueError:
        raise InputError(f"{file}: {key} takes a whole number, got {text!r}") from None
