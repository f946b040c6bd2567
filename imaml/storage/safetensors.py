"""Named arrays in the safetensors format, which other libraries read too, and which cannot contain code.

A file is an unsigned 64-bit length, a JSON header of that length with the dtype, shape and position of each array, and
the arrays' bytes in C order. All numbers are little-endian.

Source: the format's description, https://huggingface.co/docs/safetensors.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # a dependency of jax
import numpy as np

from imaml.storage.arrays import DamagedFile
from imaml.storage.files import write_whole

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
    "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""NumPy's dtypes by their names in the format. Other dtypes are neither written nor read."""
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LENGTH = 8
_METADATA = "__metadata__"


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``arrays`` to ``path`` atomically.

    Args:
        path: the file to create or to replace.
        arrays: arrays by name, with a dtype of :data:`DTYPES`. The name ``__metadata__`` is reserved.
        metadata: texts by name, for readers of the file.

    Raises:
        ValueError: for an array of another dtype, or for the reserved name.
        OSError: if the file cannot be written; see :func:`.write_whole`.
    """
    header: dict = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, array in arrays.items():
        if name == _METADATA or array.dtype not in _NAMES:
            raise ValueError(
                f"cannot write the array {name!r} of dtype {array.dtype}: the name {_METADATA} is reserved, and the "
                f"dtypes that can be written are {', '.join(map(str, _NAMES))}"
            )
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # readers that map the file into memory need aligned arrays
    content = [len(text).to_bytes(_LENGTH, "little"), text, *(array.tobytes() for array in arrays.values())]
    write_whole(path, lambda stream: stream.write(b"".join(content)))


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file, by name.

    Raises:
        DamagedFile, OSError: as :func:`read_with_metadata` does.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays of a file and the texts that were written with them, both by name.

    Raises:
        DamagedFile: if the file is not in the format, or has an array of a dtype that is not in :data:`DTYPES`.
        OSError: if the file cannot be read.
    """
    content = path.read_bytes()
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    if start > len(content):
        raise DamagedFile(f"not a safetensors file: it has {len(content)} bytes, less than its header")
    try:
        header = json.loads(content[_LENGTH:start])
        entries = {name: entry for name, entry in header.items() if name != _METADATA}
        found = {name: _array(entry, content[start:]) for name, entry in entries.items()}
        return found, dict(header.get(_METADATA, {}))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFile(f"not a safetensors file: {type(error).__name__}: {error}") from error


def _array(entry, data):
    dtype, shape, (first, last) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the positions {first} and {last} do not fit an array {shape} of {dtype}")
    return np.frombuffer(data[first:last], dtype).reshape(shape)
