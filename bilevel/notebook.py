"""HTML tables, in which a notebook shows reports and records."""

from collections.abc import Iterable, Sequence
from html import escape


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a table in HTML, with one paragraph below it for each note.

    A notebook shows an object as such a table if the method ``_repr_html_`` of its class returns one, as in the reports
    of this library. The page's own style applies, because the table sets no colours and no fonts.

    Args:
        header: the titles of the columns.
        rows: for each row, one cell of text for each column. Characters such as ``<`` are escaped.
        notes: sentences below the table.

    Raises:
        ValueError: if a row has another number of cells than the header.

    Example:
        >>> html_table(("a",), [("x < y",)], ["a note"])
        '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>x &lt; y</td></tr></tbody></table><p>a note</p>'
    """
    rows = list(rows)
    if wrong := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"html_table needs {len(header)} cells in each row, as in the header; got {wrong[0]}")
    body = "".join(_row("td", row) for row in rows)
    table = f"<table><thead>{_row('th', header)}</thead><tbody>{body}</tbody></table>"
    return table + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
