"""Checkpoints of a run: each file is written completely or not at all, and contains a description of the run.

:mod:`imaml.storage.arrays` stores a checksum in each file, and verifies it whenever the file is read. Each array is
named after the path of its leaf in the state: ``numpy.load`` finds a kernel of the network as
``"theta/block0/kernel"``. :func:`array_names` lists the exceptions.

A run's folder holds its last checkpoints and the best one, which is the one that was saved with the least ``loss``. In
a run without validation, ``loss`` is the mean query loss on training classes. With validation, it comes from the score
on validation classes, and is finite only for a validation that is the best so far. Test classes never select a
checkpoint.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.errors import InputError
from imaml.storage import arrays

FORMAT = 3
READ = (2, 3)
"""The formats that are read. In format 2 the arrays are called ``leaf0``, ``leaf1`` and so on."""
DESCRIPTION = "description"
KEEP = 2
_NAME = re.compile(r"checkpoint-(\d+)\.npz", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """The content of an intact checkpoint file.

    Attributes:
        path: the file.
        description: the ``description`` passed to :func:`save`, and ``format``, ``step``, ``loss`` and ``leaves``
            (path, dtype and shape of each leaf).
        leaves: the arrays of the state, in the order of ``jax.tree.leaves``.
    """

    path: Path
    description: dict
    leaves: list[np.ndarray]

    @property
    def step(self) -> int:
        """Number of meta-steps done."""
        return self.description["step"]

    @property
    def loss(self) -> float:
        """The loss by which :func:`best` selects; infinite if none was passed to :func:`save`."""
        return self.description["loss"]

    def restore(self, like: Any) -> Any:
        """Return the saved state, bit for bit, in the structure of ``like``.

        Args:
            like: a state of the expected structure; its values are not used.

        Raises:
            InputError: if the paths, dtypes or shapes of the leaves differ from those of ``like``.
        """
        wanted = described(like)
        if self.description["leaves"] != wanted:
            pairs = zip(self.description["leaves"], wanted, strict=False)
            changed = (f"{_format_leaf(old)} → {_format_leaf(new)}" for old, new in pairs if old != new)
            difference = next(changed, "number of leaves")
            raise InputError(f"{self.path} holds a state whose leaves differ from the expected ones ({difference})")
        like_leaves, structure = jax.tree.flatten(like)
        return jax.tree.unflatten(structure, map(_unpack, self.leaves, like_leaves))


def save(
    directory: Path, step: int, state: Any, description: dict, loss: float = float("inf"), keep: int = KEEP
) -> None:
    """Write a checkpoint of ``state``, then delete all checkpoints but the last ones and the best one.

    Args:
        directory: the run's folder.
        step: number of meta-steps done; the file's name contains it.
        state: a pytree of arrays: floats (bfloat16 included), integers, booleans or typed random keys.
        description: JSON-serialisable facts about the run.
        loss: a number. :func:`best` returns the checkpoint with the least ``loss``.
        keep: number of last checkpoints that are kept; the best one is kept in addition.

    Raises:
        OSError: if the folder cannot be written; the older checkpoints are then left unchanged.
    """
    facts = {"format": FORMAT, "step": step, "loss": loss, "leaves": described(state)} | description
    names = array_names(facts["leaves"])
    contents = {name: pack(leaf) for name, leaf in zip(names, jax.tree.leaves(state), strict=True)}
    arrays.write(directory / f"checkpoint-{step:08}.npz", {DESCRIPTION: np.array(json.dumps(facts)), **contents})
    _delete_old(directory, keep)


def newest(directory: Path, on_damaged: Callable[[Path, str], None] = lambda path, message: None) -> Checkpoint | None:
    """Return the newest intact checkpoint of a folder, or None if the folder holds no checkpoint.

    Args:
        directory: a run's folder; it need not exist.
        on_damaged: called with path and message for each damaged checkpoint that is newer than the returned one.

    Raises:
        InputError: if all checkpoints are damaged, or if the newest one that is not damaged has a format that is not in
            :data:`READ`.
        OSError: if a file cannot be read.
    """
    damaged = {}
    for _, path in reversed(_files(directory)):
        try:
            intact = read(path)
        except arrays.DamagedFile as error:
            damaged[path] = f"{path} is damaged ({error})"
            continue
        except FileNotFoundError:
            # Readers hold no lock: a training that runs has just deleted this file, after it had saved a newer one.
            return newest(directory, on_damaged)
        for later, message in damaged.items():
            on_damaged(later, message)
        return intact
    if damaged:
        raise InputError(f"{directory} holds no intact checkpoint: {'; '.join(damaged.values())}; use another folder")
    return None


def best(directory: Path) -> Checkpoint | None:
    """Return the intact checkpoint with the least loss, the later one of a tie, or None if there is none.

    Raises:
        InputError: if a checkpoint has a format that is not in :data:`READ`.
        OSError: if a file cannot be read.
    """
    intact = []
    for _, path in _files(directory):
        try:
            intact.append(read(path))
        except (arrays.DamagedFile, FileNotFoundError):
            continue
    return min(intact, key=lambda checkpoint: (checkpoint.loss, -checkpoint.step), default=None)


def set_aside(path: Path) -> None:
    """Append ``.damaged`` to the name of a checkpoint: later searches skip it, and its content is kept."""
    path.replace(path.with_name(f"{path.name}.damaged"))


def _files(directory):
    """Return (step, path) of each checkpoint of a folder, the oldest first."""
    names = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(match[1]), path) for path in names if (match := _NAME.fullmatch(path.name)))


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in a file.

    Raises:
        DamagedFile: if the file is incomplete or changed.
        InputError: if its format is not in :data:`READ`.
        OSError: if it cannot be read.
    """
    contents = arrays.read(path)
    try:
        description = json.loads(str(contents.pop(DESCRIPTION)))
        version = description["format"]
    except (KeyError, ValueError, TypeError) as error:
        raise arrays.DamagedFile(f"its description is missing or unreadable ({error})") from error
    if version not in READ:
        readable = " and ".join(map(str, READ))
        raise InputError(
            f"{path} was written by another version of imaml (format {version}; this version reads {readable})"
        )
    return Checkpoint(path, description, [contents[name] for name in array_names(description["leaves"], version)])


def _delete_old(directory, keep):
    """Delete all checkpoints but the last ``keep`` and the best intact one. Call this after the newest is on disk."""
    best_one = best(directory)
    for _, path in _files(directory)[:-keep]:
        if best_one is not None and path != best_one.path:
            path.unlink(missing_ok=True)


def array_names(leaves: Sequence[Sequence], version: int = FORMAT) -> list[str]:
    """Return the names of the arrays in a file: the paths of the leaves, such as ``theta/block0/kernel``.

    In format 2, or if two paths are equal or a path cannot be a name, the arrays are called ``leaf0``, ``leaf1``, ….

    Args:
        leaves: the result of :func:`described`.
        version: the format of the file.
    """
    paths = [path for path, _, _ in leaves]
    usable = len(set(paths)) == len(paths) and not {"", DESCRIPTION, *arrays.RESERVED} & set(paths)
    usable = usable and not any(path.endswith(".npy") for path in paths)  # numpy.load drops this ending
    return paths if usable and version > 2 else [f"leaf{i}" for i in range(len(paths))]


def described(state: Any) -> list[list]:
    """Return path, dtype and shape of each leaf, in types that JSON restores unchanged."""
    return [[name, str(leaf.dtype), list(leaf.shape)] for name, leaf in named_leaves(state)]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a pytree, each with its path as a name, such as ``"theta/block0/kernel"``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def pack(leaf: Any) -> np.ndarray:
    """Return the leaf as an array that NumPy can save: a key as its uint32 data, bfloat16 as unsigned integers."""
    if _is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.itemsize}")


def _unpack(array, like):
    """Convert an array of :func:`pack` back to a leaf with the dtype or key type of ``like``."""
    if _is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return jnp.asarray(array.view(like.dtype))


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _format_leaf(leaf):
    path, dtype, shape = leaf
    return f"{path} {dtype}{shape}"
