"""Charts as SVG elements. Their colours are CSS classes of ``page.css``, so they follow a light or dark page."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from imaml.reports.html import Html, element

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38


class Series(NamedTuple):
    """One line, or one set of dots, in a chart.

    Attributes:
        label: the name in the legend.
        style: the CSS class that gives the colour, such as ``"blue"``.
        x: numbers, ``[points]``.
        y: numbers, ``[points]``.
        low: lower ends of the band around a line, or of the error bars of dots; None for neither.
        high: upper ends.
        kind: ``"line"``, ``"dashed"`` or ``"dots"``. In the legend of :func:`shares`, ``"area"``.
    """

    label: str
    style: str
    x: Any
    y: Any
    low: Any = None
    high: Any = None
    kind: str = "line"


class _Axis(NamedTuple):
    """Scale of one axis, which maps the value ``low`` to the position ``start``, and ``high`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values):
        convert = np.log10 if self.log else np.asarray
        low, high = convert(self.low), convert(self.high)
        return self.start + (self.end - self.start) * (convert(values) - low) / (high - low)


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    log: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
    shown: Callable[[float], str] = "{:g}".format,
    note: str = "",
) -> Html:
    """Return a figure with a chart of lines, dots and bands.

    Args:
        title: the heading, which says what the y axis shows.
        series: what to draw. Points that are not finite are left out. A logarithmic axis also leaves out points at or
            below 0.
        x_label: the name of the x axis.
        log: whether the y axis is logarithmic.
        limits: the lower and the upper end of the y axis. An end of None is chosen to include all points. A logarithmic
            axis is extended to powers of ten.
        shown: a function that returns the text of a number at the y axis.
        note: a sentence below the chart.
    """
    series = [_drawable(each, log) for each in series]
    drawn = [each for each in series if len(each.x)]
    if not drawn:
        return _figure(title, [], element("p", "There is nothing to draw."), note)
    x = _axis([each.x for each in drawn], (None, None), LEFT, WIDTH - RIGHT)
    values = [part for each in drawn for part in (each.y, each.low, each.high) if part is not None]
    y = _axis(values, limits, HEIGHT - BOTTOM, TOP, log)
    marks = [mark for each in drawn for mark in _marks(each, x, y)]
    return _figure(title, drawn, _picture(title, marks, x, y, x_label, shown), note)


def shares(title: str, names: Sequence[str], styles: Sequence[str], x: np.ndarray, parts: np.ndarray) -> Html:
    """Return a figure with the shares of several kinds over the meta-steps, stacked up to 100 %.

    Args:
        title: the heading.
        names: the name of each kind, for the legend.
        styles: the CSS class of each kind.
        x: the right ends of the intervals over which the shares are taken, ``[intervals]``, ascending.
        parts: ``[intervals, kinds]``, with rows that sum to 1.
    """
    across = _axis([np.array([0.0, x[-1]])], (None, None), LEFT, WIDTH - RIGHT)
    up = _Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    tops = parts.cumsum(1)
    left, right = across(np.array([0.0, *x[:-1]])), across(x)
    marks = []
    for kind, style in enumerate(styles):
        high, low = up(tops[:, kind]), up(tops[:, kind] - parts[:, kind])
        path = "".join(
            f"M{_p(a)} {_p(t)}H{_p(b)}V{_p(u)}H{_p(a)}Z" for a, b, t, u in zip(left, right, high, low, strict=True)
        )
        marks.append(element("path", d=path, class_=f"area {style}"))
    keys = [Series(name, style, x, x, kind="area") for name, style in zip(names, styles, strict=True)]
    return _figure(title, keys, _picture(title, marks, across, up, "meta-step", "{:.0%}".format), "")


def binned(steps: np.ndarray, values: np.ndarray, bins: int = 120) -> tuple[np.ndarray, ...]:
    """Return the means of consecutive stretches of a log, each with its 10th and 90th percentile.

    Args:
        steps: the meta-steps, ``[entries]``.
        values: one number for each meta-step. Numbers that are not finite are left out of means and percentiles.
        bins: the largest number of stretches.

    Returns:
        The last meta-step of each stretch, the mean, the 10th and the 90th percentile. The last three are NaN for a
        stretch without a finite number.
    """
    stretches = np.array_split(np.arange(len(steps)), min(bins, max(1, len(steps))))
    rows = [(steps[each[-1]], *_summary(values[each])) for each in stretches if len(each)]
    return tuple(np.array(rows, float).reshape(-1, 4).T)


def _summary(values):
    values = values[np.isfinite(values)]
    return (values.mean(), *np.quantile(values, (0.1, 0.9))) if len(values) else (np.nan,) * 3


def _drawable(series, log):
    """Return the series without the points that cannot be drawn."""
    columns = [np.asarray(part, float) for part in (series.x, series.y)]
    band = [np.asarray(part, float) for part in (series.low, series.high) if part is not None]
    keep = np.isfinite(np.array(columns + band)).all(0)
    if log:
        keep &= (np.array([columns[1], *band]) > 0).all(0)
    kept = [part[keep] for part in columns + band]
    return series._replace(x=kept[0], y=kept[1], **dict(zip(("low", "high"), kept[2:], strict=False)))


def _axis(values, limits, start, end, log=False):
    every = np.concatenate(values)
    low = every.min() if limits[0] is None else limits[0]
    high = every.max() if limits[1] is None else limits[1]
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        return _Axis(low, high if high > low else 10 * low, start, end, True)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return _Axis(float(low), float(high), start, end)


def _ticks(axis):
    """Return at most seven round numbers on an axis."""
    if axis.log:
        first, last = round(math.log10(axis.low)), round(math.log10(axis.high))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        powers = range(first, last + 1, 1 + (last - first) // 6)
        return [factor * 10.0**power for power in powers for factor in factors if factor * 10.0**power <= axis.high]
    width = (axis.high - axis.low) / 5
    size = 10 ** math.floor(math.log10(width))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= width)
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def _marks(series, x, y):
    """Yield the SVG elements of a series."""
    across, up = x(series.x), y(series.y)
    if series.kind == "dots":
        for index, (a, b) in enumerate(zip(across, up, strict=True)):
            if series.low is not None:
                low, high = y(series.low[index]), y(series.high[index])
                yield element("path", d=f"M{_p(a)} {_p(low)}V{_p(high)}", class_=f"line {series.style}")
            yield element("circle", cx=_p(a), cy=_p(b), r=4, class_=f"area {series.style}")
        return
    if series.low is not None and len(across) > 1:
        band = [*zip(across, y(series.high), strict=True), *zip(across[::-1], y(series.low)[::-1], strict=True)]
        yield element("path", d=f"{_path(band)}Z", class_=f"band {series.style}")
    yield element("path", d=_path(zip(across, up, strict=True)), class_=f"line {series.style} {series.kind}")


def _picture(title, marks, x, y, x_label, shown):
    lines = []
    for value in _ticks(y):
        height = _p(y(value))
        lines.append(element("path", d=f"M{LEFT} {height}H{WIDTH - RIGHT}", class_="grid"))
        lines.append(element("text", shown(value), x=LEFT - 6, y=height, class_="left"))
    for value in _ticks(x):
        lines.append(element("text", f"{value:,g}".replace("-", "−"), x=_p(x(value)), y=HEIGHT - BOTTOM + 16))
    lines.append(element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5))
    clip = f"0 0 {WIDTH} {HEIGHT}"
    return element("svg", *lines, *marks, viewBox=clip, role="img", aria_label=title)


def _figure(title, series, picture, note):
    keys = [
        element("li", element("span", class_=f"key {each.style} {each.kind}"), each.label)
        for each in series
        if each.label
    ]
    legend = element("ul", *keys, class_="legend") if keys else None
    return element(
        "figure", element("figcaption", title), picture, legend, element("p", note, class_="note") if note else None
    )


def _path(points):
    return "M" + "L".join(f"{_p(a)} {_p(b)}" for a, b in points)


def _p(value):
    """Return a position with one digit after the point, which keeps the file small."""
    return f"{float(value):.1f}".removesuffix(".0")
