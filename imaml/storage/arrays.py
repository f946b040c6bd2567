"""Named arrays on disk: an ``.npz`` file that is written whole and carries a checksum of what it holds."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from imaml.storage.files import write_whole

CHECKSUM = "sha256"


class DamagedFile(ValueError):
    """The file is not what was written."""


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write ``arrays``, of numpy's own types, to ``path``, whole or not at all.

    Raises:
        OSError: where it cannot be written; the old file, if any, stands.
    """
    contents: dict[str, Any] = {CHECKSUM: np.array(_digest(arrays)), **arrays}
    write_whole(path, lambda stream: np.savez(stream, **contents))


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays that were written to ``path``, to the bit.

    Raises:
        DamagedFile: for anything else, and for pickles, which are never opened.
        OSError: where the file cannot be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        recorded = str(arrays.pop(CHECKSUM))
    except Exception as error:  # damaged bytes make numpy, zipfile and zlib raise nearly anything
        raise DamagedFile(f"{type(error).__name__}: {error}") from error
    if recorded != _digest(arrays):
        raise DamagedFile("its checksum is another")
    return arrays


def _digest(arrays):
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {arrays[name].shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
