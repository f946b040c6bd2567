"""Datasets of one's own, registered by name in this process or offered by installed packages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from imaml import entry_points
from imaml.errors import InputError, check

GROUP = "imaml.datasets"
"""The group of the entry points by which packages offer datasets."""
BUILT_IN = ("glyphs", "omniglot", "omniglot-alphabets", "miniimagenet", "sinusoid")
FOLDER = "folder"
"""The name under which a folder of images is read."""


@runtime_checkable
class Dataset(Protocol):
    """The attributes of a dataset that training and evaluation use."""

    @property
    def name(self) -> str:
        """The name of the dataset. It is one of the settings of a run."""
        ...

    @property
    def train(self) -> Any:
        """The training part. The preset's episode checks the part, and draws tasks from its ``source``, a pytree."""
        ...

    @property
    def test(self) -> Any:
        """The held-out part, of the same form as ``train``."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the contents. Two datasets that can give different tasks must have different hashes."""
        ...


Reader = Callable[[Path | None], Dataset]
"""A function that returns a dataset. It is called with the folder of the files, or with None if the user named none."""

_readers: dict[str, Reader] = {}


def register_dataset(name: str, read: Reader) -> None:
    """Make a dataset available by its name, in this process, to :func:`imaml.train` and :func:`imaml.evaluate`.

    The command line is another process. It finds the datasets that installed packages offer by an entry point::

        [project.entry-points."imaml.datasets"]
        cards = "my_package.data:read_cards"

    Args:
        name: the name, which no dataset of this package may have. An earlier reader of this name is replaced.
        read: called with the folder of the files, or with None if the user names none. It returns an
            :class:`imaml.ImageDataset`, or another record with ``name``, ``train``, ``test`` and ``fingerprint()``.

    Raises:
        InputError: if the name is not a string, is empty, or is taken by this package, or if ``read`` cannot be called.

    >>> import numpy as np
    >>> import imaml
    >>> def read(folder):
    ...     x = np.zeros((40, 28, 28), np.uint8)
    ...     return imaml.ImageDataset.from_arrays(x, np.arange(40) % 10, name="blank")
    >>> register_dataset("blank", read)
    >>> imaml.datasets.load("blank").test.labels
    ('2', '8')
    """
    check(isinstance(name, str) and bool(name), f"the name of a dataset should be a word, got {name!r}")
    taken = name in (*BUILT_IN, FOLDER)
    check(not taken, f"the name {name!r} is taken by a dataset of this package: choose another name")
    check(callable(read), f"read should be a function from a folder to a dataset, got {read!r}")
    _readers[name] = read


def names() -> tuple[str, ...]:
    """Return the names of the registered datasets and of those that installed packages offer."""
    return (*_readers, *(name for name in entry_points.offered(GROUP) if name not in _readers))


def read(name: str, directory: str | Path | None) -> Dataset:
    """Read the registered or offered dataset called ``name``.

    Args:
        name: the name of the dataset.
        directory: the folder of its files, or None.

    Raises:
        InputError: if a package that offers the dataset cannot be imported, or if the result is no dataset. Errors of
            the dataset's own function are not changed.
    """
    reader = _readers[name] if name in _readers else entry_points.load(GROUP, name)
    dataset = reader(None if directory is None else Path(directory))
    return checked(dataset, f"the dataset that {name!r} reads")


def checked(dataset: Any, what: str) -> Any:
    """Return ``dataset`` if it has the attributes of :class:`Dataset`.

    Raises:
        InputError: if it is a class, if it lacks an attribute of :class:`Dataset`, or if its name is not a string. The
            message begins with ``what``.
    """
    if isinstance(dataset, type) or not isinstance(dataset, Dataset) or not isinstance(dataset.name, str):
        raise InputError(
            f"{what} should be an imaml.ImageDataset, or a record with a name, the parts train and test, and a method "
            f"fingerprint(); got {dataset!r:.100}"
        )
    return dataset
