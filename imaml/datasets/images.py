"""The record of an image dataset: classes of small images with a fixed split into training and test classes.

The images of an :class:`ImageClasses` are indexed by ``[class, sample]``. No class is in two of the three parts, which
are the training, validation and test classes. The split belongs to the dataset and is not a setting of a run. Every
checkpoint stores the dataset's fingerprint. An evaluation of a run's folder refuses a dataset with the same name as in
training but another fingerprint, because the saved parameters may have been trained on its test classes.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaml.datasets import folders, splits
from imaml.datasets.splits import Split
from imaml.datasets.uneven import UnevenClasses
from imaml.errors import InputError, check


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """Classes of images, each with the same number of images.

    Args:
        pixels: uint8 ``[classes, samples, height, width, channels]``. In drawings the ink is 255 and the paper 0.
        labels: one distinct name for each class.

    Raises:
        InputError: if ``pixels`` has another dtype or number of axes, if two labels are equal, or if the number of
            labels differs from the number of classes.
    """

    pixels: np.ndarray
    labels: tuple[str, ...]

    def __post_init__(self):
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 5:
            raise InputError(
                "pixels must be uint8 [classes, samples, height, width, channels], "
                f"got {self.pixels.dtype} of shape {self.pixels.shape}"
            )
        if len(self.labels) != len(self.pixels) or len(set(self.labels)) != len(self.labels):
            raise InputError(f"{len(self.pixels)} classes need as many distinct labels, got {list(self.labels)!r:.100}")

    @classmethod
    def blank(cls, *shape: int) -> "ImageClasses":
        """Return classes whose pixels are zeros of this shape. The zeros are one byte in memory, which is broadcast."""
        return cls(np.broadcast_to(np.uint8(0), shape), tuple(map(str, range(shape[0]))))

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, indices: Sequence[int]) -> "ImageClasses":
        """Return the classes with these indices."""
        return ImageClasses(self.pixels[np.asarray(indices, int)], tuple(self.labels[index] for index in indices))

    @property
    def samples(self) -> int:
        """Number of images in each class."""
        return self.pixels.shape[1]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return self.pixels.shape[2:]

    @property
    def source(self) -> np.ndarray:
        """The array from which a compiled program samples tasks: the pixels."""
        return self.pixels

    def update(self, digest: "hashlib._Hash") -> None:
        """Add labels and pixels to a hash."""
        digest.update("\n".join(self.labels).encode())
        digest.update(np.ascontiguousarray(self.pixels).tobytes())


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Training classes and held-out test classes, and perhaps validation classes.

    Args:
        name: the name of the dataset.
        train: the classes of the training tasks.
        test: the classes of the test tasks.
        validation: further held-out classes, for choosing settings without the test classes. None if there are none.
        recipe: how to read the dataset again, in JSON types; see :meth:`from_recipe`. None if it cannot be read again.

    Raises:
        InputError: if a label is in two parts.
    """

    name: str
    train: ImageClasses | UnevenClasses
    test: ImageClasses | UnevenClasses
    validation: ImageClasses | UnevenClasses | None = None
    recipe: dict[str, Any] | None = None

    def __post_init__(self):
        parts = {part: set(classes.labels) for part, classes in self._parts().items()}
        for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
            if shared := parts.get(one, set()) & parts.get(other, set()):
                raise InputError(
                    f"{self.name}: {len(shared)} classes, including {min(shared)}, are in both {one} and {other}"
                )

    def _parts(self):
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        return {part: classes for part, classes in parts.items() if classes is not None}

    @classmethod
    def from_folder(
        cls,
        directory: str | os.PathLike[str],
        size: int = 28,
        *,
        channels: int = 1,
        fit: str = "crop",
        invert: bool = False,
        split: Split = None,
        seed: int = 0,
        name: str | None = None,
    ) -> "ImageDataset":
        """Read a dataset from a folder that holds one folder of images for each class.

        Images may have any size, and classes may differ in their number of images. A class's label is the name of its
        folder. Images are turned as their EXIF data say, put on white where they are transparent, converted to grey or
        RGB, and resized by a Lanczos filter. Tasks contain them as float32 in [0, 1].

        Args:
            directory: the folder. If it has the subfolders ``train`` and ``test``, and no others except ``val`` or
                ``validation``, these are the parts, each with a folder for each of its classes.
            size: height and width of the result in pixels.
            channels: 1 for grey, 3 for RGB.
            fit: what happens to an image that is not square: ``"crop"`` cuts off both ends of its longer side,
                ``"pad"`` adds a margin of 0 to its shorter side, and ``"stretch"`` changes its proportions.
            invert: replace each value v by 255 − v. Use this for dark ink on light paper, because drawings in this
                package have ink 255 on paper 0.
            split: fractions of the classes for training, validation and test that add up to 1, or the labels of each
                part as in ``{"train": ["a", "b"], "validation": [], "test": ["c"]}``. Classes that no part names are
                left out. None stands for the fractions 0.64, 0.16 and 0.2. If the subfolders are the parts, ``split``
                must be None.
            seed: the seed of the permutation by which fractions divide the classes.
            name: the name of the dataset; by default the name of the folder.

        Returns:
            The dataset. A run saves its ``recipe``, by which :func:`imaml.evaluate` reads the folder again. The folder
            is refused if an image or a label has changed.

        Raises:
            InputError: if the folder or a class holds nothing to read, if an image cannot be decoded, if Pillow is
                missing, or if an argument cannot be used.
        """
        directory = Path(directory)
        name = directory.resolve().name if name is None else name
        reading = folders.Reading(size, channels, fit, invert)
        reading.check()
        found = folders.class_folders(directory)
        if folders.UNDIVIDED in found:
            (classes,) = found.values()
            chosen = splits.divide(list(classes), split, seed, name)
            found = {part: {label: classes[label] for label in labels} for part, labels in chosen.items()}
        else:
            check(split is None, f"{directory}: its subfolders are the split ({', '.join(found)}): omit split")
        recipe = {"kind": "folder", "directory": os.path.abspath(directory), **reading._asdict()}
        recipe |= {"split": _plain(split), "seed": seed, "name": name}
        parts = {}
        for part, files in found.items():
            pixels, counts, content = folders.read(files, reading)
            parts[part] = UnevenClasses(pixels, counts, tuple(files), content)
        return cls(name, parts["train"], parts["test"], _filled(parts.get("validation")), recipe)

    @classmethod
    def from_arrays(cls, x: Any, y: Any, *, split: Split = None, seed: int = 0, name: str = "arrays") -> "ImageDataset":
        """Return the dataset of labelled images in arrays.

        Args:
            x: images ``[images, height, width]`` or ``[images, height, width, channels]``. Integers lie in [0, 255];
                floats lie in [0, 1] and are rounded to multiples of 1/255; booleans become 0 and 255.
            y: the label of each image, ``[images]``, of integers or strings. Integers are converted to strings.
            split: as in :meth:`from_folder`.
            seed: as in :meth:`from_folder`.
            name: the name of the dataset.

        Returns:
            A dataset that a run cannot read again: pass it to :func:`imaml.evaluate` as well.

        Raises:
            InputError: if an array has another shape or values out of range, or if the split cannot be used.

        >>> x = np.random.default_rng(0).random((40, 28, 28))
        >>> data = ImageDataset.from_arrays(x, np.arange(40) % 4, split=(0.5, 0.0, 0.5))
        >>> data.train.labels, data.test.labels, data.train.counts
        (('0', '1'), ('2', '3'), (10, 10))
        """
        x, y = _as_pixels(np.asarray(x), name), np.asarray(y)
        check(
            y.shape == (len(x),) and y.dtype.kind in "iuSU",
            f"{name}: y should be one integer or string for each of the {len(x)} images, "
            f"got {y.dtype} of shape {y.shape}",
        )
        labels = y.astype(str)
        known = [str(label) for label in np.unique(labels)]
        parts = {part: _gathered(x, labels, chosen) for part, chosen in splits.divide(known, split, seed, name).items()}
        return cls(name, parts["train"], parts["test"], _filled(parts["validation"]))

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], directory: str | os.PathLike[str] | None = None) -> "ImageDataset":
        """Read again a dataset that :meth:`from_folder` read.

        Args:
            recipe: the attribute ``recipe`` of that dataset.
            directory: the folder, if it has been moved. By default it is the one in ``recipe``.

        Raises:
            InputError: as :meth:`from_folder` does.
        """
        keywords = {key: value for key, value in recipe.items() if key not in ("kind", "directory")}
        return cls.from_folder(recipe["directory"] if directory is None else directory, **keywords)

    def dictionary(self) -> dict[str, np.ndarray]:
        """Return the training and test classes as named arrays. Both must be :class:`ImageClasses`."""
        parts = {"train": self.train, "test": self.test}
        pixels = {f"{part}_pixels": classes.pixels for part, classes in parts.items()}
        return pixels | {f"{part}_labels": np.array(classes.labels) for part, classes in parts.items()}

    @classmethod
    def from_dictionary(cls, name: str, arrays: dict[str, np.ndarray]) -> "ImageDataset":
        """Return the dataset called ``name`` with the arrays of :meth:`dictionary`."""
        parts = ("train", "test")
        train, test = (
            ImageClasses(arrays[f"{part}_pixels"], tuple(arrays[f"{part}_labels"].tolist())) for part in parts
        )
        return cls(name, train, test)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the labels and pixels of all parts. Equal fingerprints mean the same data.

        For images from a folder, the bytes of the files and the way to read them replace the pixels, because another
        version of Pillow may decode a few pixels differently.
        """
        digest = hashlib.sha256()
        for classes in self._parts().values():
            classes.update(digest)
        return digest.hexdigest()


def _plain(split):
    """Return a split in JSON types."""
    if isinstance(split, Mapping):
        return {part: [str(label) for label in labels] for part, labels in split.items()}
    return None if split is None else [float(part) for part in split]


def _filled(classes):
    return classes if classes is not None and len(classes) else None


def _gathered(x, labels, chosen):
    """Return the images of the chosen labels, one class after the other."""
    indices = [np.flatnonzero(labels == label) for label in chosen]
    order = np.concatenate([*indices, np.zeros(0, int)]).astype(int)
    return UnevenClasses(x[order], tuple(map(len, indices)), tuple(chosen))


def _as_pixels(x, name):
    """Return images as uint8 ``[images, height, width, channels]``."""
    check(
        x.ndim in (3, 4) and len(x) > 0 and x.dtype.kind in "biuf",
        f"{name}: x should be numbers [images, height, width] or [images, height, width, channels], "
        f"got {x.dtype} of shape {x.shape}",
    )
    top = 1.0 if x.dtype.kind in "bf" else 255
    inside = bool(((x >= 0) & (x <= top)).all())  # false for NaN
    if not inside:
        kind = "floats in [0, 1]" if top == 1.0 else "integers in [0, 255]"
        raise InputError(f"{name}: x should be {kind}, got values from {x.min()} to {x.max()}; rescale the images")
    x = x.astype(np.uint8) if top == 255 else np.rint(x.astype(np.float64) * 255).astype(np.uint8)
    return x if x.ndim == 4 else x[..., np.newaxis]
