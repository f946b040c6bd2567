"""The state of a run on disk: files written whole or not at all, each of which knows what it belongs to.

A run's folder holds its last checkpoints and the best one. Best is by the loss that :func:`save` is told, which in
training is the mean query loss on *training* classes: held-out classes never choose anything.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.errors import InputError
from imaml.storage import arrays

FORMAT = 2
KEEP = 2
_NAME = re.compile(r"checkpoint-(\d+)\.npz", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: its file.
        description: what :func:`save` was given, and ``step``, ``loss``, ``leaves`` (path, type and shape of each).
        leaves: the arrays of the state, in order.
    """

    path: Path
    description: dict
    leaves: list[np.ndarray]

    @property
    def step(self) -> int:
        """Meta-steps done."""
        return self.description["step"]

    @property
    def loss(self) -> float:
        """What the best one has the least of."""
        return self.description["loss"]

    def restore(self, like: Any) -> Any:
        """The state, in the structure of ``like``, to the bit.

        Raises:
            InputError: for a state whose leaves have other names, types or shapes.
        """
        wanted = _leaves(like)
        if self.description["leaves"] != wanted:
            pairs = zip(self.description["leaves"], wanted, strict=False)
            here = next((f"{_shown(old)} → {_shown(new)}" for old, new in pairs if old != new), "their number")
            raise InputError(f"{self.path} holds a state of another shape than this preset's ({here})")
        like_leaves, structure = jax.tree.flatten(like)
        return jax.tree.unflatten(structure, map(_unpacked, self.leaves, like_leaves))


def save(
    directory: Path, step: int, state: Any, description: dict, loss: float = float("inf"), keep: int = KEEP
) -> None:
    """Write ``state``, any pytree of arrays and random keys, and what it belongs to; then let go of older ones.

    Args:
        directory: the run's folder.
        step: meta-steps done, which the file is named by.
        state: floats of any kind, bfloat16 among them, integers, booleans, typed keys.
        description: any JSON-able facts of its run.
        loss: by which the best is known.
        keep: the last so many stay, and the best one besides.

    Raises:
        OSError: where the folder cannot be written; the old checkpoints stand.
    """
    facts = {"format": FORMAT, "step": step, "loss": loss, "leaves": _leaves(state)} | description
    contents = {f"leaf{i}": _packed(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    arrays.write(directory / f"checkpoint-{step:08}.npz", {"description": np.array(json.dumps(facts)), **contents})
    _let_go(directory, keep)


def newest(directory: Path, on_damaged: Callable[[Path, str], None] = lambda path, message: None) -> Checkpoint | None:
    """The last checkpoint that is whole; None in a folder without any.

    Args:
        directory: a run's folder.
        on_damaged: told of each later one that is not whole, and of what is wrong with it, if this one is.

    Raises:
        InputError: where there are some and all are damaged, or one is of another version.
        OSError: where one cannot be read.
    """
    damaged = {}
    for _, path in reversed(_files(directory)):
        try:
            whole = _read(path)
        except arrays.DamagedFile as error:
            damaged[path] = f"{path} is damaged ({error})"
            continue
        except FileNotFoundError:  # who reads holds no lock: the run has gone on, and this one has gone
            return newest(directory, on_damaged)
        for later, message in damaged.items():
            on_damaged(later, message)
        return whole
    if damaged:
        raise InputError(f"{directory} holds no whole checkpoint: {'; '.join(damaged.values())}; use another folder")
    return None


def best(directory: Path) -> Checkpoint | None:
    """The whole checkpoint of the least loss, the later one of equals; None in a folder without any."""
    whole = []
    for _, path in _files(directory):
        try:
            whole.append(_read(path))
        except (arrays.DamagedFile, FileNotFoundError):
            continue
    return min(whole, key=lambda checkpoint: (checkpoint.loss, -checkpoint.step), default=None)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it counts as none and is not lost."""
    path.replace(path.with_name(f"{path.name}.damaged"))


def _files(directory):
    """The checkpoints of a folder with their steps, the oldest first."""
    names = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(match[1]), path) for path in names if (match := _NAME.fullmatch(path.name)))


def _read(path):
    contents = arrays.read(path)
    try:
        description = json.loads(str(contents.pop("description")))
        version = description["format"]
    except (KeyError, ValueError, TypeError) as error:
        raise arrays.DamagedFile(f"it does not describe itself ({error})") from error
    if version != FORMAT:
        raise InputError(f"{path} was written by another version of imaml (format {version}, not {FORMAT})")
    return Checkpoint(path, description, [contents[f"leaf{i}"] for i in range(len(contents))])


def _let_go(directory, keep):
    """Remove all but the last ``keep`` and the best one that is whole; called when the last is on disk."""
    spared = best(directory)
    for _, path in _files(directory)[:-keep]:
        if spared is not None and path != spared.path:
            path.unlink(missing_ok=True)


def _leaves(state):
    """Path, type and shape of each leaf, as JSON gives them back."""
    named = jax.tree_util.tree_leaves_with_path(state)
    return [
        [jax.tree_util.keystr(path, simple=True, separator="/"), str(leaf.dtype), list(leaf.shape)]
        for path, leaf in named
    ]


def _packed(leaf):
    """The leaf as an array of a type that numpy's files know: keys as their data, bfloat16 as its bits."""
    if _is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.itemsize}")


def _unpacked(array, like):
    if _is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return jnp.asarray(array.view(like.dtype))


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shown(leaf):
    path, dtype, shape = leaf
    return f"{path} {dtype}{shape}"
