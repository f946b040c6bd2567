"""Text tables: what the records of verification print as."""

import dataclasses
import functools
import textwrap
from collections.abc import Sequence

WIDTH = 100


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned at their left, two spaces between them.

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
    """``text`` in lines of at most :data:`WIDTH`, those after the first indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False)


def label(value: object) -> str:
    """A configuration's name with what is not its default: ``Implicit(CG(5))``.

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
    parts, in_order = [], True
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if field.default is not dataclasses.MISSING and entry == field.default:
            in_order = False
            continue
        parts.append(label(entry) if in_order else f"{field.name}={label(entry)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def figure(number: float | None) -> str:
    """Three digits, or a dash for what is not known."""
    return "—" if number is None else f"{number:.3g}"
