"""Mini-ImageNet from the usual folder: ``images/`` and three CSV files that say which image is of which class.

The images are ImageNet's and may not be handed on, so there is nothing to fetch here. The split is that of Ravi and
Larochelle (2017): 64 classes to train on, 16 for validation, 20 for test, 600 images each, 84×84 in colour. Nothing in
this package is chosen by the validation classes; they are looked at only to see that no class is in two parts.
"""

import csv
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.errors import InputError

SIDE = 84
PARTS = ("train", "val", "test")
LAYOUT = "images/ and train.csv, val.csv, test.csv, each with the columns filename,label"
_MOST_BYTES = 4 * 1024 * 1024
"""Of one image; as JPEG they have some thousand."""


def load(directory: str | os.PathLike[str]) -> ImageDataset:
    """Mini-ImageNet from a folder in the usual layout; nothing is written to it.

    Args:
        directory: holds ``images/`` and ``train.csv``, ``val.csv``, ``test.csv`` with a header ``filename,label``.

    Returns:
        A data set named ``miniimagenet``: pixels uint8 ``[classes, samples, 84, 84, 3]``, as stored; labels as in the
        CSV files, sorted. With all classes that is 1.1 GB, and as much again on each device for training.

    Raises:
        InputError: for a folder, file or column that is missing, an image that is not 84×84 or cannot be decoded, a
            class with more images than another, or one that is in two parts. Images are not resized here: how that is
            done changes the task.

    Source: Vinyals et al. (2016); split: Ravi and Larochelle (2017).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; name the one that holds {LAYOUT}")
    missing = [name for name in ("images", *(f"{part}.csv" for part in PARTS)) if not (directory / name).exists()]
    if missing:
        raise InputError(f"{directory}: this folder does not hold {' or '.join(missing)}; it should hold {LAYOUT}")
    classes = {part: _classes(directory / f"{part}.csv") for part in PARTS}
    _check_disjoint(directory, classes)
    return ImageDataset("miniimagenet", *(_images(directory, part, classes[part]) for part in ("train", "test")))


def _classes(path: Path) -> dict[str, list[str]]:
    """The sorted file names of each class of a CSV file, by sorted label."""
    found: dict[str, list[str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                raise InputError(f"{path}: its first line should be filename,label, got {rows.fieldnames}")
            for row in rows:
                name, label = row["filename"], row["label"]
                if not name or not label:
                    raise InputError(f"{path}, line {rows.line_num}: a file name or label is missing")
                if Path(name).name != name or name in ("..", "."):
                    raise InputError(f"{path}, line {rows.line_num}: {name!r} should be a file's name in images/")
                found.setdefault(label, []).append(name)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as comma-separated text ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        raise InputError(f"{path}: it names no image")
    return {label: sorted(found[label]) for label in sorted(found)}


def _check_disjoint(directory, classes):
    for what, members in (
        ("class", {part: list(found) for part, found in classes.items()}),
        ("file", {part: [name for names in found.values() for name in names] for part, found in classes.items()}),
    ):
        counts = Counter(member for part in members.values() for member in part)
        twice = [member for member, count in counts.items() if count > 1]
        if twice:
            where = [f"{part}.csv" for part, names in members.items() if twice[0] in names]
            raise InputError(
                f"{directory}: {what} {twice[0]} is named more than once, in {' and '.join(where)}; each should be in "
                "one part alone"
            )


def _images(directory: Path, part: str, classes: dict[str, list[str]]) -> ImageClasses:
    sizes = {label: len(names) for label, names in classes.items()}
    most = Counter(sizes.values()).most_common(1)[0][0]
    for label, size in sizes.items():
        if size != most:
            raise InputError(
                f"{directory / part}.csv: class {label} has {size} images and others {most}; all should have as many"
            )
    paths = [directory / "images" / name for names in classes.values() for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]}: no such file, and it is named in {part}.csv; {len(missing)} of its {len(paths)} are missing"
        )
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(_decoded, paths)))
    return ImageClasses(pixels.reshape(len(classes), most, SIDE, SIDE, 3), tuple(classes))


def _decoded(path: Path) -> np.ndarray:
    """uint8 ``[84, 84, 3]``."""
    try:
        from PIL import Image  # comes with matplotlib
    except ImportError as error:
        raise InputError(
            "Mini-ImageNet's images are decoded by Pillow, which is missing: pip install pillow"
        ) from error
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path}: larger than {_MOST_BYTES:,} bytes, so not one of Mini-ImageNet's images")
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.size != (SIDE, SIDE):  # said by the header, before anything is decoded
                width, height = image.size
                raise InputError(f"{path}: {width}×{height} pixels instead of {SIDE}×{SIDE}; resize the images first")
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise InputError(f"{path}: cannot be decoded as a JPEG or PNG ({error}); put a whole one there") from error
