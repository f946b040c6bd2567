"""Tasks: a few labelled examples to learn from, a few more to be judged by, drawn by a key.

Sampling is a pure function of a key and the dataset's array, so that it runs inside the compiled
meta-step: a training run does no work on the host between two steps.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from imaml.datasets import sinusoid
from imaml.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Task:
    """One few-shot task; with a leading axis on every array, a batch of tasks.

    Attributes:
        support_x: inputs to adapt to, ``[ways · shots, ...]``.
        support_y: their labels, int32 ``[ways · shots]`` (or targets, for regression).
        query_x: inputs to be judged by, ``[ways · queries, ...]``.
        query_y: their labels.
    """

    support_x: jax.Array
    support_y: jax.Array
    query_x: jax.Array
    query_y: jax.Array


@dataclass(frozen=True)
class Episode:
    """How tasks are drawn from classes of images: N-way K-shot classification.

    Args:
        ways: classes in a task, N.
        shots: support images of each class, K.
        queries: query images of each class; the published protocol takes as many as shots.
        bright_paper: ink 0 on paper 1, as the authors' public code has it, for ink 1 on paper 0.

    Raises:
        InputError: for a count below one, or fewer than two ways.
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
        """Of the network: a logit for each class."""
        return self.ways

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.ways

    def check(self, classes: Any, name: str) -> None:
        """Raise InputError, with the numbers, where ``classes``, an :class:`ImageClasses`, cannot fill a task."""
        if self.ways > len(classes):
            raise InputError(f"{self.ways} ways are more than the {len(classes)} classes of {name}")
        if self.shots + self.queries > classes.samples:
            raise InputError(
                f"{self.shots} shots and {self.queries} queries are more than the {classes.samples} images "
                f"that a class of {name} has"
            )

    def sample(self, pixels: jax.Array, key: jax.Array, rotate: bool = False) -> Task:
        """Draw one task.

        Args:
            pixels: uint8 ``[classes, samples, height, width, channels]``.
            key: a typed random key.
            rotate: turn each class by a multiple of 90°, drawn for it; this makes four classes of one.

        Returns:
            A :class:`Task` with float32 images in [0, 1]; the same key gives the same task.
        """
        class_key, sample_key, turn_key = jax.random.split(key, 3)
        chosen = jax.random.choice(class_key, pixels.shape[0], (self.ways,), replace=False)
        images = jax.vmap(self._draw, in_axes=(0, 0))(pixels[chosen], jax.random.split(sample_key, self.ways))
        images = images.astype(jnp.float32) / 255
        images = 1 - images if self.bright_paper else images
        if rotate:
            images = jax.vmap(_turn)(images, jax.random.randint(turn_key, (self.ways,), 0, 4))
        support, query = images[:, : self.shots], images[:, self.shots :]
        labels = jnp.arange(self.ways, dtype=jnp.int32)
        return Task(_merge(support), jnp.repeat(labels, self.shots), _merge(query), jnp.repeat(labels, self.queries))

    def batch(self, pixels: jax.Array, keys: jax.Array, rotate: bool = False) -> Task:
        """Draw one task for each key: a :class:`Task` whose arrays have a leading axis of that length."""
        return jax.vmap(lambda key: self.sample(pixels, key, rotate))(keys)

    def _draw(self, images, key):
        """Different images of one class, those of the support first."""
        return images[jax.random.choice(key, len(images), (self.shots + self.queries,), replace=False)]


@dataclass(frozen=True)
class Curve:
    """How tasks are drawn from the sinusoids: regression on a few points of a curve.

    Args:
        shots: points to adapt to.
        queries: points to be judged by.

    Raises:
        InputError: for a count below one.
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
        """There is always another point."""

    def sample(self, source: object, key: jax.Array, rotate: bool = False) -> Task:
        """Draw one task; ``source`` and ``rotate`` are those of :class:`Episode` and nothing here."""
        x, y = sinusoid.draw(key, self.shots + self.queries)
        return Task(x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :])

    def batch(self, source: object, keys: jax.Array, rotate: bool = False) -> Task:
        """Draw one task for each key: a :class:`Task` whose arrays have a leading axis of that length."""
        return jax.vmap(lambda key: self.sample(source, key))(keys)


def _turn(images, quarter_turns):
    """``[samples, height, width, channels]``, square, turned counter-clockwise."""
    turns = [lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(quarter_turns, turns, images)


def _merge(images):
    """``[ways, samples, ...]`` to ``[ways · samples, ...]``."""
    return images.reshape(-1, *images.shape[2:])
