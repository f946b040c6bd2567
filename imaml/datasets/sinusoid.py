"""Sinusoids: regression tasks that need no data, since each is a pure function of a key.

A task is a curve a·sin(x − b) with amplitude a and phase b of its own, and some of its points. Training and test draw
from the same distribution, by different keys: what is held out is the curve, not a class.

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
    """All sinusoids: stands where a dataset of images has classes, and holds nothing."""

    source = ()


@dataclass(frozen=True)
class SinusoidDataset:
    """The distribution as a dataset whose two parts are the same."""

    name: str = "sinusoid"
    train: Curves = Curves()
    test: Curves = Curves()

    def fingerprint(self) -> str:
        """SHA-256 of the ranges: two runs that agree on it drew from the same distribution."""
        return hashlib.sha256(f"a sin(x - b): {AMPLITUDES}, {PHASES}, {INPUTS}".encode()).hexdigest()


def load(directory: object = None) -> SinusoidDataset:
    """The distribution.

    Raises:
        InputError: for a data folder.
    """
    if directory is not None:
        raise InputError("sinusoids are drawn and take no data folder: leave --data out, or name another preset")
    return SinusoidDataset()


def draw(key: jax.Array, points: int) -> tuple[jax.Array, jax.Array]:
    """``points`` points of one curve, x and y, float32 ``[points, 1]`` each; all uniform in the module's ranges.

    Args:
        key: a typed random key, which decides the curve and its points.
        points: how many.
    """
    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], (), minval=AMPLITUDES[0], maxval=AMPLITUDES[1])
    phase = jax.random.uniform(keys[1], (), minval=PHASES[0], maxval=PHASES[1])
    x = jax.random.uniform(keys[2], (points, 1), minval=INPUTS[0], maxval=INPUTS[1])
    return x, amplitude * jnp.sin(x - phase)
