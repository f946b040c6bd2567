"""Text tables and numbers, as the reports of verification print them."""

import dataclasses
import functools
import textwrap
from collections.abc import Sequence

WIDTH = 100
"""Number of characters in a line of running text."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with columns aligned at the left and two spaces between them.

    Example:
        >>> print(table(("a", "b"), [("1", "2"), ("333", "4")]))
        a    b
        1    2
        333  4
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = ((cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def wrapped(text: str, indent: str = "  ") -> str:
    """Return ``text`` in lines of at most 100 characters; those after the first are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False)


def label(value: object) -> str:
    """Return the name of a configuration with the settings that differ from the defaults: ``Implicit(CG(5))``.

    Example:
        >>> from bilevel import CG, GMRES, Implicit
        >>> label(Implicit(CG(5))), label(GMRES(5, ridge=0.1))
        ('Implicit(CG(5))', 'GMRES(5, ridge=0.1)')
    """
    if isinstance(value, functools.partial):
        return label(value.func)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__name__", None) or (
            value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else repr(value)
        )
    parts, positional = [], True
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if field.default is not dataclasses.MISSING and entry == field.default:
            positional = False
            continue
        parts.append(label(entry) if positional else f"{field.name}={label(entry)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def figure(number: float | None) -> str:
    """Return a number with three significant digits as text, or a dash for None."""
    return "—" if number is None else f"{number:.3g}"
