"""The error for invalid input. The command line prints the message without a traceback and exits with status 2."""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """An option, setting, file or argument that cannot be used. The message names the problem and often the remedy."""


class TrainingFailed(InputError):
    """Training that diverges, or in which no task has a usable gradient, with the given settings."""


def check(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` if ``condition`` is false."""
    if not condition:
        raise InputError(message)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise :class:`InputError` if ``value`` is not in ``known``.

    The message lists ``known`` and, if a valid value is similar to ``value``, suggests the most similar one.

    Args:
        name: the noun for the message, such as ``"algorithm"``.
        value: the value to check.
        known: all valid values.

    Raises:
        InputError: if ``value`` is not in ``known``.
    """
    if value not in known:
        raise unknown(name, value, known)


def unknown(name: str, value: object, known: Sequence[str]) -> InputError:
    """Return the error of :func:`check_choice` for a value that is not in ``known``."""
    hints = [suggestion(value, known), f"known: {', '.join(known)}"]
    return InputError(f"there is no {name} {value!r}: {' '.join(filter(None, hints))}")


def suggestion(word: object, known: Iterable[str], otherwise: str = "") -> str:
    """Return ``"did you mean X?"`` for the :func:`nearest` word X, or ``otherwise`` if no word is similar."""
    near = nearest(word, known)
    return otherwise if near is None else f"did you mean {near}?"


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the word in ``known`` that is most similar to ``word``; None if no word is similar.

    Words are similar if their similarity, as :func:`difflib.get_close_matches` defines it, is at least ``cutoff``.

    The dashes before the name of an option are not compared, because every option has them.

    >>> nearest("--suport", ["--support", "--start"]), nearest("--suport", ["--start"])
    ('--support', None)
    """
    bare = {each.lstrip("-"): each for each in known}
    near = difflib.get_close_matches(str(word).lstrip("-"), bare, n=1, cutoff=cutoff)
    return bare[near[0]] if near else None
