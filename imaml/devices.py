"""Tasks spread over the devices of this machine: the one place that knows of a mesh.

Every device holds θ and the whole dataset and takes its share of a batch of tasks; only sums travel.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "tasks"


def use_all_cores() -> None:
    """Make each CPU core a device of its own; without effect where JAX has already started, or on a GPU.

    One device that spreads each small matrix product over all cores spends much of its time waiting;
    two devices with a task each do not.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices stay as they are
        jax.config.update("jax_num_cpu_devices", _cores())


def devices_for(tasks: int) -> int:
    """The largest number of local devices that divides a batch of ``tasks``."""
    return max(n for n in range(1, jax.local_device_count() + 1) if tasks % n == 0)


def over_tasks(function: Callable, devices: int, out_specs) -> Callable:
    """``function(replicated, tasks) -> outputs`` with the leading axis of ``tasks`` spread over ``devices``.

    Args:
        function: called on every device with the same first argument and its share of the second.
        devices: how many local devices, a divisor of the number of tasks.
        out_specs: per output, ``SHARED`` for what is equal on all devices, ``SPREAD`` for what is per task.
    """
    # Conjugate gradients inside: their loop's carry starts replicated, which the check would refuse.
    return jax.shard_map(function, mesh=_mesh(devices), in_specs=(SHARED, SPREAD), out_specs=out_specs, check_vma=False)


def on_all(tree: Any, devices: int) -> Any:
    """``tree`` with a copy on each of ``devices``, which is how a step over tasks returns what is shared.

    A step that is fed its own result is then compiled once: what lies elsewhere would be another program.
    """
    return jax.device_put(tree, NamedSharding(_mesh(devices), SHARED))


def _mesh(devices) -> Mesh:
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:devices])


SHARED = PartitionSpec()
SPREAD = PartitionSpec(AXIS)


def _cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
