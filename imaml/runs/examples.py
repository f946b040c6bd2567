"""Conversion of a user's images, labels of any type and regression targets to the arrays that a network takes."""

import contextlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.errors import InputError, check
from imaml.learning.tasks import Episode
from imaml.settings.preset import Preset

Labels = Sequence | np.ndarray
"""The classes of one task: class i has the i-th label."""


def inputs(values: Any, preset: Preset, what: str, axes: int = 1, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return examples as inputs of the preset's network.

    Images become float32 in [0, 1]: uint8 is divided by 255, booleans become 0 and 1, and floats must lie in [0, 1]. If
    the episode has ``bright_paper``, each value v is then replaced by 1 − v. Images of one channel may lack the
    axis of channels, which is then added. Any other input becomes an array of floats, and gets an axis of features if
    it has none.

    Args:
        values: images ``[..., height, width]`` or ``[..., height, width, channels]``; for curves ``[...]`` or
            ``[..., 1]``.
        preset: the settings.
        what: the word for the examples in messages.
        axes: number of leading axes: 1 for examples of one task, 2 for those of many tasks.
        shape: the shape that each converted example must have; None for the image shape of the network, if it has one.

    Raises:
        InputError: if the array has another shape, dtype or range, or numbers that are not finite.
    """
    array = _array(values, what)
    if isinstance(preset.episode, Episode):
        array = _images(array, preset, what, axes, shape or getattr(preset.network, "image_shape", None))
        return preset.episode.inputs(array)
    array = _floats(array, what)
    array = array[..., None] if array.ndim == axes else array
    fits = array.ndim > axes and (shape is None or array.shape[axes:] == shape)
    expected = "" if shape is None else f" of shape {shape}"
    names = "[examples, …]" if axes == 1 else "[tasks, examples, …]"
    check(fits, f"{what} must have the axes {names}, with examples{expected}; got the shape {np.shape(values)}")
    return array


def targets(values: Any, outputs: int, axes: int = 1) -> tuple[np.ndarray, bool]:
    """Return the targets of a regression, ``[..., outputs]``, and whether the axis of outputs was added.

    Args:
        values: floats ``[..., outputs]``, or ``[...]`` if there is one output.
        outputs: number of outputs of the network.
        axes: number of leading axes, as in :func:`inputs`.

    Raises:
        InputError: if the array has another shape, or numbers that are not finite.
    """
    array = _floats(_array(values, "support_y"), "support_y")
    flat = array.ndim == axes and outputs == 1
    array = array[..., None] if flat else array
    fits = array.ndim == axes + 1 and array.shape[-1] == outputs
    check(fits, f"support_y must have {axes + 1} axes, the last of length {outputs}; got the shape {np.shape(values)}")
    return array, flat


def classes(labels: Iterable[Hashable], preset: Preset, task: str = "") -> tuple[Labels, np.ndarray]:
    """Return the distinct labels of a task, and the index of each example's label among them.

    The distinct labels are in ascending order, or in the order of their first appearance if they cannot be ordered.
    The distinct labels are an array if ``labels`` is an array, and otherwise a list.

    Args:
        labels: one hashable label for each example.
        preset: the settings, which say how many classes a task has.
        task: for many tasks, the words that name this one in messages.

    Raises:
        InputError: for labels that are not hashable, or another number of classes than the preset's.
    """
    if isinstance(labels, jax.Array | np.ndarray):
        given = np.asarray(labels)
        check(given.ndim == 1, f"support_y{task} must have one label for each image, got the shape {given.shape}")
        found, indices = np.unique(given, return_inverse=True)
    else:
        given = list(labels)
        try:
            found = list(dict.fromkeys(given))
        except TypeError as error:
            raise InputError(
                f"support_y{task} has a label that is not hashable ({error}): use words or numbers"
            ) from None
        with contextlib.suppress(TypeError):  # labels that cannot be sorted stay in order of appearance
            found = sorted(found)  # type: ignore[type-var]
        position = {label: index for index, label in enumerate(found)}
        indices = np.array([position[label] for label in given], np.int64)
    ways = preset.episode.outputs
    if len(found) != ways:
        shown = ", ".join(map(repr, found[:5])) + (", …" if len(found) > 5 else "")
        raise InputError(
            f"support_y{task} has {len(found)} classes ({shown}), but {preset.name} was trained to tell {ways} apart: "
            f"give examples of {ways} classes, or train with --episode.ways {max(len(found), 2)}"
        )
    return found, indices.astype(np.int32)


def _array(values, what):
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{what} must be one array, but its parts have different shapes ({error})") from None
    check(array.dtype != object, f"{what} must be an array of numbers whose parts have equal shapes")
    check(array.size > 0, f"{what} is empty: pass at least one example")
    return array


def _floats(array, what):
    kind = jnp.issubdtype(array.dtype, jnp.number) and not jnp.issubdtype(array.dtype, jnp.complexfloating)
    check(kind, f"{what} must be numbers, got {array.dtype}")
    array = np.asarray(array, jnp.result_type(float))
    check(bool(np.isfinite(array).all()), f"{what} has numbers that are not finite")
    return array


def _images(array, preset, what, axes, shape):
    """Return images as uint8 or float32, with the axis of channels."""
    leading = "[images" if axes == 1 else "[tasks, images"
    expected = f"{leading}, height, width, channels]"
    if shape is not None:
        expected = f"{leading}, {', '.join(map(str, shape))}]"
    if array.ndim == axes + 2 and (shape is None or shape[-1] == 1):
        array = array[..., None]
    if array.ndim != axes + 3 or (shape is not None and array.shape[axes:] != shape):
        raise InputError(f"{what} must have the shape {expected}, got {array.shape}{_remedy(array, axes, shape)}")
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(
            f"{what} must be uint8, or floats in [0, 1], got {array.dtype}: convert with .astype(numpy.uint8) if the "
            "numbers are 0 to 255"
        )
    least, most = float(array.min()), float(array.max())
    check(
        least >= 0 and most <= 1,
        f"{what} must be uint8, or floats in [0, 1], got floats from {least:g} to {most:g}: divide by 255 if the "
        "largest possible number is 255",
    )
    return array.astype(np.float32)


def _remedy(array, axes, shape):
    """Return the likely correction of an array of images, as words that follow the message."""
    if shape is None:
        return ": one image needs a leading axis, image[None]" if array.ndim == axes + 1 else ""
    height, width, channels = shape
    if array.shape in (shape, shape[:2]) and axes == 1:
        return ": one image needs a leading axis, image[None]"
    if array.ndim == axes + 3 and array.shape[axes:] == (channels, height, width):
        return ": move the axis of channels to the end, numpy.moveaxis(images, -3, -1)"
    if array.shape[axes : axes + 2] != (height, width):
        return f": resize the images to {height}×{width}"
    if channels == 1:
        scale = " / 255" if array.dtype == np.uint8 else ""
        return f": convert the images to grey, for example by images.mean(-1){scale}"
    return f": the network takes {channels} channels"
