"""Mini-ImageNet, read from a folder ``images/`` and three CSV files that assign each image to a class.

ImageNet's terms do not allow redistribution of the images, so this package cannot download them. The split is that of
Ravi and Larochelle (2017): 64 training, 16 validation and 20 test classes, with 600 colour images of 84×84 pixels each.
The validation images are never read. ``val.csv`` only serves to check that no class or file is in two parts.
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
_MAX_BYTES = 4 * 1024 * 1024
"""Greatest size of one image file. A JPEG of 84×84 pixels has a few thousand bytes."""


def load(directory: str | os.PathLike[str]) -> ImageDataset:
    """Return Mini-ImageNet, read from ``directory``.

    Images are not resized, because the method of resizing changes the task.

    Args:
        directory: the folder with ``images/`` and ``train.csv``, ``val.csv``, ``test.csv``. The header of each CSV file
            is ``filename,label``. The folder is only read.

    Returns:
        A dataset named ``miniimagenet``. Its pixels are uint8 ``[classes, samples, 84, 84, 3]`` in RGB, unscaled. Its
        labels are those of the CSV files, sorted. The training and test parts together take 1.1 GB of host memory.
        During training, each device also holds a copy of the training part.

    Raises:
        InputError: if a folder, file, column or Pillow is missing, if a CSV file cannot be read as a list of images, if
            an image is not 84×84 pixels or cannot be decoded, if the classes of the training or test part differ in
            their number of images, if a class is in two parts, or if a file is named twice.

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
    train, test = (_images(directory, part, classes[part]) for part in ("train", "test"))
    return ImageDataset("miniimagenet", train, test)


def _classes(path: Path) -> dict[str, list[str]]:
    """Return the sorted file names of each class in a CSV file, keyed by sorted label."""
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
                f"{directory}: {what} {twice[0]} is named more than once, in {' and '.join(where)}; each class should "
                "be in one CSV file, and each file should be named once"
            )


def _images(directory: Path, part: str, classes: dict[str, list[str]]) -> ImageClasses:
    sizes = {label: len(names) for label, names in classes.items()}
    common_size = Counter(sizes.values()).most_common(1)[0][0]
    for label, size in sizes.items():
        if size != common_size:
            raise InputError(
                f"{directory / part}.csv: class {label} has {size} images, but other classes have {common_size}; all "
                "classes should have the same number"
            )
    paths = [directory / "images" / name for names in classes.values() for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]}: no such file, although {part}.csv names it; {len(missing)} of the {len(paths)} files in "
            f"{part}.csv are missing"
        )
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(_decode, paths)))
    return ImageClasses(pixels.reshape(len(classes), common_size, SIDE, SIDE, 3), tuple(classes))


def _decode(path: Path) -> np.ndarray:
    """Return the pixels of an image file, uint8 ``[84, 84, 3]`` in RGB."""
    try:
        from PIL import Image  # comes with matplotlib
    except ImportError as error:
        raise InputError(
            "Mini-ImageNet's images are decoded by Pillow, which is missing: pip install pillow"
        ) from error
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: larger than {_MAX_BYTES:,} bytes, so it is not an image of Mini-ImageNet")
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.size != (SIDE, SIDE):  # Pillow reads the size from the header, without decoding pixels
                width, height = image.size
                raise InputError(f"{path}: {width}×{height} pixels instead of {SIDE}×{SIDE}; resize the images first")
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # Pillow raises many exception types on damaged bytes
        raise InputError(
            f"{path}: cannot be decoded as a JPEG or PNG ({error}); replace it by an undamaged file"
        ) from error
