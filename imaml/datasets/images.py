"""What every image dataset hands on: classes of small images, split once and for all.

A few-shot dataset is an array indexed ``[class, sample]``. Train and test hold different classes; the
split belongs to the dataset, not to a run, and its fingerprint goes into every checkpoint, so that no
class can be trained on and tested on.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from imaml.errors import InputError


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """Classes of images: ``pixels`` is uint8 ``[classes, samples, height, width, channels]``; ink is bright on 0."""

    pixels: np.ndarray
    labels: tuple[str, ...]

    def __post_init__(self):
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 5:
            raise InputError(
                "pixels must be uint8 [classes, samples, height, width, channels], "
                f"got {self.pixels.dtype} {self.pixels.shape}"
            )
        if len(self.labels) != len(self.pixels) or len(set(self.labels)) != len(self.labels):
            raise InputError(f"{len(self.pixels)} classes need as many different labels, got {len(set(self.labels))}")

    @classmethod
    def blank(cls, *shape: int) -> "ImageClasses":
        """Classes that stand for others of that shape: no ink, and no memory."""
        return cls(np.broadcast_to(np.uint8(0), shape), tuple(map(str, range(shape[0]))))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def samples(self) -> int:
        """Images in each class."""
        return self.pixels.shape[1]

    @property
    def source(self) -> np.ndarray:
        """What tasks are drawn from inside a compiled program: the pixels."""
        return self.pixels


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Training classes and held-out test classes, which share no label."""

    name: str
    train: ImageClasses
    test: ImageClasses

    def __post_init__(self):
        shared = set(self.train.labels) & set(self.test.labels)
        if shared:
            raise InputError(f"{self.name}: {len(shared)} classes, {min(shared)} among them, are in train and in test")

    def fingerprint(self) -> str:
        """SHA-256 of the split, labels and pixels: two runs that agree on it saw the same data."""
        digest = hashlib.sha256()
        for classes in (self.train, self.test):
            digest.update("\n".join(classes.labels).encode())
            digest.update(np.ascontiguousarray(classes.pixels).tobytes())
        return digest.hexdigest()
