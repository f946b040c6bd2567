"""The process of a contender: it imports a library, reads requests from stdin, and answers each by one JSON line.

    python -m benchmarks.speed.serve MODULE ITEM DTYPE CORES     (ITEM as JSON, CORES as 0 or 0,1)

The process is pinned to its cores before it imports a library, because libraries count the cores when they start their
threads.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
import time

LIBRARIES = ("jax", "jaxlib", "jaxopt", "optimistix", "lineax", "torch", "torchopt", "higher", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that this process has imported, and the name of its GPU."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        if name in sys.modules:
            found[name] = importlib.metadata.version(name)
    if "jax" in sys.modules and (device := sys.modules["jax"].devices()[0]).platform == "gpu":
        found["gpu"] = device.device_kind
    if "torch" in sys.modules and os.environ.get("SPEED_TORCH_DEVICE") == "cuda":
        found["gpu"] = sys.modules["torch"].cuda.get_device_name()
    return found


def main(module: str, item_json: str, dtype: str, cores: str) -> None:
    """Answer requests until stdin ends: save a program's gradient, or time its calls.

    Args:
        module: name of the module in :mod:`benchmarks.speed.peers`.
        item_json: fields of the item, as JSON.
        dtype: ``"float32"`` or ``"float64"``.
        cores: numbers of the CPU cores, separated by commas.
    """
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Send what a library prints to stderr, so that stdout holds nothing but answers.
    import numpy as np

    from benchmarks.speed import workloads

    fields = json.loads(item_json)
    base = workloads.ITEMS[fields["name"]]
    item = dataclasses.replace(base, **fields)
    programs = importlib.import_module(f"benchmarks.speed.peers.{module}").programs(item, dtype)
    print(json.dumps({"programs": list(programs), "versions": versions()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        program = programs[request["program"]]
        if path := request.get("save"):
            np.savez(path, **(program() or {}))
            print(json.dumps({"versions": versions()}), file=answers)
            continue
        started, spent = time.perf_counter(), time.process_time()
        for _ in range(request["repeats"]):
            program()
        seconds, cpu = time.perf_counter() - started, time.process_time() - spent
        print(json.dumps({"seconds": seconds / request["repeats"], "cpu": cpu / request["repeats"]}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
