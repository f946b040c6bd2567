"""A cache of arrays on disk, written atomically and verified by a checksum on reading."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imaml.storage import arrays
from imaml.storage.files import sweep

STALE = 3600.0
"""Age in seconds at which a temporary file counts as abandoned. Writing a cache file takes only seconds."""


def cache_directory() -> Path:
    """Return the cache folder: ``$IMAML_CACHE``, else ``$XDG_CACHE_HOME/imaml``, else ``~/.cache/imaml``."""
    if directory := os.environ.get("IMAML_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imaml"


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the arrays of ``build()``, read from ``cache_directory()/NAME.npz`` if an earlier call has stored them.

    A missing, unreadable or damaged entry is built anew. If the new entry cannot be stored, no error is raised.

    Args:
        name: the name of the cache entry. It must contain everything on which the arrays depend, such as a version
            or a hash of the source.
        build: called without arguments if the entry cannot be read; returns arrays by name.
    """
    path = cache_directory() / f"{name}.npz"
    with contextlib.suppress(OSError, arrays.DamagedFile):
        return arrays.read(path)
    built = build()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, older_than=STALE)
        arrays.write(path, built)
    return built
