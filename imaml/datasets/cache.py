"""Arrays kept between runs: written whole or not at all, and checked when read."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def cache_directory() -> Path:
    """``$IMAML_CACHE``, else ``$XDG_CACHE_HOME/imaml``, else ``~/.cache/imaml``."""
    if directory := os.environ.get("IMAML_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imaml"


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays, or None where there are none or the file is not what was written."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception:  # a damaged archive can raise nearly anything; it is drawn again
        return None
    recorded = arrays.pop("sha256", None)
    return arrays if recorded is not None and str(recorded) == _digest(arrays) else None


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            contents: dict[str, Any] = {"sha256": np.array(_digest(arrays)), **arrays}
            np.savez_compressed(stream, **contents)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """``build()``'s arrays, from ``cache_directory()/name.npz`` where it holds them whole.

    ``name`` carries whatever the arrays depend on (a version, a hash of the source). A folder that
    cannot be written costs time, never a run.
    """
    path = cache_directory() / f"{name}.npz"
    arrays = _read(path)
    if arrays is None:
        arrays = build()
        with contextlib.suppress(OSError):
            _write(path, arrays)
    return arrays
