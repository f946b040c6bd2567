"""Image files of a user: PNG and JPEG files of any size, in folders."""

import os
from pathlib import Path

import numpy as np

from imaml.errors import InputError, check

SUFFIXES = (".png", ".jpg", ".jpeg")
DRAWINGS = ("glyphs", "omniglot")
"""The datasets of drawings, whose arrays have ink 255 and paper 0. In image files, ink is usually dark."""
_MAX_BYTES = 64 * 1024 * 1024
"""Greatest size of one image file."""


def read_image(path: str | os.PathLike[str], shape: tuple[int, int, int], invert: bool = False) -> np.ndarray:
    """Return an image file as uint8 ``[height, width, channels]``.

    The image is turned as its EXIF data say. Transparent parts become white. Then it is converted to grey or RGB, and
    resized with a Lanczos filter. An image with another ratio of its sides is distorted.

    Args:
        path: a PNG or JPEG file.
        shape: height, width and channels. One channel is grey, three are RGB.
        invert: return 255 minus the pixels, so that dark ink becomes bright as in the datasets of drawings.

    Raises:
        InputError: if the file cannot be read or decoded, if it is larger than 64 MiB or has more pixels than Pillow
            accepts, if Pillow is missing, or for another number of channels.
    """
    try:
        from PIL import Image, ImageOps  # comes with matplotlib
    except ImportError as error:
        raise InputError("images are decoded by Pillow, which is missing: pip install pillow") from error
    height, width, channels = shape
    check(channels in (1, 3), f"an image file has 1 channel (grey) or 3 (RGB), but the network takes {channels}")
    path = Path(path)
    try:
        size = path.stat().st_size
        check(size <= _MAX_BYTES, f"{path}: {size:,} bytes are more than the {_MAX_BYTES:,} that are read")
        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.LANCZOS)
            pixels = np.asarray(image, np.uint8).reshape(shape)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an image ({error.strerror or error})") from error
    except Exception as error:  # Pillow raises many exception types on damaged bytes
        raise InputError(f"{path}: cannot be decoded as a PNG or JPEG ({error})") from error
    return 255 - pixels if invert else pixels


def image_files(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the PNG and JPEG files in a folder, sorted by name. Hidden files and subfolders are left out.

    Raises:
        InputError: if there is no such folder, or if it holds no such file.
    """
    directory = _folder(directory)
    found = sorted(path for path in directory.iterdir() if path.suffix.lower() in SUFFIXES and _visible(path))
    check(bool(found), f"{directory}: this folder holds no image file ({', '.join(SUFFIXES)})")
    return found


def class_folders(directory: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """Return the image files of each class in a folder with one subfolder for each class, both sorted by name.

    Raises:
        InputError: if there is no such folder, if it holds no subfolders, or if a subfolder holds no image file.
    """
    directory = _folder(directory)
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and _visible(path))
    check(bool(folders), f"{directory}: there should be one subfolder of images for each class, but there is none")
    return {folder.name: image_files(folder) for folder in folders}


def _folder(directory):
    directory = Path(directory)
    check(directory.is_dir(), f"{directory}: no such folder")
    return directory


def _visible(path):
    return not path.name.startswith(".")
