"""Few-shot datasets: images of training classes and held-out test classes, and a distribution of sinusoids.

:class:`ImageDataset` also reads one's own folders and arrays, and :func:`register_dataset` gives a dataset a name.
"""

from collections.abc import Callable
from pathlib import Path

from imaml.datasets import glyphs, miniimagenet, omniglot, omniglot_alphabets, registry, sinusoid
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.datasets.registry import BUILT_IN, FOLDER, Dataset, register_dataset
from imaml.datasets.sinusoid import SinusoidDataset
from imaml.datasets.uneven import UnevenClasses
from imaml.errors import InputError, unknown

__all__ = [
    "Dataset", "ImageClasses", "ImageDataset", "SinusoidDataset", "UnevenClasses", "download", "load",
    "register_dataset",
]  # fmt: skip


def load(
    name: str,
    directory: str | Path | None = None,
    meanwhile: Callable[[ImageClasses], None] = lambda training: None,
) -> Dataset:
    """Return the dataset called ``name``.

    Args:
        name: ``"glyphs"`` (drawn from a file of this package), ``"sinusoid"`` (sampled), ``"omniglot"``,
            ``"omniglot-alphabets"`` (the same characters, split by whole alphabets) or ``"miniimagenet"`` (these three
            are read from files), ``"folder"`` (:meth:`ImageDataset.from_folder` with its defaults), a name that
            :func:`register_dataset` has registered, or one that an installed package offers.
        directory: the folder of the files. For ``omniglot`` and ``omniglot-alphabets`` it holds the two official
            archives; None takes the folder to which :func:`download` writes by default. For ``miniimagenet`` it holds
            the images and the three CSV files. For ``folder`` it holds one folder of images for each class. ``glyphs``
            and ``sinusoid`` need None. The function of a registered or offered dataset gets this folder.
        meanwhile: called just before glyphs are drawn or Omniglot is decoded, with a blank :class:`ImageClasses` in
            the shape of the training classes. Drawing and decoding take seconds, in which a thread that ``meanwhile``
            starts can compile a program for that shape. If the arrays are in the cache, ``meanwhile`` is not called.

    Raises:
        InputError: if the name is unknown, if ``directory`` does not suit the dataset, if a file or Pillow is missing,
            if a file is damaged, or if a registered or offered function does not return a dataset.
    """
    if name == "glyphs":
        if directory is not None:
            raise InputError(
                "the glyphs dataset reads no files and takes no data folder: omit --data, or choose an omniglot preset"
            )
        return glyphs.load(meanwhile)
    if name in omniglot_alphabets.SPLITS:
        if directory is None:
            directory = omniglot.default_directory()
            if not directory.is_dir():
                raise InputError(
                    f"{name} needs Omniglot's two official archives, images_background.zip and images_evaluation.zip: "
                    "download them with 'imaml data omniglot', or name the folder that holds them with --data DIR"
                )
        read = omniglot.load if name == "omniglot" else omniglot_alphabets.load
        return read(directory, meanwhile)
    if name == "miniimagenet":
        if directory is None:
            raise InputError(
                f"miniimagenet needs its images: use --data DIR to name the folder that holds {miniimagenet.LAYOUT}"
            )
        return miniimagenet.load(directory)
    if name == "sinusoid":
        return sinusoid.load(directory)
    if name == FOLDER:
        if directory is None:
            raise InputError("use --data DIR to name a folder that holds one folder of images for each class")
        return ImageDataset.from_folder(directory)
    if name in registry.names():
        return registry.read(name, directory)
    raise _unknown(name)


def download(
    name: str,
    directory: str | Path | None = None,
    url: str | None = None,
    on_event: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Path:
    """Download the official files of a dataset and verify their contents. Only Omniglot can be downloaded.

    Args:
        name: the name of the dataset. ``"omniglot"`` and ``"omniglot-alphabets"`` have the same files.
        directory: the folder for the files. None takes the folder in which :func:`load` looks by default.
        url, on_event, on_progress: see :func:`.omniglot.download`.

    Returns:
        The folder that holds the files.

    Raises:
        InputError: if the name is unknown, if this package cannot download the dataset, if another process downloads to
            the same folder, if the download fails, if Pillow is missing, or if the downloaded files are not the
            official ones.
        OSError: if the folder cannot be written.
    """
    if name == "glyphs":
        raise InputError("the glyphs dataset is part of this package: there is nothing to download")
    if name == "sinusoid":
        raise InputError("the sinusoid dataset is sampled: there is nothing to download")
    if name == "miniimagenet":
        raise InputError(
            "miniimagenet may not be redistributed: obtain the images yourself, and use --data DIR of 'imaml train' to "
            f"name the folder that holds {miniimagenet.LAYOUT}"
        )
    if name not in omniglot_alphabets.SPLITS:
        raise _unknown(name)
    folder = Path(directory) if directory is not None else omniglot.default_directory()
    omniglot.download(folder, url or omniglot.URL, on_event, on_progress)
    return folder


def _unknown(name):
    return unknown("dataset", name, (*BUILT_IN, FOLDER, *registry.names()))
