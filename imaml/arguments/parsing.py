"""Parsing of a command line into the options of one command and, for some commands, a preset."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imaml.arguments import config_file
from imaml.arguments.commands import WITH_SETTINGS, parsers
from imaml.arguments.config_file import Override
from imaml.arguments.parser import Parser, add_settings, unknown_option
from imaml.errors import InputError, check_choice, nearest
from imaml.settings.meanings import settings_with_meanings


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command line, such as ``["train", "--strength", "0.5"]``.

    The result has one attribute for each argument of the command, and the name of the command as ``command``. For
    ``train``, ``verify`` and ``sweep``, the attribute ``chosen`` is the :class:`imaml.Preset` with all overridden
    settings. Options and settings in the TOML file of ``--config`` count as if they were typed first, so the words win
    over the file. For a setting with a deprecated path, a message is printed to stderr.

    Args:
        words: the words of the command line after ``imaml``.

    Raises:
        InputError: for words that cannot be used. For an unknown command, option or setting, the message suggests a
            similar one if there is one.
        OSError: if the TOML file cannot be read.
        SystemExit: after the text of ``--help`` or ``--version`` is printed.
    """
    parser, commands = parsers()
    before = [word for word in words[:1] if word.startswith("-")]
    if error := unknown_option(before, parser.options, parser.prog):
        raise error
    if not words or before:  # --help, --version, or no command
        return parser.parse_args(words)
    check_choice("command", words[0], tuple(commands))
    command, overrides = commands[words[0]], []
    with_settings = words[0] in WITH_SETTINGS
    if with_settings and {"-h", "--help"} & set(words):
        add_settings(command, _values(words[1]))
        return parser.parse_args([words[0], "--help"])
    if with_settings:
        words, overrides = _split(words, command.options)
    elif error := unknown_option(words, command.options, command.prog):
        raise error
    if file := _config(words, command):
        overrides = [*config_file.apply(file, command, with_settings), *overrides]
    options, unknown = parser.parse_known_args(words)
    if unknown:
        near = nearest(unknown[0], command.options) if unknown[0].startswith("-") else None
        command.error(f"unrecognized arguments: {' '.join(unknown)}" + (f": did you mean {near}?" if near else ""))
    if with_settings:
        options.chosen = _chosen(options, overrides, command.options)
    return options


def _values(word):
    """Return the settings of the preset called ``word`` with their values; None if ``word`` is an option."""
    if word.startswith("-"):
        return None
    from imaml.settings.overrides import settings
    from imaml.settings.published_presets import preset

    return settings(preset(word))


def _config(words, command: Parser) -> Path | None:
    """Return the value of ``--config``; None if the words do not have this option."""
    alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    alone.add_argument("--config", type=Path)
    try:
        return alone.parse_known_args(words)[0].config
    except argparse.ArgumentError as error:
        command.error(str(error))


def _split(words, options):
    """Split the arguments of a command into those for argparse, and overrides of settings.

    A setting is written ``--path value`` or ``--path=value``. Every option that is not in ``options`` counts as a
    setting. The text of the override is None if no value follows.
    """
    known, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in options:
            known.append(word)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else None
        overrides.append(Override(option[2:], value))
    return known, overrides


def _chosen(options, overrides, known):
    """Return the preset of a command with the overridden settings. ``known`` lists the command's options."""
    from imaml.settings.published_presets import preset, presets

    chosen = preset(presets()[0] if options.preset is None else options.preset)
    if getattr(options, "meta_steps", None) is not None:
        overrides = [*overrides, Override("outer.steps", options.meta_steps)]
    # Override the algorithm first, and once: it replaces the inner loop, whose settings other overrides may change.
    algorithms = [each for each in overrides if each.path == "algorithm"][-1:]
    for each in (*algorithms, *(each for each in overrides if each.path != "algorithm")):
        chosen = _overridden(chosen, each, options.command, known)
    return chosen


def _overridden(chosen, each: Override, command, known):
    from imaml.settings.overrides import override, settings
    from imaml.settings.renamed import current_path

    current = current_path(chosen, each.path)
    prefix = "" if each.file is None else f"{each.file}: "
    if current not in settings(chosen):
        raise InputError(f"{prefix}{_no_setting(each, chosen, command, known, settings(chosen))}")
    if each.text is None:
        raise InputError(f"--{each.path} needs a value")
    if current != each.path:
        print(f"imaml {command}: {prefix}{each.name} is deprecated: use --{current}", file=sys.stderr)
    try:
        return override(chosen, current, each.text or "")
    except InputError as error:
        raise InputError(f"{prefix}{error}") from error


def _no_setting(each: Override, chosen, command, options, settings):
    """Return the message for a setting that is mistyped, or that the preset with its algorithm does not have."""
    every = f"see 'imaml {command} {chosen.name} --help'"
    if each.path in {setting.path for setting in settings_with_meanings()}:
        return f"there is no setting {each.name} in {chosen.name} with algorithm {chosen.algorithm}: {every}"
    dashes = "--" if each.file is None else ""
    near = nearest(each.path, [*options, *settings])
    hint = every if near is None else f"did you mean {dashes}{near.lstrip('-')}?"
    return f"there is no {'setting' if near in settings else 'option'} {each.name}: {hint}"
