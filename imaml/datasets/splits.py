"""The split of one's own classes into training, validation and test classes."""

from collections.abc import Mapping, Sequence

import numpy as np

from imaml.errors import InputError, check, check_choice

PARTS = ("train", "validation", "test")
ALIASES = {"val": "validation"}
"""Names that a folder or a split may use instead of those in :data:`PARTS`."""
FRACTIONS = (0.64, 0.16, 0.2)
"""The fractions of the classes in each part, as in Mini-ImageNet."""

Split = Sequence[float] | Mapping[str, Sequence[str]] | None
"""Fractions of the classes, or the labels of each part, or None for :data:`FRACTIONS`."""


def divide(labels: Sequence[str], split: Split, seed: int, name: str) -> dict[str, list[str]]:
    """Return the labels of each part.

    Args:
        labels: all labels, sorted.
        split: three fractions, for training, validation and test, that add up to 1; or the labels of each part, by the
            names ``"train"``, ``"validation"`` and ``"test"``. Classes that are in no part are left out. None for
            :data:`FRACTIONS`.
        seed: the seed of the permutation by which fractions divide the classes.
        name: the name of the dataset, for messages.

    Raises:
        InputError: if there are fewer than two classes, if the fractions cannot be used, if a part or a label is
            unknown, if a part names a class twice, or if the training or test part is empty.

    >>> divide(["ant", "bee", "cow", "dog"], (0.5, 0.0, 0.5), seed=0, name="animals")
    {'train': ['ant', 'bee'], 'validation': [], 'test': ['cow', 'dog']}
    """
    check(len(labels) >= 2, f"{name}: at least 2 classes are needed, one for training and one for test; got {labels}")
    if isinstance(split, Mapping):
        return _told(labels, split, name)
    fractions = FRACTIONS if split is None else split
    usable = not isinstance(fractions, str) and len(fractions) == 3 and all(0 <= part <= 1 for part in fractions)
    if not usable or abs(sum(fractions) - 1) > 1e-6 or not fractions[0] or not fractions[2]:
        raise InputError(
            f"{name}: split should be three fractions for training, validation and test that add up to 1, the first "
            f'and the last above 0, or the labels of each part as in {{"train": […], "test": […]}}; got {split!r}'
        )
    test = max(1, round(fractions[2] * len(labels)))
    validation = max(0, min(round(fractions[1] * len(labels)), len(labels) - test - 1))
    # Use RandomState: numpy guarantees that its stream never changes, but not that of Generator (NEP 19).
    order = np.random.RandomState(seed).permutation(len(labels))
    ends = {"test": order[:test], "validation": order[test : test + validation], "train": order[test + validation :]}
    check(len(ends["train"]) > 0, f"{name}: split {split!r} leaves none of {len(labels)} classes for training")
    return {part: [str(labels[index]) for index in sorted(ends[part])] for part in PARTS}


def held_out(classes: int, fraction: float) -> tuple[list[int], list[int]]:
    """Return the indices of the classes that remain, and of those that are held out, each in ascending order.

    The classes are chosen by a permutation that depends on their number alone.

    Args:
        classes: the number of classes.
        fraction: the fraction of them that is held out, rounded to the nearest number of classes.

    >>> held_out(10, 0.2)
    ([0, 1, 3, 4, 5, 6, 7, 9], [2, 8])
    """
    number = round(fraction * classes)
    order = np.random.RandomState(0).permutation(classes).tolist()
    return sorted(order[number:]), sorted(order[:number])


def _told(labels, split, name):
    given = {ALIASES.get(part, part): [str(label) for label in chosen] for part, chosen in split.items()}
    check(len(given) == len(split), f"{name}: val and validation are the same part of the split: keep one of them")
    for part, chosen in given.items():
        check_choice("part of a split", part, PARTS)
        for label in chosen:
            check_choice(f"class of {name}", label, labels)
        check(len(set(chosen)) == len(chosen), f"{name}: a class is named twice in the part {part} of the split")
    parts = {part: sorted(given.get(part, [])) for part in PARTS}
    for part in ("train", "test"):
        check(bool(parts[part]), f"{name}: the split has no class in the part {part!r}")
    return parts
