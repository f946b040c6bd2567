"""Scripts that complete the command line in a shell. shtab writes them from the parsers of the commands."""

import shtab

from imaml.arguments.commands import FORMATS, LOGGERS, WITH_SETTINGS, parsers
from imaml.arguments.parser import add_settings
from imaml.datasets import BUILT_IN, FOLDER, registry
from imaml.datasets.omniglot_alphabets import SPLITS
from imaml.learning.algorithms import ALGORITHMS
from imaml.reproduction.commands import FORMS, WORKS
from imaml.runs import parameters
from imaml.settings.overrides import CHOICES
from imaml.settings.published_presets import presets

PLACES = {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE, "RUN": shtab.FILE}
"""The kind of path that a shell completes for each placeholder: a folder, or a file or folder."""


def script(shell: str) -> str:
    """Return a script that completes commands, options, settings, and those values that are words from a list.

    The names of presets and datasets are those of the packages that are installed now. After the installation of
    another package, make a new script.

    Args:
        shell: one of :data:`imaml.arguments.commands.SHELLS`.
    """
    parser, commands = parsers()
    for name, command in commands.items():
        if name in WITH_SETTINGS:
            add_settings(command)
        for action in command.actions:
            known = _words(name, action)
            if known:
                action.choices = known
            elif action.metavar in PLACES:
                action.complete = PLACES[action.metavar]  # type: ignore[attr-defined]  # shtab reads this attribute
    return shtab.complete(parser, shell)


def _words(command, action):
    """Return the words that an argument of a command takes; None if there is no list of them."""
    if action.metavar == "true|false":
        return ("true", "false")
    words = {
        "preset": presets(),
        "dataset": SPLITS if command == "data" else (*BUILT_IN, FOLDER, *registry.names()),
        "algorithm": tuple(ALGORITHMS),
        "record": parameters.names(),
        "part": ("test", "validation"),
        "ink": ("dark", "bright"),
        "work": tuple(WORKS),
        "format": FORMATS if command == "compare" else FORMS,
        "log": LOGGERS,
        **CHOICES,
    }
    return words.get(action.dest)
