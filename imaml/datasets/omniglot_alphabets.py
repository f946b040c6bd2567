"""Omniglot split by whole alphabets: no test character belongs to an alphabet of a training character.

The authors of Omniglot divide its 50 alphabets into 30 background alphabets and 20 evaluation alphabets, with one
archive for each part. The dataset ``omniglot`` pools the characters of both archives and splits them at random, so that
every alphabet has training characters and test characters. The dataset of this module keeps the authors' split. Both
datasets read the same archives, and share one cache entry.

Source: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 350 (2015); https://github.com/brendenlake/omniglot.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imaml.datasets import omniglot
from imaml.datasets.images import ImageClasses, ImageDataset

NAME = "omniglot-alphabets"
SPLITS = ("omniglot", NAME)
"""The names of the datasets that split Omniglot's characters. They differ only in the split."""

# A cache entry has the labels of the characters, but does not say from which archive a character comes. The list
# cannot be wrong for archives that are accepted, because their content hashes cover the paths of the drawings.
EVALUATION_ALPHABETS = frozenset({
    "Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez", "Glagolitic", "Gurmukhi", "Kannada",
    "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti",
    "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
})  # fmt: skip
"""The alphabets in ``images_evaluation.zip``. All other alphabets are in ``images_background.zip``."""


def load(
    directory: str | os.PathLike[str], meanwhile: Callable[[ImageClasses], None] = lambda training: None
) -> ImageDataset:
    """Return Omniglot, split by whole alphabets.

    The training classes are the 964 characters of the 30 alphabets in ``images_background.zip``. The test classes are
    the 659 characters of the 20 alphabets in ``images_evaluation.zip``.

    Args:
        directory, meanwhile: as in :func:`.omniglot.load`.

    Returns:
        A dataset named ``omniglot-alphabets``: ``train.pixels`` uint8 ``[964, 20, 28, 28, 1]``, ``test.pixels`` uint8
        ``[659, 20, 28, 28, 1]``. Labels, their order and the drawings are as in :func:`.omniglot.load`.

    Raises:
        InputError: as :func:`.omniglot.load` does.

    Source: Lake, Salakhutdinov, Tenenbaum 2015.
    """
    background, _ = omniglot.ARCHIVES
    pixels, labels = omniglot.characters(Path(directory), background.characters, meanwhile)
    in_test = np.array([label.split("/")[0] in EVALUATION_ALPHABETS for label in labels])

    def part(chosen: np.ndarray) -> ImageClasses:
        return ImageClasses(pixels[chosen], tuple(labels[index] for index in np.flatnonzero(chosen)))

    return ImageDataset(NAME, part(~in_test), part(in_test))


def is_other_split(one: str, other: str) -> bool:
    """Return True if two names are those of different splits of Omniglot.

    Test characters of each of the two datasets are then training characters of the other one.
    """
    return one != other and {one, other} <= set(SPLITS)
