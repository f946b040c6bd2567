"""Files of trained parameters: named arrays, with a description of the preset that they were trained with.

A file is in the safetensors format, or an ``.npz`` archive of NumPy. The arrays have the names of the parameters, such
as ``block0/kernel``. The description is JSON: the settings of the preset with their types, and facts about the
training. A file that this package writes contains a checksum of the arrays. Reading runs no code: pickles are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml.errors import InputError, check, nearest
from imaml.runs.checkpoints import DESCRIPTION, Checkpoint, array_names, described, named_leaves, pack
from imaml.settings.preset import Preset
from imaml.storage import arrays, safetensors
from imaml.storage.arrays import CHECKSUM, DamagedFile

FORMAT = "imaml-parameters-1"
"""The value of ``format`` in a description."""
SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".npz")
KEPT = Path(__file__).parents[1] / "reproduction" / "records"
"""The folder with the records that come with the package, and with the parameters of some of them."""
Named = list[tuple[str, np.ndarray]]
"""Arrays with the names of their parameters."""
FACTS = ("data", "source", "step", "versions", "start", "extended")
"""Facts about the training that a description may have: the fingerprint of the data, where data of one's own come from,
the number of meta-steps, the versions, where θ came from before the training, and the extensions of the run."""


def write(path: Path, theta: Any, preset: Preset, facts: Mapping[str, Any]) -> None:
    """Write parameters and the description of their preset to a file, which is created or replaced.

    Args:
        path: the file. Its suffix, one of :data:`SUFFIXES`, determines the format.
        theta: a pytree of arrays.
        preset: the preset that the parameters were trained with.
        facts: JSON-serialisable facts about the training.

    Raises:
        InputError: for another suffix, for a setting that cannot be saved, or for an array that the format cannot hold.
        OSError: if the file cannot be written.
    """
    _check_suffix(path)
    leaves = described(theta)
    settings = {"preset": preset.name, "config": preset.config(), "types": preset.types()}
    description = {"format": FORMAT, **settings, **facts, "leaves": leaves}
    names = array_names(leaves)
    if path.suffix == ".npz":
        contents = dict(zip(names, map(pack, jax.tree.leaves(theta)), strict=True))
        arrays.write(path, {DESCRIPTION: np.array(json.dumps(description)), **contents})
        return
    contents = dict(zip(names, map(np.asarray, jax.tree.leaves(theta)), strict=True))
    texts = {"format": FORMAT, DESCRIPTION: json.dumps(description), CHECKSUM: arrays.digest(contents)}
    try:
        safetensors.write(path, contents, texts)
    except ValueError as error:
        raise InputError(f"{path}: {error}; write an .npz file instead") from error


def read(path: Path) -> tuple[dict[str, Any] | None, Named]:
    """Return the description in a file of parameters, and its arrays with the names of the parameters.

    The description is None if the file has none, such as a safetensors file of another library.

    Raises:
        InputError: if there is no such file, if it has another suffix, or if it is damaged.
        OSError: if the file cannot be read.
    """
    _check_suffix(path)
    try:
        description, contents = (_read_npz if path.suffix == ".npz" else _read_safetensors)(path)
        if description is None:
            return None, list(contents.items())
        if description["format"] != FORMAT:
            raise InputError(
                f"{path} is a file of another kind (format {description['format']}): for a checkpoint, name the folder "
                "that holds it"
            )
        leaves = description["leaves"]
        return description, _named(leaves, [contents[name] for name in array_names(leaves)])
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # DamagedFile is a ValueError
        raise InputError(f"{path} is damaged, or holds no parameters: {error}") from error


def digest(named: Named) -> str:
    """Return the SHA-256 of arrays with the names of their parameters."""
    return arrays.digest({name: pack(array) for name, array in named})


def names(directory: Path = KEPT) -> tuple[str, ...]:
    """Return the names of the records in a folder that have trained parameters."""
    return tuple(sorted(path.stem for path in directory.glob(f"*{SAFETENSORS}")))


def place_of(run: str | Path) -> Path:
    """Return the file of parameters for the name of a record in the package, and any other path unchanged.

    A file or a folder at this path comes first.

    Raises:
        InputError: if the path does not exist and differs from the name of a record by a letter or two.
    """
    path = Path(run)
    if path.exists() or path.suffix in SUFFIXES:
        return path
    known = names()
    if str(path) in known:
        return KEPT / f"{path}{SAFETENSORS}"
    if near := nearest(path, known, cutoff=0.95):
        raise InputError(f"there is no run in {path}, and no record of that name: did you mean {near}?")
    return path


def of_checkpoint(found: Checkpoint) -> Named:
    """Return the parameters θ in a checkpoint with their names. Its other arrays are left out."""
    named = _named(found.description["leaves"], found.leaves)
    return [
        (path.removeprefix("theta").removeprefix("/"), array)
        for path, array in named
        if path == "theta" or path.startswith("theta/")
    ]


def restored(where: Path | str, found: Named, preset: Preset) -> Any:
    """Return parameters as a pytree like the parameters of the preset's network, bit for bit.

    Args:
        where: the file or folder, for messages.
        found: the arrays with the names of the parameters, in any order.
        preset: the preset.

    Raises:
        InputError: if the names or shapes are not those of the network's parameters, or if an array is in float64 and
            JAX computes in float32.
    """
    like = jax.eval_shape(preset.functions.init, jax.random.key(0))
    wanted = [(name, leaf.shape) for name, leaf in named_leaves(like)]
    position = {name: index for index, (name, _) in enumerate(wanted)}
    # Several leaves may share a name. Their order is kept, because the sort is stable.
    found = sorted(found, key=lambda pair: position.get(pair[0], len(wanted)))
    present = [(name, array.shape) for name, array in found]
    if present != wanted:
        other = next((pair for pair in [*present, *wanted] if (pair in present) != (pair in wanted)), "their number")
        raise InputError(
            f"the arrays in {where} do not fit the network of {preset.name} (first difference in names and shapes: "
            f"{other})"
        )
    leaves = [jnp.asarray(array) for _, array in found]
    if rounded := [name for (name, array), leaf in zip(found, leaves, strict=True) if leaf.dtype != array.dtype]:
        raise InputError(
            f"{where} holds numbers in double precision ({rounded[0]}), which JAX would round: call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def restored_in_the_networks_dtypes(where: Path | str, found: Named, preset: Preset) -> Any:
    """Return what :func:`restored` returns.

    Raises:
        InputError: as :func:`restored`, and if the dtype of an array is not that of the network's parameter.
    """
    theta = restored(where, found, preset)
    like = jax.eval_shape(preset.functions.init, jax.random.key(0))
    for (name, wanted), leaf in zip(named_leaves(like), jax.tree.leaves(theta), strict=True):
        check(
            leaf.dtype == wanted.dtype, f"{name} of {where} is {leaf.dtype}, but should be {wanted.dtype}: convert it"
        )
    return theta


def _check_suffix(path):
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a file of parameters is called NAME{' or NAME'.join(SUFFIXES)}")


def _read_npz(path):
    contents = arrays.read(path)
    text = contents.pop(DESCRIPTION, None)
    return None if text is None else json.loads(str(text)), contents


def _read_safetensors(path):
    contents, texts = safetensors.read_with_metadata(path)
    if texts.get("format") != FORMAT:
        return None, contents
    if texts[CHECKSUM] != arrays.digest(contents):
        raise DamagedFile("its checksum does not match its contents")
    return json.loads(texts[DESCRIPTION]), contents


def _named(leaves, contents) -> Named:
    """Return arrays with the paths and dtypes of their leaves; :func:`.checkpoints.described` describes the leaves."""
    found = zip(leaves, contents, strict=True)
    # A typed random key, which is part of a checkpoint but not of θ, is left as the integers of the file.
    return [
        (path, array if dtype.startswith("key<") else array.view(jnp.dtype(dtype))) for (path, dtype, _), array in found
    ]
