"""The parser of a command: it keeps its arguments by name, lists settings in its help, and suggests similar words."""

import argparse
from collections.abc import Callable, Sequence

from imaml.errors import InputError, suggestion
from imaml.runs.versions import versions
from imaml.settings.meanings import settings_with_meanings


class Parser(argparse.ArgumentParser):
    """Parser that raises errors of argparse as InputError, and keeps its arguments by name.

    Attributes:
        named: the arguments by their key in a TOML file: an option without its dashes, or the lower-case placeholder of
            a positional argument.
        options: the names of the options, such as ``"--out"``.
        actions: all arguments in the help, including the settings that :func:`add_settings` adds.
    """

    def __init__(self, *arguments, **keywords):
        self.named: dict[str, argparse.Action] = {}
        self.options: list[str] = []
        self.actions: list[argparse.Action] = []
        keywords.setdefault("formatter_class", lambda prog: argparse.HelpFormatter(prog, max_help_position=32))
        super().__init__(*arguments, allow_abbrev=False, **keywords)
        self.named.pop("help", None)

    def add_argument(self, *names, **keywords):
        action = super().add_argument(*names, **keywords)
        self.actions.append(action)
        self.options += [name for name in names if name.startswith("--")]
        name = action.option_strings[-1] if action.option_strings else str(action.metavar).lower()
        self.named[name.removeprefix("--")] = action
        return action

    def add_flag(self, name, help):
        """Add a switch. A hidden option ``--no-NAME`` switches it off if a TOML file has switched it on."""
        self.add_argument(f"--{name}", action="store_true", help=help)
        super().add_argument(
            f"--no-{name}", action="store_false", default=False, dest=name.replace("-", "_"), help=argparse.SUPPRESS
        )
        self.options.append(f"--no-{name}")

    def error(self, message):
        raise InputError(f"{message}; see '{self.prog} --help'")


class Version(argparse.Action):
    """Print the versions of imaml and its dependencies, and exit. They are looked up only for this option."""

    def __call__(self, parser, namespace, values, option_string=None):
        found = versions()
        print(f"imaml {found.pop('imaml')} ({', '.join(f'{name} {number}' for name, number in found.items())})")
        parser.exit()


def one_of(*words: str) -> Callable[[str], str]:
    """Return a function for argparse that accepts one of ``words``, and suggests a similar one for any other word."""

    def check(text):
        if text in words:
            return text
        hint = suggestion(text, words, f"choose from {', '.join(words)}")
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r}: {hint}")

    return check


def add_settings(command: Parser, values: dict[str, object] | None = None) -> None:
    """Add the settings to the help of a command.

    Args:
        command: the parser of a command that accepts the settings of a preset as options.
        values: the settings of one preset, with their values. With None, the settings of all presets are added, without
            values.
    """
    command.usage = "%(prog)s [PRESET] [OPTION ...] [--SETTING VALUE ...]"
    group = command.add_argument_group("settings of the preset")
    known = {setting.path: setting for setting in settings_with_meanings()}
    for path in known if values is None else values:
        setting = known.get(path)
        value, meaning = (setting.value, setting.meaning) if setting else ("VALUE", "")
        shown = meaning if values is None else f"{meaning} [{values[path]}]".strip()
        command.actions.append(group.add_argument(f"--{path}", metavar=value, help=shown.replace("%", "%%")))


def unknown_option(words: Sequence[str], options: Sequence[str], prog: str) -> InputError | None:
    """Return the error for the first unknown option before a lone ``--``; None if all options are known."""
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if name.startswith("--") and name not in options:
            hint = suggestion(name, options, f"see '{prog} --help'")
            return InputError(f"there is no option {name}: {hint}")
    return None
