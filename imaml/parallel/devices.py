"""Tasks spread over devices, of one process or of several: the one place that knows of a mesh.

Every device holds θ and the whole dataset and takes its share of a batch of tasks; only sums travel. Tasks are drawn by
the number of the step and their own, so a batch is the same however it is spread.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from imaml.errors import InputError

AXIS = "tasks"


def use_all_cores() -> None:
    """Make each CPU core a device of its own; without effect where JAX has already started, or on a GPU.

    One device that spreads each small matrix product over all cores spends much of its time waiting;
    two devices with a task each do not.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices stay as they are
        jax.config.update("jax_num_cpu_devices", _cores())


def local_mesh(tasks: int) -> Mesh:
    """The largest number of this process's devices that divides a batch of ``tasks``: work that needs no other."""
    return _mesh(jax.local_devices()[: _largest(tasks, jax.local_device_count())])


def global_mesh(tasks: int, devices: int | str | None = None) -> Mesh:
    """Equally many devices of each process, in the processes' order: where a batch of ``tasks`` is spread.

    Args:
        tasks: which the number of devices must divide.
        devices: how many of each process, or ``"all"``; None for as many as divide the tasks.

    Raises:
        InputError: where there are not so many, or the tasks cannot be shared out equally.
    """
    processes = jax.process_count()
    of_process = [[d for d in jax.devices() if d.process_index == number] for number in range(processes)]
    available = min(map(len, of_process))
    if devices is None:
        check_shares(tasks, processes)
        devices = _largest(tasks // processes, available)
    devices = available if devices == "all" else int(devices)
    if devices > available:
        raise InputError(f"--devices {devices} are more than the {available} that each process has")
    check_shares(tasks, processes, devices)
    return _mesh([device for local in of_process for device in local[:devices]])


def check_shares(tasks: int, processes: int, devices: int = 1) -> None:
    """Raise InputError where a batch of ``tasks`` cannot be shared out equally."""
    if tasks % (processes * devices):
        each = f" ({devices} in each of {processes} processes)" if processes > 1 else ""
        raise InputError(
            f"the {tasks} tasks of a meta-step (--outer.tasks) cannot be shared out equally to {processes * devices} "
            f"devices{each}"
        )


def over_tasks(function: Callable, mesh: Mesh, out_specs) -> Callable:
    """``function(replicated, tasks) -> outputs`` with the leading axis of ``tasks`` spread over ``mesh``.

    Args:
        function: called on every device with the same first argument and its share of the second.
        mesh: of a number of devices that divides the number of tasks.
        out_specs: per output, ``SHARED`` for what is equal on all devices, ``SPREAD`` for what is per task.
    """
    # Conjugate gradients inside: their loop's carry starts replicated, which the check would refuse.
    return jax.shard_map(function, mesh=mesh, in_specs=(SHARED, SPREAD), out_specs=out_specs, check_vma=False)


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on each device: how a compiled step hands on what every process shall read."""
    return NamedSharding(mesh, SHARED)


def on_all(tree: Any, mesh: Mesh) -> Any:
    """``tree``, equal in all processes, with a copy on each device of ``mesh``, which is how a step returns it.

    A step that is fed its own result is then compiled once: what lies elsewhere would be another program.
    """
    sharding = everywhere(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):  # device_put would send every leaf to all processes to compare it, and takes no keys
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    return _with_plain_keys(tree, put)


def here(tree: Any) -> Any:
    """Of what lies on every device, the copy on this process's first: the host's work needs no other process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def is_first() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """Process 0's ``tree``, to the bit, in every process; the others' have the same structure, types and shapes."""
    if jax.process_count() == 1:
        return tree

    def send(leaf):
        values = np.asarray(leaf)  # as bytes: what is sent is summed with zeros, and −0 + 0 is 0
        sent = multihost_utils.broadcast_one_to_all(np.atleast_1d(values).view(np.uint8))
        return np.asarray(sent).view(values.dtype).reshape(values.shape)

    return _with_plain_keys(tree, send)


def gathered(values: np.ndarray) -> np.ndarray:
    """``values`` of every process, on a new leading axis, in every process."""
    return multihost_utils.process_allgather(values)


def _with_plain_keys(tree, function):
    """``function`` of each leaf, of a typed key's data in its place."""

    def apply(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(function(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return function(leaf)

    return jax.tree.map(apply, tree)


def _largest(tasks, available):
    return max(n for n in range(1, available + 1) if tasks % n == 0)


def _mesh(devices) -> Mesh:
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


SHARED = PartitionSpec()
SPREAD = PartitionSpec(AXIS)


def _cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
