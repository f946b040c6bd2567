"""The record of an image dataset: classes of small images with a fixed split into training and test classes.

Images are indexed by ``[class, sample]``. The training and test parts hold different classes. The split is part of the
dataset, not a setting of a run. Every checkpoint stores the dataset's fingerprint. An evaluation of a run's folder
refuses the dataset if it has another fingerprint than in training. The saved parameters are therefore not tested on a
class that they were trained on.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from imaml.errors import InputError


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
                f"got {self.pixels.dtype} {self.pixels.shape}"
            )
        if len(self.labels) != len(self.pixels) or len(set(self.labels)) != len(self.labels):
            raise InputError(f"{len(self.pixels)} classes need as many distinct labels, got {len(set(self.labels))}")

    @classmethod
    def blank(cls, *shape: int) -> "ImageClasses":
        """Return classes whose pixels are zeros of this shape. The zeros are one byte in memory, which is broadcast."""
        return cls(np.broadcast_to(np.uint8(0), shape), tuple(map(str, range(shape[0]))))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def samples(self) -> int:
        """Number of images in each class."""
        return self.pixels.shape[1]

    @property
    def source(self) -> np.ndarray:
        """The array from which a compiled program samples tasks: the pixels."""
        return self.pixels


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Training classes and held-out test classes.

    Args:
        name: the name of the dataset.
        train: the classes of the training tasks.
        test: the classes of the test tasks.

    Raises:
        InputError: if a label is in both parts.
    """

    name: str
    train: ImageClasses
    test: ImageClasses

    def __post_init__(self):
        shared = set(self.train.labels) & set(self.test.labels)
        if shared:
            raise InputError(f"{self.name}: {len(shared)} classes, including {min(shared)}, are in both train and test")

    def dictionary(self) -> dict[str, np.ndarray]:
        """Return the pixels and labels of both parts as named arrays, the inverse of :meth:`from_dictionary`."""
        parts = {"train": self.train, "test": self.test}
        pixels = {f"{part}_pixels": classes.pixels for part, classes in parts.items()}
        return pixels | {f"{part}_labels": np.array(classes.labels) for part, classes in parts.items()}

    @classmethod
    def from_dictionary(cls, name: str, arrays: dict[str, np.ndarray]) -> "ImageDataset":
        """Return the dataset called ``name`` with the arrays of :meth:`dictionary`."""
        parts = ("train", "test")
        classes = (ImageClasses(arrays[f"{part}_pixels"], tuple(arrays[f"{part}_labels"].tolist())) for part in parts)
        return cls(name, *classes)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the labels and pixels of both parts. Equal fingerprints mean the same data."""
        digest = hashlib.sha256()
        for classes in (self.train, self.test):
            digest.update("\n".join(classes.labels).encode())
            digest.update(np.ascontiguousarray(classes.pixels).tobytes())
        return digest.hexdigest()
