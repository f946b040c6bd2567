"""Few-shot datasets: classes of small images, split into training and held-out classes, and families of curves."""

from collections.abc import Callable
from pathlib import Path

from imaml.datasets import glyphs, miniimagenet, omniglot, sinusoid
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.datasets.sinusoid import SinusoidDataset
from imaml.errors import InputError

__all__ = ["ImageClasses", "ImageDataset", "SinusoidDataset", "download", "load"]

NAMES = ("glyphs", "omniglot", "miniimagenet", "sinusoid")


def load(
    name: str,
    directory: str | Path | None = None,
    meanwhile: Callable[[ImageClasses], None] = lambda training: None,
) -> ImageDataset | SinusoidDataset:
    """The dataset of that name.

    Args:
        name: ``"glyphs"``, embedded; ``"sinusoid"``, drawn; ``"omniglot"`` or ``"miniimagenet"``, from files.
        directory: the folder of those files: Omniglot's two official archives, by default where :func:`download` put
            them; Mini-ImageNet's images and split.
        meanwhile: called before glyphs are drawn or Omniglot is decoded, where that is not in the cache, with blank
            classes in the shape that the training classes will have; a thread that it starts goes on beside.

    Raises:
        InputError: for an unknown name, a folder where none is needed or none where one is, or files
            that are missing or damaged.
    """
    if name == "glyphs":
        if directory is not None:
            raise InputError(
                "glyphs are embedded and take no data folder: leave --data out, or name an omniglot preset"
            )
        return glyphs.load(meanwhile)
    if name == "omniglot":
        if directory is None:
            directory = omniglot.default_directory()
            if not directory.is_dir():
                raise InputError(
                    "omniglot needs its two official archives, images_background.zip and images_evaluation.zip: "
                    "fetch them with 'imaml data omniglot', or name the folder that holds them with --data DIR"
                )
        return omniglot.load(directory, meanwhile)
    if name == "miniimagenet":
        if directory is None:
            raise InputError(
                f"miniimagenet needs its images: name the folder that holds {miniimagenet.LAYOUT}, with --data DIR"
            )
        return miniimagenet.load(directory)
    if name == "sinusoid":
        return sinusoid.load(directory)
    raise _unknown(name)


def download(
    name: str,
    directory: str | Path | None = None,
    url: str | None = None,
    on_event: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Path:
    """Fetch and check the official files of a dataset that is not embedded; see :func:`.omniglot.download`.

    Returns:
        The folder that holds them: ``directory``, or the one where :func:`load` looks for them by default.
    """
    if name == "glyphs":
        raise InputError("glyphs are embedded: there is nothing to fetch")
    if name == "sinusoid":
        raise InputError("sinusoids are drawn: there is nothing to fetch")
    if name == "miniimagenet":
        raise InputError(
            f"miniimagenet may not be handed on: ask for it, and name the folder that holds {miniimagenet.LAYOUT}"
        )
    if name != "omniglot":
        raise _unknown(name)
    folder = Path(directory) if directory is not None else omniglot.default_directory()
    omniglot.download(folder, url or omniglot.URL, on_event, on_progress)
    return folder


def _unknown(name):
    return InputError(f"there is no dataset {name!r}: known are {', '.join(NAMES)}")
