"""Few-shot datasets: classes of small images, split into training and held-out classes."""

from pathlib import Path

from imaml.datasets import glyphs, omniglot
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.errors import InputError

__all__ = ["ImageClasses", "ImageDataset", "load"]


def load(name: str, directory: str | Path | None = None) -> ImageDataset:
    """The dataset of that name.

    Args:
        name: ``"glyphs"``, embedded, or ``"omniglot"``.
        directory: the folder of Omniglot's two official archives.

    Raises:
        InputError: for an unknown name, a folder where none is needed or none where one is, or archives
            that are missing or damaged.
    """
    if name == "glyphs":
        if directory is not None:
            raise InputError(
                "glyphs are embedded and take no data folder: leave --data out, or name an omniglot preset"
            )
        return glyphs.load()
    if name == "omniglot":
        if directory is None:
            raise InputError(
                "omniglot needs its two official archives, images_background.zip and images_evaluation.zip: "
                "name the folder that holds them with --data DIR"
            )
        return omniglot.load(directory)
    raise InputError(f"there is no dataset {name!r}: known are glyphs and omniglot")
