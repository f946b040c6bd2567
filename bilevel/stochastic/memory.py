"""The size of SABA's tables, checked before they are made."""

import os
from typing import Any

import jax

from bilevel.stochastic.protocol import Oracle
from bilevel.types import PyTree

FURTHER_ROWS = 4
"""A table has this many arrays of the size of a row besides its rows: mean, lost, waiting and replaced."""


def check_memory(oracle: Oracle, inner: PyTree, outer: PyTree, limit: int | None) -> None:
    """Raise ValueError if the tables, with one row like ``inner`` or ``outer`` for each batch, are above the limit.

    Args:
        oracle: its samples say how many inner and outer batches there are.
        inner: the terms of an inner batch.
        outer: the terms of an outer batch.
        limit: bytes; None for half of :func:`available`.
    """
    batches = oracle.inner_samples.batches, oracle.outer_samples.batches
    rows = tuple(oracle.local_shares * (count + FURTHER_ROWS) for count in batches)
    sizes = _bytes(inner), _bytes(outer)
    needed = rows[0] * sizes[0] + rows[1] * sizes[1]
    limit = available() // 2 if limit is None else limit
    if needed > limit:
        raise ValueError(
            f"the tables of SABA need {needed:,} bytes ({rows[0]:,} rows of {sizes[0]:,} bytes for the inner batches, "
            f"{rows[1]:,} rows of {sizes[1]:,} bytes for the outer ones), and the limit is {limit:,}: use larger "
            f"batches than {oracle.inner_samples.batch} and {oracle.outer_samples.batch} samples, because each batch "
            "has one row; raise memory_limit if the memory is there; or use SRBA, which has no tables"
        )


def available() -> int:
    """Return the free bytes of the first local device, or of the machine if the device does not report them.

    On a machine without ``/proc/meminfo``, half of the physical memory is taken as free.
    """
    statistics: Any = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as lines:  # MemAvailable includes the pages that the system can free
            found = dict(line.split(":") for line in lines)
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _bytes(like: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
