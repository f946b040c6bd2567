"""The state of a run on disk: one file, written whole or not at all, that knows what it belongs to."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.errors import InputError

FILE = "checkpoint.npz"
FORMAT = 1


def save(directory: Path, state: Any, description: dict) -> None:
    """Write ``state`` (any pytree of arrays) and a JSON-able ``description`` of its run.

    The file is complete under another name before it takes its place, and the folder is flushed: after a
    crash there is the old checkpoint or the new one.

    Raises:
        OSError: where the folder cannot be written; the old checkpoint stands.
    """
    arrays: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    arrays["description"] = np.array(json.dumps({"format": FORMAT} | description))
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=FILE, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, directory / FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush(directory)


def load(directory: Path, like: Any) -> tuple[Any, dict]:
    """The state, in the structure, shapes and dtypes of ``like``, and its description.

    Raises:
        InputError: for a damaged file, or a state of another structure.
    """
    arrays, description = _read(directory / FILE)
    leaves, structure = jax.tree.flatten(like)
    saved = [arrays.get(f"leaf{i}") for i in range(len(arrays))]
    wanted = [np.asarray(leaf) for leaf in leaves]
    if [_kind(a) for a in saved] != [_kind(a) for a in wanted]:
        raise InputError(f"{directory / FILE} holds a state of another shape than this preset's: use another --out")
    restored = [jnp.asarray(array) for array in saved]
    return jax.tree.unflatten(structure, restored), description


def describe(directory: Path) -> dict | None:
    """The description of the checkpoint in ``directory``; None where there is none.

    Raises:
        InputError: for a damaged file.
    """
    path = directory / FILE
    return _read(path)[1] if path.exists() else None


def _read(path):
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        description = json.loads(str(arrays.pop("description")))
        if description["format"] != FORMAT:
            raise ValueError("another format")
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}: train first, or name the folder of a run") from None
    except Exception as error:  # a damaged archive can raise nearly anything
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is damaged, or was written by another version ({error})"
        ) from error
    return arrays, description


def _flush(directory):
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _kind(array):
    return None if array is None else (array.shape, array.dtype)
