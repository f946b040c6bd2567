"""Sharding of a batch of tasks over the devices of one or several processes. Only this module creates meshes.

Each device holds a replica of the meta-parameters and of the dataset. It processes an equal share of the batch. In
a meta-step, devices exchange only sums over tasks, and the residuals and the status of each task. The random key of a
task depends on the run's key, the meta-step and the position of the task in the batch. The batch therefore does not
depend on the number of devices.
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
    """Configure JAX to expose one CPU device per core. The call has no effect on GPUs or after JAX has started.

    With one CPU device, XLA splits each matrix product over all cores. The products of small networks are too small
    for that, so the cores mostly wait. With one device per core, each core processes tasks of its own.
    """
    with contextlib.suppress(RuntimeError):  # raised if JAX has started: the devices can no longer change
        jax.config.update("jax_num_cpu_devices", _cores())


def local_mesh(tasks: int) -> Mesh:
    """Return a mesh of this process's devices: the largest number of them that divides ``tasks``.

    Computations on this mesh need no communication with other processes.
    """
    return _mesh(jax.local_devices()[: _largest(tasks, jax.local_device_count())])


def global_mesh(tasks: int, devices: int | str | None = None) -> Mesh:
    """Return a mesh with the same number of devices from every process, ordered by process.

    Args:
        tasks: number of tasks in a batch. The number of devices in the mesh must divide it.
        devices: number of devices per process, or ``"all"``. None takes the largest number that every process has and
            that divides the tasks of one process.

    Raises:
        InputError: for fewer than 1 device or more than a process has, or if the number of devices in the mesh does not
            divide ``tasks``.
    """
    processes = jax.process_count()
    by_process = [[d for d in jax.devices() if d.process_index == number] for number in range(processes)]
    available = min(map(len, by_process))
    if devices is None:
        check_shares(tasks, processes)
        devices = _largest(tasks // processes, available)
    devices = available if devices == "all" else int(devices)
    if not 1 <= devices <= available:
        raise InputError(
            f"{devices} devices were requested (--devices), but a process has {available}: choose 1 to {available}"
        )
    check_shares(tasks, processes, devices)
    return _mesh([device for local in by_process for device in local[:devices]])


def check_shares(tasks: int, processes: int, devices: int = 1) -> None:
    """Raise :class:`.InputError` if ``tasks`` is not a multiple of ``processes * devices``.

    Args:
        tasks: number of tasks in a batch.
        processes: number of processes.
        devices: number of devices per process.
    """
    if tasks % (processes * devices):
        each = f" ({devices} in each of {processes} processes)" if processes > 1 else ""
        raise InputError(
            f"the {tasks} tasks of a meta-step (--outer.tasks) cannot be divided equally among {processes * devices} "
            f"devices{each}: choose another number of tasks, or of devices (--devices)"
        )


def over_tasks(function: Callable, mesh: Mesh, out_specs) -> Callable:
    """Return ``function(replicated, tasks) -> outputs`` with the leading axis of ``tasks`` sharded over ``mesh``.

    Args:
        function: called on every device with the same ``replicated`` and with that device's share of ``tasks``.
        mesh: a mesh whose number of devices divides the number of tasks.
        out_specs: for each output, ``SHARED`` if it is equal on all devices, or ``SPREAD`` if it has one entry per
            task along its leading axis.
    """
    # check_vma would reject conjugate gradients in `function`: the loop's carry starts replicated and becomes varying.
    return jax.shard_map(function, mesh=mesh, in_specs=(SHARED, SPREAD), out_specs=out_specs, check_vma=False)


def everywhere(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device of ``mesh``, so that every process can read it."""
    return NamedSharding(mesh, SHARED)


def on_all(tree: Any, mesh: Mesh) -> Any:
    """Return ``tree`` replicated on every device of ``mesh``.

    JAX compiles a step once per sharding of its arguments. The state that a step returns is replicated. If the first
    state is replicated too, the second step needs no compilation.

    Args:
        tree: arrays or typed random keys, with the same values in every process.
        mesh: a mesh, which may include devices of other processes.
    """
    sharding = everywhere(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    # device_put onto other processes' devices sends each leaf to all processes to compare it, and rejects typed keys.
    def put(leaf):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])

    return _with_plain_keys(tree, put)


def here(tree: Any) -> Any:
    """Return the copy of a replicated ``tree`` on this process's first device, for work without other processes."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def is_first() -> bool:
    """Return True in process 0, the only process that writes files."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """Return process 0's ``tree`` in every process, bit for bit.

    Every process must call this with a tree of the same structure, dtypes and shapes.
    """
    if jax.process_count() == 1:
        return tree

    # JAX broadcasts by summing process 0's array with zeros from the others. In a sum of floats, −0 would become 0, so
    # send bytes.
    def send(leaf):
        values = np.asarray(leaf)
        sent = multihost_utils.broadcast_one_to_all(np.atleast_1d(values).view(np.uint8))
        return np.asarray(sent).view(values.dtype).reshape(values.shape)

    return _with_plain_keys(tree, send)


def gathered(values: np.ndarray) -> np.ndarray:
    """Return the ``values`` of all processes, stacked along a new leading axis, in every process."""
    return multihost_utils.process_allgather(values)


def _with_plain_keys(tree, function):
    """Map ``function`` over the leaves of ``tree``. A typed random key is unwrapped before and wrapped again after."""

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
