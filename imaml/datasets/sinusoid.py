"""Sinusoids: regression tasks that need no data files, because each task is a pure function of a random key.

A task consists of points on one curve a·sin(x − b). The amplitude a, the phase b and the points are sampled per task.
Training and test tasks come from the same distribution with different keys, so the test curves are new to the learner.

Source: Finn, Abbeel, Levine (2017), section 5.1.
"""

import hashlib
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from imaml.errors import InputError

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


@dataclass(frozen=True)
class Curves:
    """The counterpart of :class:`.ImageClasses` for sinusoids. It holds no data: ``source`` is empty.

    Args:
        stream: an integer that changes the random key of an evaluation; 0 leaves the key as it is. The test part has
            stream 0 and the validation part has stream 1, so the two are evaluated on different tasks. Training uses
            another key and ignores the stream.
    """

    stream: int = 0

    source = ()


@dataclass(frozen=True)
class SinusoidDataset:
    """The distribution of sinusoids as a dataset. Its parts have the same distribution."""

    name: str = "sinusoid"
    train: Curves = Curves()
    test: Curves = Curves()
    validation: Curves = Curves(stream=1)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the formula and the ranges of a, b and x, which determine the distribution."""
        return hashlib.sha256(f"a sin(x - b): {AMPLITUDES}, {PHASES}, {INPUTS}".encode()).hexdigest()


def load(directory: object = None) -> SinusoidDataset:
    """Return the sinusoid dataset.

    Args:
        directory: must be None. The parameter exists because other datasets take a data folder.

    Raises:
        InputError: if ``directory`` is not None.
    """
    if directory is not None:
        raise InputError(
            "the sinusoid dataset reads no files and takes no data folder: omit --data, or choose another preset"
        )
    return SinusoidDataset()


def draw(key: jax.Array, points: int) -> tuple[jax.Array, jax.Array]:
    """Sample one curve a·sin(x − b) and ``points`` points on it.

    The amplitude a, the phase b and each x are uniform on ``AMPLITUDES``, ``PHASES`` and ``INPUTS``.

    Args:
        key: a typed random key, which determines the curve and its points.
        points: number of points.

    Returns:
        The inputs x and the values y, ``[points, 1]`` each, in JAX's default float dtype.
    """
    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], (), minval=AMPLITUDES[0], maxval=AMPLITUDES[1])
    phase = jax.random.uniform(keys[1], (), minval=PHASES[0], maxval=PHASES[1])
    x = jax.random.uniform(keys[2], (points, 1), minval=INPUTS[0], maxval=INPUTS[1])
    return x, amplitude * jnp.sin(x - phase)
