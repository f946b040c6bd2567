"""Few-shot tasks, and how they are sampled: a support set to adapt to, and a query set to evaluate on.

Sampling is a pure function of a random key and of the dataset's arrays, if there are any. It therefore needs no work on
the host and runs inside the compiled meta-step.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from imaml.datasets import sinusoid
from imaml.datasets.uneven import UnevenSource
from imaml.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Task:
    """A few-shot task. A batch of tasks has one more leading axis on every array.

    Attributes:
        support_x: inputs that the parameters are adapted to, ``[ways · shots, ...]``; for regression ``[shots, 1]``.
        support_y: labels of ``support_x``, int32 ``[ways · shots]``; for regression targets ``[shots, 1]``.
        query_x: inputs that the adapted parameters are evaluated on, ``[ways · queries, ...]``; for regression
            ``[queries, 1]``.
        query_y: labels of ``query_x``, int32 ``[ways · queries]``; for regression targets ``[queries, 1]``.
    """

    support_x: jax.Array
    support_y: jax.Array
    query_x: jax.Array
    query_y: jax.Array


@dataclass(frozen=True)
class Episode:
    """The sampling of N-way K-shot classification tasks from classes of images.

    Args:
        ways: classes in a task, N.
        shots: support images of each class, K.
        queries: query images of each class. The published evaluation uses as many as ``shots``.
        bright_paper: if True, ink is 0 and paper is 1, as in the authors' public code. By default ink is 1 and paper 0.

    Raises:
        InputError: if there are fewer than two ways, or less than one shot or query.
    """

    ways: int
    shots: int
    queries: int
    bright_paper: bool = False

    metric, kind = "accuracy", "classes"

    def __post_init__(self):
        if self.ways < 2 or self.shots < 1 or self.queries < 1:
            raise InputError(
                "a task needs at least 2 ways, 1 shot and 1 query, "
                f"got {self.ways} ways, {self.shots} shots and {self.queries} queries"
            )

    @property
    def outputs(self) -> int:
        """The number of outputs that a network for these tasks needs: one logit for each class."""
        return self.ways

    @property
    def chance(self) -> float:
        """The accuracy of a uniformly random guess, 1/N."""
        return 1 / self.ways

    def check(self, classes: Any, name: str) -> None:
        """Check that there are enough classes and images for a task.

        Args:
            classes: the training or test classes, an :class:`imaml.datasets.ImageClasses` or
                :class:`imaml.datasets.UnevenClasses`.
            name: the dataset's name, for the message.

        Raises:
            InputError: if there are fewer classes than ways, or fewer images in a class than shots plus queries.
        """
        if self.ways > len(classes):
            raise InputError(f"{self.ways} ways are more than the {len(classes)} classes of {name}: choose fewer ways")
        if self.shots + self.queries > classes.samples:
            raise InputError(
                f"{self.shots} shots and {self.queries} queries are more than the {classes.samples} images "
                f"that a class of {name} has: choose fewer shots or queries"
            )

    def sample(self, pixels: jax.Array | UnevenSource, key: jax.Array, rotate: bool = False) -> Task:
        """Draw one task.

        Args:
            pixels: the ``source`` of the classes: uint8 ``[classes, samples, height, width, channels]``, or the arrays
                of classes that differ in their number of images.
            key: a typed random key. The same key gives the same task.
            rotate: if True, draw a multiple of 90° for each class of the task, and rotate the class's images by it.

        Returns:
            A :class:`Task` with float32 images in [0, 1] and int32 labels in [0, ways).
        """
        _, sample_key, rotation_key = jax.random.split(key, 3)
        chosen = self.drawn_classes(len(pixels), key)
        keys = jax.random.split(sample_key, self.ways)
        if isinstance(pixels, UnevenSource):
            images = jax.vmap(lambda label, key: pixels.draw(label, key, self.shots + self.queries))(chosen, keys)
        else:
            images = jax.vmap(self._draw, in_axes=(0, 0))(pixels[chosen], keys)
        images = self.inputs(images)
        if rotate:
            images = jax.vmap(_rotate)(images, jax.random.randint(rotation_key, (self.ways,), 0, 4))
        support, query = images[:, : self.shots], images[:, self.shots :]
        labels = jnp.arange(self.ways, dtype=jnp.int32)
        return Task(_merge(support), jnp.repeat(labels, self.shots), _merge(query), jnp.repeat(labels, self.queries))

    def drawn_classes(self, classes: int, key: jax.Array) -> jax.Array:
        """Return the indices of the classes that :meth:`sample` draws with a key, in the order of their labels.

        Args:
            classes: number of classes from which the task is drawn.
            key: a typed random key.

        Returns:
            int32 ``[ways]``.
        """
        return jax.random.choice(jax.random.split(key, 3)[0], classes, (self.ways,), replace=False)

    def inputs(self, images: Any) -> Any:
        """Return images as inputs of the network: float32 in [0, 1], inverted if ``bright_paper`` is True.

        Args:
            images: uint8 with ink 255 and paper 0, or floats with ink 1 and paper 0.
        """
        scale = 1 if jnp.issubdtype(images.dtype, jnp.floating) else 255
        images = images.astype(jnp.float32) / scale
        return 1 - images if self.bright_paper else images

    def batch(self, pixels: jax.Array | UnevenSource, keys: jax.Array, rotate: bool = False) -> Task:
        """Draw one task for each of ``keys``, and return them as one :class:`Task` with a leading batch axis."""
        return jax.vmap(lambda key: self.sample(pixels, key, rotate))(keys)

    def _draw(self, images, key):
        """Draw ``shots + queries`` different images of one class. The support images come first."""
        return images[jax.random.choice(key, len(images), (self.shots + self.queries,), replace=False)]


@dataclass(frozen=True)
class Curve:
    """The sampling of regression tasks: few points of a sinusoid with a random amplitude and phase.

    Args:
        shots: support points.
        queries: query points.

    Raises:
        InputError: if either count is below one.

    Source: Finn et al. (2017), section 5.1.
    """

    shots: int
    queries: int

    metric, kind = "mean squared error", "curves"
    outputs = 1
    chance = None

    def __post_init__(self):
        if self.shots < 1 or self.queries < 1:
            raise InputError(f"a task needs at least 1 shot and 1 query, got {self.shots} and {self.queries}")

    def check(self, classes: Any, name: str) -> None:
        """Accept every argument, because any number of points can be drawn from a curve."""

    def sample(self, source: object, key: jax.Array, rotate: bool = False) -> Task:
        """Draw one task whose arrays have the shape ``[points, 1]`` and JAX's default float dtype.

        ``source`` and ``rotate`` are ignored. They exist because :meth:`Episode.sample` has the same signature.
        """
        x, y = sinusoid.draw(key, self.shots + self.queries)
        return Task(x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :])

    def batch(self, source: object, keys: jax.Array, rotate: bool = False) -> Task:
        """Draw one task for each of ``keys``, and return them as one :class:`Task` with a leading batch axis."""
        return jax.vmap(lambda key: self.sample(source, key))(keys)


def _rotate(images, quarter_turns):
    """Rotate square images ``[samples, height, width, channels]`` counter-clockwise."""
    rotations = [lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(quarter_turns, rotations, images)


def _merge(images):
    """Reshape ``[ways, samples, ...]`` to ``[ways · samples, ...]``."""
    return images.reshape(-1, *images.shape[2:])
