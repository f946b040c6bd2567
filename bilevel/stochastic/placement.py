"""The placement of the samples: they are divided into equal parts, called shares, on one device or on a mesh.

A step is written for the samples of one share, and averages its directions over the shares. With one share on one
device, the step runs without a transformation. With several shares on one device, it runs under ``jax.vmap``. On a
mesh, each device has one share, and the step runs under ``jax.shard_map``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bilevel import tree
from bilevel.types import PyTree


@dataclass(frozen=True)
class Placement:
    """The division of the samples into shares.

    Attributes:
        shares: the number of shares.
        axes: the names of the axes over which the shares lie; () for one share without a mesh.
        mesh: the mesh with these axes, or None for one device.
    """

    shares: int
    axes: tuple[str, ...]
    mesh: Any

    @property
    def local_shares(self) -> int:
        """The number of shares in the memory of the first local device."""
        if self.mesh is None:
            return self.shares
        # The devices of a CPU have the memory of the machine in common.
        return len(self.mesh.local_devices) if jax.local_devices()[0].platform == "cpu" else 1

    def over_shares(self, function: Callable[..., Any], shared: str, returned: str) -> Callable[..., Any]:
        """Return a function that runs ``function`` on every share.

        Args:
            function: takes and returns pytrees. Outside of ``function``, a divided leaf has a leading axis of shares.
            shared: one letter for each argument: "s" for one that is the same for all shares, "d" for one that is
                divided among them.
            returned: the same letters for the results.
        """
        if self.mesh is None:
            if self.shares == 1:
                return _with_leading_axis(function, shared, returned)
            axes = {"s": None, "d": 0}
            return jax.vmap(
                function, tuple(axes[letter] for letter in shared), tuple(axes[letter] for letter in returned),
                axis_name=self.axes[0],
            )  # fmt: skip
        specs = {"s": PartitionSpec(), "d": PartitionSpec(self.axes)}
        return jax.shard_map(
            _with_leading_axis(function, shared, returned),
            mesh=self.mesh,
            in_specs=tuple(specs[letter] for letter in shared),
            out_specs=tuple(specs[letter] for letter in returned),
            axis_names=set(self.axes),
        )

    def divide(self, samples: PyTree) -> PyTree:
        """Return samples ``[n, …]`` as ``[shares, n/shares, …]``."""
        return jax.tree.map(lambda leaf: leaf.reshape(self.shares, -1, *leaf.shape[1:]), samples)

    def put(self, values: PyTree) -> PyTree:
        """Return arrays that are the same for all shares, on the devices where the compiled program expects them."""
        if self.mesh is None:
            return tree.arrays(values)
        return _on_mesh(values, NamedSharding(self.mesh, PartitionSpec()))

    def copy(self, tables: PyTree) -> PyTree:
        """Return a copy of divided arrays, which the compiled program may overwrite."""
        if self.mesh is not None:
            tables = _on_mesh(tables, NamedSharding(self.mesh, PartitionSpec(self.axes)))
        return jax.tree.map(jnp.copy, tables)


def _on_mesh(values, sharding):
    """Return arrays with a sharding. An array that already spans several processes keeps its own sharding."""

    def put(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        return jax.device_put(np.asarray(leaf), sharding)

    return jax.tree.map(put, values)


def _with_leading_axis(function, shared, returned):
    def run(*arguments):
        local = [
            jax.tree.map(lambda leaf: leaf[0], argument) if letter == "d" else argument
            for argument, letter in zip(arguments, shared, strict=True)
        ]
        results = function(*local)
        return tuple(
            jax.tree.map(lambda leaf: leaf[None], result) if letter == "d" else result
            for result, letter in zip(results, returned, strict=True)
        )

    return run


def place(inner: PyTree, outer: PyTree, shares: int | None) -> Placement:
    """Return the :class:`Placement` of the samples; ``shares`` None means one share for each device.

    Raises:
        ValueError: if the samples cannot be divided into ``shares`` equal parts, lie on different meshes, or lie on a
            mesh with another number of devices than ``shares``.
    """
    found = {_mesh_axes(leaf) for leaf in jax.tree.leaves((inner, outer))}
    if len(found) != 1:
        raise ValueError(
            f"all leaves of the inner and the outer samples must be sharded alike over their leading axis, got the "
            f"meshes and axes {found}: put all of them with the same NamedSharding"
        )
    mesh, axes = found.pop()
    devices = int(np.prod([mesh.shape[axis] for axis in axes])) if mesh is not None else 1
    if mesh is not None and shares not in (None, devices):
        raise ValueError(f"samples that are sharded over {devices} devices have {devices} shares, got shares={shares}")
    shares = devices if shares is None else shares
    for samples, name in ((inner, "inner"), (outer, "outer")):
        size = tree.count_samples(samples, name)
        if shares < 1 or size % shares:
            raise ValueError(f"{size} {name} samples cannot be divided into shares={shares} equal parts")
    return Placement(shares, axes if mesh is not None else ("shares",) if shares > 1 else (), mesh)


def _mesh_axes(leaf):
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None, ()
    axes = sharding.spec[0]
    return sharding.mesh, axes if isinstance(axes, tuple) else (axes,)
