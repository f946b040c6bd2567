"""Arrays kept between runs: written whole or not at all, and checked when read."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imaml.storage import arrays
from imaml.storage.files import sweep

STALE = 3600.0
"""Seconds after which a file that was never finished belongs to a process that died: writing takes seconds."""


def cache_directory() -> Path:
    """``$IMAML_CACHE``, else ``$XDG_CACHE_HOME/imaml``, else ``~/.cache/imaml``."""
    if directory := os.environ.get("IMAML_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imaml"


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """``build()``'s arrays, from ``cache_directory()/name.npz`` where it holds them whole.

    ``name`` carries whatever the arrays depend on (a version, a hash of the source). A folder that
    cannot be read or written costs time, never a run.
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
