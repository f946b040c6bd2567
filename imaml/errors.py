"""The error for invalid input. The command line prints the message without a traceback and exits with status 2."""

import difflib
from collections.abc import Sequence


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
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"there is no {name} {value!r}: {hint}known: {', '.join(known)}")
