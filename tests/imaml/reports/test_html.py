"""Tests of the elements and charts of a report."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from imaml.reports.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, binned, chart, shares
from imaml.reports.html import element, image, joined, table


def test_text_and_attributes_are_escaped_and_elements_are_not():
    inner = element("b", "a < b & c")
    assert element("p", inner, "<i>", title='"x"') == (
        "<p title=\"&quot;x&quot;\"><b>a &lt; b &amp; c</b>&lt;i&gt;</p>"
    )  # fmt: skip
    assert joined("<", element("i"), None) == "&lt;<i></i>"
    assert "<td>&lt;script&gt;</td>" in table(["name"], [["<script>"]])


@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 2, 3)])
def test_an_image_holds_its_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    for given in (pixels, pixels.astype(np.float32) / 255):
        encoded = re.search(r"base64,([^\"]+)", image(given, "text"))[1]
        read = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        np.testing.assert_array_equal(read.reshape(shape), pixels)


def test_each_bin_of_a_log_has_the_mean_and_the_percentiles_of_its_finite_numbers():
    values = np.array([1.0, np.inf, 3.0, np.nan, np.nan, np.nan])
    steps, mean, low, high = binned(np.arange(1.0, 7.0), values, bins=2)
    np.testing.assert_array_equal(steps, [3, 6])
    np.testing.assert_array_equal(mean, [2, np.nan])
    np.testing.assert_allclose((low[0], high[0]), (1.2, 2.8))


def positions(html):
    """Return the points of the first line in a chart."""
    path = re.search(r'd="M([^"]+)" class="line', html)[1]
    return np.array([[float(number) for number in point.split()] for point in path.split("L")])


@pytest.mark.parametrize(
    "log, height_of_10", [(False, (HEIGHT - BOTTOM) + (9 / 99) * (TOP - HEIGHT + BOTTOM)), (True, 106)]
)
def test_points_are_drawn_where_the_axes_say(log, height_of_10):
    x, y = np.array([0.0, 5.0, 10.0, 7.0]), np.array([1.0, 10.0, 100.0, np.nan])
    html = chart("title", [Series("label", "blue", x, y)], "x", log=log)
    expected = [[LEFT, HEIGHT - BOTTOM], [(LEFT + WIDTH - RIGHT) / 2, height_of_10], [WIDTH - RIGHT, TOP]]
    np.testing.assert_allclose(positions(html), expected, atol=0.06)


def test_a_chart_without_a_point_says_so():
    for y in ([], [np.nan], [-1.0]):
        html = chart("title", [Series("label", "blue", np.arange(len(y)), np.array(y))], "x", log=True)
        assert "nothing to draw" in html and "<svg" not in html


def test_shares_fill_the_picture():
    html = shares("title", ["a", "b"], ["blue", "red"], np.array([10.0, 20.0]), np.array([[0.25, 0.75], [1.0, 0.0]]))
    areas = []
    for path in re.findall('d="(M[^"]+Z)"', html):
        areas += map(float, re.match(rf"M{LEFT} ([\d.]+)H[\d.]+V([\d.]+)", path).groups())
    assert areas == [HEIGHT - BOTTOM - 0.25 * (HEIGHT - BOTTOM - TOP), HEIGHT - BOTTOM, TOP, areas[0]]
