"""The dataset of a run. A run of glyphs keeps a copy of them in its folder.

Glyphs are rendered from the fonts of the installed matplotlib, and an upgrade of matplotlib can change them. With the
copy, a run is resumed and evaluated on the data that it was trained on. The copy takes about 6 MB.
"""

from collections.abc import Callable
from pathlib import Path

from imaml import datasets
from imaml.datasets import ImageClasses, ImageDataset, SinusoidDataset
from imaml.storage import arrays

KEPT = "glyphs"
"""The dataset of which a run keeps a copy."""
FILE = "glyphs.npz"


def load(
    directory: Path,
    name: str,
    data: str | Path | None = None,
    meanwhile: Callable[[ImageClasses], None] = lambda training: None,
    on_warning: Callable[[str], None] = lambda message: None,
) -> ImageDataset | SinusoidDataset:
    """Return the dataset called ``name``, for glyphs from the copy in a run's folder if there is one.

    Otherwise the dataset comes from :func:`.datasets.load`.

    Args:
        directory: the run's folder. It need not exist, or hold a copy.
        name: the name of the dataset.
        data: the folder of the dataset's files; see :func:`.datasets.load`. If it is given, the copy is not used.
        meanwhile: see :func:`.datasets.load`. It is not called if the copy is used.
        on_warning: called with a message if the copy is damaged. It is then not used.

    Raises:
        InputError: as :func:`.datasets.load` does.
    """
    if name == KEPT and data is None:
        try:
            return ImageDataset.from_dictionary(KEPT, arrays.read(directory / FILE))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except arrays.DamagedFile as error:
            on_warning(f"{directory / FILE} is damaged ({error}); the glyphs of the installed matplotlib are used")
    return datasets.load(name, data, meanwhile)


def keep(directory: Path, dataset: ImageDataset | SinusoidDataset) -> None:
    """Write a copy of the glyphs to a run's folder, if the folder has no intact one. Other datasets are not copied.

    Raises:
        OSError: if the file cannot be written.
    """
    if dataset.name != KEPT or not isinstance(dataset, ImageDataset):
        return
    try:
        arrays.read(directory / FILE)
    except (FileNotFoundError, arrays.DamagedFile):
        arrays.write(directory / FILE, dataset.dictionary(), compressed=True)
