"""The process that runs the solvers of a clone of benchopt/benchmark_bilevel, in a Python that has benchopt.

    PYTHON -m benchmarks.bilevel.peer_worker CLONE CORE

The solver classes are imported from the clone and run unchanged. The problems come from benchmarks/bilevel/problems.py.
"""

import importlib
import os
import sys
from pathlib import Path


def build(settings: dict):
    """Return the peer's solver for the settings ``problem``, ``arrays``, ``algorithm``, ``options`` and ``block``."""
    import jax.numpy as jnp
    from jax.lax import dynamic_slice_in_dim as slice_rows

    from benchmarks.bilevel.problems import PROBLEMS, Data

    problem = PROBLEMS[settings["problem"]]
    data = Data.load(Path(settings["arrays"])).shuffled(settings["seed"])
    inner_arrays, outer_arrays = (
        {name: jnp.asarray(array) for name, array in arrays.items()} for arrays in (data.inner, data.outer)
    )

    def rows(arrays, start, batch_size):
        return {name: slice_rows(array, start, batch_size) for name, array in arrays.items()}

    def f_inner(z, x, start=0, batch_size=1):
        return problem.inner(z, x, rows(inner_arrays, start, batch_size))

    def f_outer(z, x, start=0, batch_size=1):
        return problem.outer(z, x, rows(outer_arrays, start, batch_size))

    module = importlib.import_module(f"solvers.{settings['algorithm'].lower()}")
    options = settings["options"] | {"eval_freq": settings["block"], "random_state": settings["seed"]}
    solver = module.Solver.get_instance(**options)
    solver.set_objective(
        f_inner=f_inner, f_outer=f_outer, inner_var0=jnp.asarray(data.z), outer_var0=jnp.asarray(data.x),
        n_inner_samples=data.sizes[0], n_outer_samples=data.sizes[1],
    )  # fmt: skip
    return solver


if __name__ == "__main__":
    clone, core = sys.argv[1], int(sys.argv[2])
    os.sched_setaffinity(0, {core})
    sys.path.insert(0, clone)
    from benchmarks.bilevel.turns import serve

    serve(build, core)
