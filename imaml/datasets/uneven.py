"""Classes of images that may differ in their number of images, for one's own folders and arrays."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from imaml.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnevenSource:
    """The arrays from which a compiled program samples tasks.

    Attributes:
        pixels: uint8 ``[images, height, width, channels]``, one class after the other.
        starts: int32 ``[classes]``, the index of the first image of each class.
        counts: int32 ``[classes]``, the number of images of each class.
        largest: the largest of ``counts``, a Python integer.
    """

    pixels: jax.Array | np.ndarray
    starts: jax.Array | np.ndarray
    counts: jax.Array | np.ndarray
    largest: int = field(metadata={"static": True})

    def __len__(self) -> int:
        return len(self.counts)

    def draw(self, label: jax.Array, key: jax.Array, number: int) -> jax.Array:
        """Draw different images of one class, uniformly and in random order.

        Args:
            label: the index of the class, an integer scalar.
            key: a typed random key.
            number: how many images to draw. The class must have at least as many.

        Returns:
            The images, uint8 ``[number, height, width, channels]``.
        """
        # Draw a random rank for each image of the class, and take the images with the highest ranks. Positions beyond
        # the end of a small class have the rank -1, so they are never taken.
        pixels, starts, counts = map(jnp.asarray, (self.pixels, self.starts, self.counts))
        present = jnp.arange(self.largest) < counts[label]
        ranks = jnp.where(present, jax.random.uniform(key, (self.largest,)), -1.0)
        chosen = jax.lax.top_k(ranks, number)[1]
        return pixels[starts[label] + chosen]


@dataclass(frozen=True, eq=False)
class UnevenClasses:
    """Classes of images that may differ in their number of images.

    Args:
        pixels: uint8 ``[images, height, width, channels]``, the images of the first class, then those of the second,
            and so on.
        counts: the number of images of each class, at least 1.
        labels: one distinct name for each class.
        content: a hash of the files that the pixels were read from. None if there are no files; the pixels are then
            hashed in :meth:`update`.

    Raises:
        InputError: if ``pixels`` has another dtype or number of axes, if a count is below 1, if the counts do not add
            up to the number of images, or if the labels are not distinct or not as many as the counts.
    """

    pixels: np.ndarray
    counts: tuple[int, ...]
    labels: tuple[str, ...]
    content: str | None = None

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4:
            raise InputError(
                "pixels must be uint8 [images, height, width, channels], "
                f"got {self.pixels.dtype} of shape {self.pixels.shape}"
            )
        if sum(self.counts) != len(self.pixels) or min(self.counts, default=1) < 1:
            raise InputError(
                f"the counts of the classes should be at least 1 and add up to {len(self.pixels)} images, "
                f"got {self.counts}"
            )
        if len(self.labels) != len(self.counts) or len(set(self.labels)) != len(self.labels):
            raise InputError(f"{len(self.counts)} classes need as many distinct labels, got {list(self.labels)!r:.100}")

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def samples(self) -> int:
        """Number of images in the smallest class; 0 if there are no classes."""
        return min(self.counts, default=0)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return self.pixels.shape[1:]

    @property
    def source(self) -> UnevenSource:
        """The arrays from which a compiled program samples tasks."""
        starts = np.cumsum([0, *self.counts[:-1]]).astype(np.int32)
        return UnevenSource(self.pixels, starts, np.array(self.counts, np.int32), max(self.counts, default=0))

    def with_at_least(self, images: int) -> tuple["UnevenClasses", dict[str, int]]:
        """Return the classes that have at least ``images`` images, and the counts of the others by label."""
        small = {label: count for label, count in zip(self.labels, self.counts, strict=True) if count < images}
        if not small:
            return self, {}
        return self.subset([index for index, count in enumerate(self.counts) if count >= images]), small

    def subset(self, indices: Sequence[int]) -> "UnevenClasses":
        """Return the classes with these indices, which must be in ascending order."""
        kept = np.isin(np.arange(len(self)), indices)
        pixels = self.pixels[np.repeat(kept, self.counts)]
        counts, labels = (tuple(self.counts[i] for i in indices), tuple(self.labels[i] for i in indices))
        return UnevenClasses(pixels, counts, labels, self.content)

    def update(self, digest: "hashlib._Hash") -> None:
        """Add labels, counts, shape and ``content`` to a hash. If ``content`` is None, add the pixels too."""
        digest.update(repr((self.labels, self.counts, self.pixels.shape, self.content)).encode())
        if self.content is None:
            digest.update(np.ascontiguousarray(self.pixels).tobytes())
