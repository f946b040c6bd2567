"""Named arrays on disk: an ``.npz`` file that is written atomically and holds a checksum of its arrays."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imaml.storage.files import write_whole

CHECKSUM = "sha256"
RESERVED = (CHECKSUM, "file", "allow_pickle")
"""Names that an array cannot have: the name of the checksum, and the parameters of ``numpy.savez``."""


class DamagedFile(ValueError):
    """The error for a file that is not in the expected format, or whose contents have changed since it was written."""


def write(path: Path, arrays: dict[str, np.ndarray], compressed: bool = False) -> None:
    """Write ``arrays`` and their SHA-256 checksum to ``path`` atomically.

    Args:
        path: the file to create or to replace.
        arrays: arrays by name, of any shape and any numpy dtype but ``object``. No name may be in ``RESERVED``.
        compressed: write a smaller file, which takes longer.

    Raises:
        OSError: if the file cannot be written; see :func:`.write_whole`.
    """
    contents: dict[str, Any] = {CHECKSUM: np.array(digest(arrays)), **arrays}
    save = np.savez_compressed if compressed else np.savez
    write_whole(path, lambda stream: save(stream, **contents))


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays that :func:`write` stored at ``path``, bit for bit.

    Raises:
        DamagedFile: if the file is not an ``.npz`` archive with a checksum, if the checksum does not match, or if the
            file contains a pickle. Pickles are never loaded.
        OSError: if the file cannot be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        recorded = str(arrays.pop(CHECKSUM))
    except Exception as error:  # numpy, zipfile and zlib raise many exception types on damaged bytes
        raise DamagedFile(f"{type(error).__name__}: {error}") from error
    if recorded != digest(arrays):
        raise DamagedFile("its checksum does not match its contents")
    return arrays


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of named arrays: of their names, dtypes, shapes and contents."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {arrays[name].shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()
