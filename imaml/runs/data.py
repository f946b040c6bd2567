"""The dataset of a run: where it comes from, and how a run finds it again.

A run of glyphs writes a copy of them to its folder when it ends or is stopped. The glyphs are drawn from a file of this
package, which a later version may replace. With the copy, a run is resumed and evaluated on the data that it was
trained on. The copy takes about 6 MB.

A run of any other dataset of this package stores the name of the dataset in its settings. A run on one's own data also
stores a *source* in its checkpoints, a dictionary that says how to read the data again. Its ``kind`` is ``"folder"``,
``"named"`` for a registered dataset, or ``"object"`` for a dataset that only the user's program can make.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imaml.datasets as datasets
from imaml.datasets import Dataset, ImageClasses, ImageDataset, UnevenClasses
from imaml.datasets.registry import BUILT_IN, FOLDER, checked
from imaml.datasets.splits import held_out
from imaml.errors import InputError, check
from imaml.learning.tasks import Curve, Episode
from imaml.runs import checkpoints
from imaml.settings.preset import Preset
from imaml.settings.types import type_name
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
) -> Dataset:
    """Return the dataset called ``name``.

    Glyphs come from the copy in the run's folder if there is one. Any other dataset comes from :func:`.datasets.load`.

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
            on_warning(f"{directory / FILE} is damaged ({error}); the glyphs of this package are used")
    return datasets.load(name, data, meanwhile)


def keep(directory: Path, dataset: Dataset) -> None:
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


# --- One's own data ------------------------------------------------------------------------------------------------


def choose(
    preset: Preset,
    data: str | Path | None = None,
    dataset: str | Dataset | None = None,
    directory: Path | None = None,
    meanwhile: Callable[[ImageClasses], None] = lambda training: None,
    on_warning: Callable[[str], None] = lambda message: None,
) -> tuple[Preset, Dataset, dict[str, Any] | None]:
    """Return the preset, the dataset that a user has chosen, and the source of the dataset.

    The returned preset has the name of the dataset. The source is None for a dataset of this package.

    Args:
        preset: the settings. Its dataset is used if ``dataset`` is None. A folder of images is read in the shape that
            the preset's network takes.
        data: the folder of the files of a dataset that is chosen by its name.
        dataset: a dataset, or the name of one.
        directory: the folder of a run. Its newest checkpoint may name the folder of images, or the folder of the files
            of a registered dataset, that the run was trained on.
        meanwhile, on_warning: see :func:`load`.

    Raises:
        InputError: if there is no such dataset, if it cannot be read, if ``data`` is given with a dataset that is not
            chosen by its name, if another dataset is chosen for a preset that draws sinusoids, or if the dataset of the
            run in ``directory`` cannot be read again.
    """
    sinusoids = dataset is None or (isinstance(dataset, str) and dataset == "sinusoid")
    if type(preset.episode) is Curve and not sinusoids:
        raise InputError(
            f"{preset.name} draws sinusoids and would not read another dataset: choose a preset for images, or replace "
            "the preset's episode"
        )
    found, source = _chosen(preset, data, dataset, directory, meanwhile, on_warning)
    if source is not None:
        preset = replace(preset, dataset=found.name)
    elif dataset is not None:
        preset = replace(preset, dataset=dataset)
    return preset, found, source


def _chosen(preset, data, dataset, directory, meanwhile, on_warning):
    """Return the chosen dataset and its source."""
    if dataset is not None and not isinstance(dataset, str):
        check(
            data is None,
            f"data={str(data)!r} names the folder of a dataset that is chosen by its name, but the dataset was passed "
            "as an object: omit data",
        )
        found = checked(dataset, "dataset")
        return found, getattr(found, "recipe", None) or {"kind": "object", "type": type_name(type(found))}
    name = preset.dataset if dataset is None else dataset
    if name in BUILT_IN:
        if directory is None:
            return datasets.load(name, data, meanwhile), None
        return load(directory, name, data, meanwhile, on_warning), None
    earlier = _remembered(directory)
    is_folder = name == FOLDER and (earlier or {}).get("kind") == "folder" and data is None
    if earlier is not None and (is_folder or (dataset is None and earlier["name"] == name)):
        return read_again(directory, earlier, data), earlier | _moved(earlier, data)
    if name == FOLDER and data is not None:
        height, _, channels = getattr(preset.network, "image_shape", (28, 28, 1))
        found = ImageDataset.from_folder(data, height, channels=channels)
        return found, found.recipe
    where = None if data is None else os.path.abspath(data)
    return datasets.load(name, data, meanwhile), {"kind": "named", "registered": name, "directory": where}


def _remembered(directory):
    """Return the source in the newest checkpoint of a run's folder, with the dataset's name; None without a source."""
    found = None if directory is None else checkpoints.newest(directory)
    if found is None or "source" not in found.description:
        return None
    return found.description["source"] | {"name": found.description["config"]["dataset"]}


def _moved(source, data):
    return {} if data is None or source["kind"] == "object" else {"directory": os.path.abspath(data)}


def read_again(run: object, source: dict[str, Any], data: str | Path | None = None) -> Dataset:
    """Return the dataset of a run on one's own data.

    Args:
        run: the run's folder, for messages.
        source: the source in a checkpoint of the run.
        data: the folder of the dataset, if it has been moved.

    Raises:
        InputError: if the dataset was passed to the run as an object, or if it cannot be read any more.
    """
    if source["kind"] == "object":
        raise InputError(
            f"{run} was trained on a dataset that was passed as an object ({source['type']}) and cannot be read "
            "again: pass the same one, as in imaml.evaluate(run, dataset=data) or imaml.train(…, dataset=data)"
        )
    directory = source["directory"] if data is None else data
    if source["kind"] == "named":
        return datasets.load(source["registered"], directory)
    if not Path(directory).is_dir():
        raise InputError(
            f"{run} was trained on the images in {directory}, which is no folder now: if it has been moved, name the "
            "new place with --data DIR (in Python, with data=)"
        )
    return ImageDataset.from_recipe(source, directory)


def name_of(preset: Preset, dataset: str | Dataset | None) -> str:
    """Return the name of the dataset that :func:`choose` reads, before it is read."""
    if dataset is None:
        return preset.dataset
    return dataset if isinstance(dataset, str) else getattr(dataset, "name", repr(dataset))


def enough_images(
    classes: Any, episode: Any, name: str, on_warning: Callable[[str], None] = lambda message: None
) -> Any:
    """Return the classes without those that have too few images for a task.

    Only an :class:`.UnevenClasses` can lose classes. Any other ``classes`` is returned unchanged.

    Args:
        classes: training or held-out classes.
        episode: how tasks are sampled.
        name: the name of the classes, for the message.
        on_warning: called with a message that names the classes that are left out, with their numbers of images.
    """
    if not isinstance(classes, UnevenClasses) or not isinstance(episode, Episode):
        return classes
    kept, small = classes.with_at_least(episode.shots + episode.queries)
    if small:
        shown = [f"{label} ({count})" for label, count in small.items()]
        more = [f"and {len(shown) - 10} more"] if len(shown) > 10 else []
        on_warning(
            f"{name}: {len(small)} of {len(classes)} classes are left out, because they have fewer images than "
            f"{episode.shots} shots and {episode.queries} queries need: {', '.join(shown[:10] + more)}"
        )
    return kept


def usable(
    preset: Preset, dataset: Dataset, part: str, on_warning: Callable[[str], None] = lambda message: None
) -> Any:
    """Return those training, validation or test classes of a dataset that a preset can use.

    Args:
        preset: the settings.
        dataset: the dataset.
        part: ``"train"``, ``"validation"`` or ``"test"``.
        on_warning: called with a message if classes have too few images and are left out.

    Raises:
        InputError: if there is no such part, if there are too few classes or images, or if the network takes images of
            another shape.
    """
    name = f"{dataset.name}'s {'training' if part == 'train' else part} set"
    classes = part_of(preset, dataset, part)
    if classes is None:
        raise InputError(
            f"the dataset {dataset.name} has no validation classes: give it some, or hold out a part of its training "
            "classes, as in --validation.held_out 0.1"
        )
    episode = preset.training_episode if part == "train" else preset.episode
    classes = enough_images(classes, episode, name, on_warning)
    check_shape(preset, classes, name)
    episode.check(classes, name)
    return classes


def part_of(preset: Preset, dataset: Dataset, part: str) -> Any:
    """Return a part of a dataset; None if it does not have the part.

    If the dataset has no validation classes, ``preset.validation.held_out`` is the fraction of its training classes
    that serve as validation classes. The training part is then the remaining classes.

    Args:
        preset: the settings.
        dataset: the dataset.
        part: ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
        InputError: if classes are to be held out, but the training part does not consist of classes of images, or has
            too few of them.
    """
    if part == "test" or getattr(dataset, "validation", None) is not None or not preset.validation.held_out:
        return getattr(dataset, part, None)
    remaining, held = without_held_out(preset, dataset.train, dataset.name)
    return remaining if part == "train" else held


def without_held_out(preset: Preset, classes: Any, name: str) -> tuple[Any, Any]:
    """Return the training classes that remain, and those that ``preset.validation.held_out`` holds out."""
    fraction = preset.validation.held_out
    check(
        isinstance(classes, ImageClasses | UnevenClasses),
        f"validation.held_out divides classes of images, but the training part of {name} is a "
        f"{type(classes).__name__}: give the dataset a part called validation",
    )
    remaining, held = held_out(len(classes), fraction)
    check(
        bool(held and remaining),
        f"validation.held_out={fraction} of the {len(classes)} training classes of {name} are {len(held)} classes: "
        "choose another fraction",
    )
    return classes.subset(remaining), classes.subset(held)


def check_shape(preset: Preset, classes: Any, name: str) -> None:
    """Raise InputError if there are no images, or if they do not have the network's shape.

    The error is also raised if the preset rotates images and they are not square.
    """
    if isinstance(preset.episode, Episode) and not hasattr(classes, "samples"):
        raise InputError(f"{preset.name} draws tasks from images, but {name} has none: choose another dataset")
    shape, wanted = getattr(classes, "image_shape", None), getattr(preset.network, "image_shape", None)
    if shape is None:
        return
    if wanted is not None and tuple(wanted) != tuple(shape):
        raise InputError(
            f"the network of {preset.name} takes images of {_sides(wanted)}, but those of {name} have {_sides(shape)}: "
            f"read them with size={wanted[0]} and channels={wanted[2]}, or replace network.image_shape"
        )
    if (preset.turns(training=True) or preset.turns(training=False)) and shape[0] != shape[1]:
        raise InputError(
            f"{preset.name} rotates images by multiples of 90°, but those of {name} have {_sides(shape)}: make them "
            "square, or replace rotations by None"
        )


def _sides(shape):
    return "×".join(map(str, shape))
