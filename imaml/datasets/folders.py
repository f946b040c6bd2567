"""Images in folders, one folder for each class, decoded by Pillow to one size."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imaml.datasets.splits import ALIASES, PARTS
from imaml.errors import InputError, check, check_choice

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP"}
"""The suffixes of image files, and their formats. A file may have any of the formats, whatever its suffix is."""
UNDIVIDED = "all"
"""The key of all classes in the result of :func:`class_folders`, if the folder does not divide them into parts."""
FITS = ("crop", "pad", "stretch")


class Reading(NamedTuple):
    """How an image file becomes an array.

    Attributes:
        size: height and width of the result in pixels.
        channels: 1 for grey, 3 for RGB.
        fit: what happens to an image that is not square. ``"crop"`` cuts off both ends of its longer side, ``"pad"``
            adds a margin of the background to its shorter side, and ``"stretch"`` changes its proportions.
        invert: whether to replace each value v by 255 − v, so that dark ink on light paper becomes 255 on 0.
    """

    size: int
    channels: int
    fit: str
    invert: bool

    def check(self) -> None:
        """Raise InputError if a value is out of range."""
        check(isinstance(self.size, int) and self.size >= 1, f"size must be an integer above 0, got {self.size!r}")
        check(self.channels in (1, 3), f"channels must be 1 for grey or 3 for colour, got {self.channels!r}")
        check_choice("fit", self.fit, FITS)


def class_folders(directory: Path) -> dict[str, dict[str, list[Path]]]:
    """Return ``files[part][label]``, the image files of each class in each part (training, validation or test).

    If ``directory`` has the subfolders ``train`` and ``test``, and no others except ``val`` or ``validation``, these
    subfolders are the parts, and their own subfolders are the classes. Otherwise the subfolders of ``directory`` are
    the classes of the one part :data:`UNDIVIDED`. Classes and files are sorted by name. Hidden files and folders, and
    files with a suffix that is not in :data:`SUFFIXES`, are ignored.

    Raises:
        InputError: if the folder does not exist, if it or one of its parts has no subfolders, if a class has no image,
            or if the parts include both ``val`` and ``validation``.
    """
    folders = _subfolders(directory)
    names = {ALIASES.get(path.name, path.name): path for path in folders}
    if {"train", "test"} <= set(names) <= set(PARTS):
        check(len(names) == len(folders), f"{directory}: val and validation are the same part: keep one of the folders")
        return {part: classes_of(path) for part, path in names.items()}
    return {UNDIVIDED: classes_of(directory)}


def _subfolders(directory):
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; name one that holds a folder of images for each class")
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def classes_of(directory: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, one subfolder for each class. Classes and files are sorted by name.

    Raises:
        InputError: if there is no such folder, if it has no subfolder, or if a class has no image.
    """
    classes = {folder.name: images_in(folder) for folder in _subfolders(directory)}
    if not classes:
        raise InputError(f"{directory}: it should hold a folder of images for each class, but it has no subfolder")
    return classes


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder, sorted by name.

    Raises:
        InputError: if there is no such folder, or if it has no image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of images")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not found:
        nested = "; the images should lie directly in it" if _subfolders(folder) else ""
        raise InputError(f"{folder}: this folder has no image (a file {', '.join(SUFFIXES)}){nested}")
    return found


def read(classes: dict[str, list[Path]], reading: Reading) -> tuple[np.ndarray, tuple[int, ...], str]:
    """Return the pixels of all images, the number of images of each class, and a hash of the files' bytes.

    The hash also depends on ``reading``. It does not depend on the names of the files beyond their order, nor on the
    version of Pillow, which may change a pixel.

    Args:
        classes: the files of each class.
        reading: how the files are decoded.

    Returns:
        ``pixels``, uint8 ``[images, size, size, channels]``; the counts; and the hash in hexadecimal.

    Raises:
        InputError: if Pillow is missing, or if a file cannot be read or decoded.
    """
    paths = [path for files in classes.values() for path in files]
    shape = (len(paths), reading.size, reading.size, reading.channels)
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda path: _decode(path, reading), paths))
    pixels = np.stack([image for image, _ in decoded]) if paths else np.zeros(shape, np.uint8)
    digest = hashlib.sha256(repr(tuple(reading)).encode())
    for _, content in decoded:
        digest.update(content)
    return pixels, tuple(map(len, classes.values())), digest.hexdigest()


def read_image(path: Path, reading: Reading) -> np.ndarray:
    """Return an image file as uint8 ``[size, size, channels]``.

    Raises:
        InputError: if Pillow is missing, or if the file cannot be read or decoded.
    """
    return _decode(path, reading)[0]


def _decode(path: Path, reading: Reading) -> tuple[np.ndarray, bytes]:
    """Return the pixels of an image file, uint8 ``[size, size, channels]``, and the SHA-256 of its bytes."""
    try:
        from PIL import Image, UnidentifiedImageError  # comes with matplotlib
    except ImportError as error:
        raise InputError("images are decoded by Pillow, which is missing: pip install pillow") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from error
    try:
        with Image.open(io.BytesIO(content), formats=sorted(set(SUFFIXES.values()))) as image:
            pixels = np.asarray(_fitted(_flat(image, reading.channels), reading))
    except Exception as error:  # Pillow raises many exception types on damaged bytes
        formats = ", ".join(sorted(set(SUFFIXES.values())))
        cause = f"no {formats}" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(
            f"{path}: cannot be decoded as an image ({cause}); replace it by an undamaged file, or remove it"
        ) from error
    pixels = pixels.reshape(reading.size, reading.size, reading.channels)
    return 255 - pixels if reading.invert else pixels, hashlib.sha256(content).digest()


def _flat(image: Any, channels: int) -> Any:
    """Return the first frame of an image in 8-bit grey or RGB. It is turned upright, and transparency becomes white."""
    from PIL import Image, ImageOps

    if image.mode.startswith("I;16"):  # convert would clip 16 bits to 255 instead of scaling them
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}), whose range is unknown")
    image = ImageOps.exif_transpose(image)  # EXIF stores how the camera was held
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")


def _fitted(image: Any, reading: Reading) -> Any:
    """Return an image of the wanted size, filtered by Lanczos."""
    from PIL import Image, ImageOps

    size, filtering = (reading.size, reading.size), Image.Resampling.LANCZOS
    if reading.fit == "crop":
        return ImageOps.fit(image, size, filtering)
    if reading.fit == "pad":
        # The background is white paper if the ink is inverted, and black otherwise, so that the margin becomes 0.
        return ImageOps.pad(image, size, filtering, color="white" if reading.invert else "black")
    return image.resize(size, filtering)
