"""Tables as text: aligned columns for a terminal, or Markdown."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], form: str = "terminal") -> str:
    """Return a table as text.

    Args:
        header: the names of the columns.
        rows: the cells of each row, as many as the header has.
        form: ``"terminal"``, with aligned columns and a rule below the header, or ``"markdown"``.

    >>> print(table(["run", "accuracy"], [["a", "85.1 %"], ["longer", "9 %"]]))
    run     accuracy
    ────────────────
    a       85.1 %
    longer  9 %
    """
    if form == "markdown":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
