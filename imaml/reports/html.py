"""The HTML of a report: elements with escaped text, tables, inline images, and a whole page."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Html(str):
    """Text that is already HTML. :func:`element` escapes every other text."""


def element(name: str, *children: str | None, **attributes: object) -> Html:
    """Return an HTML element.

    Args:
        name: the name of the tag.
        children: the content: other elements, or text, which is escaped. None is left out.
        attributes: the attributes. An underscore at the end of a name is removed, and other underscores become dashes.
            An attribute of None is left out.

    >>> element("p", "θ < φ", element("b", "!"), class_="note")
    '<p class="note">θ &lt; φ<b>!</b></p>'
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>{joined(*children)}</{name}>")


def joined(*children: str | None) -> Html:
    """Return elements and escaped text one after the other."""
    parts = (child if isinstance(child, Html) else html.escape(child) for child in children if child is not None)
    return Html("".join(parts))


def section(title: str, *children: str | None) -> Html:
    """Return a section of the page with a heading."""
    return element("section", element("h2", title), *children)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> Html:
    """Return a table that scrolls sideways where the window is too narrow.

    Args:
        header: the names of the columns.
        rows: the cells of each row: text or elements.
        numbers: the indices of the columns that are aligned on the right.
    """
    right = set(numbers)

    def row(kind, cells):
        return element("tr", *(element(kind, c, class_="number" if i in right else None) for i, c in enumerate(cells)))

    body = element("tbody", *(row("td", cells) for cells in rows))
    return element("div", element("table", element("thead", row("th", header)), body), class_="wide")


def image(pixels: Any, text: str, **attributes: object) -> Html:
    """Return an image element with its PNG inline.

    Args:
        pixels: ``[height, width, channels]``, uint8 or floats in [0, 1]. Three channels are shown in colour. For any
            other number of channels, their mean is shown in grey.
        text: the text for readers who do not see the image.
        attributes: further attributes of the element.
    """
    return Html(element("img", src=f"data:image/png;base64,{_png(pixels)}", alt=text, **attributes)[: -len("</img>")])


def page(title: str, *children: str | None) -> str:
    """Return a whole HTML document. Its style is inline, and follows the light or dark scheme of the reader."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        Html(f"<style>\n{style}</style>"),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', element('main', *children)), lang='en')}\n"


def _png(pixels):
    from PIL import Image

    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        pixels = np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    if pixels.shape[-1] != 3:
        pixels = np.rint(pixels.mean(-1)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
