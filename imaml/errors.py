"""The one kind of error that a person can mend: the command line prints its sentence and exits with 2."""

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Something typed, configured or handed in cannot be used; the message says what, and what to do."""


def check(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise :class:`InputError` unless ``value`` is one of the ``known`` ones; the message names the nearest and all.

    Args:
        name: what is chosen, for the message: ``"algorithm"``.
        value: the one that was typed.
        known: all that exist.
    """
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"there is no {name} {value!r}: {hint}known: {', '.join(known)}")
