"""Two measurements of `imaml train`: the time to the first meta-step, and the share of meta-steps in a run's time."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 100


def starts(rounds: int) -> dict[str, list[float]]:
    """Measure the seconds from the start of `imaml train` to its first printed meta-step.

    Args:
        rounds: number of measurements.

    Returns:
        Seconds by round, ``"first"`` with an empty cache, and ``"second"`` with the cache that the first run filled.
    """
    found: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for which in found:
                found[which].append(_seconds_to_first_step(Path(folder) / "cache", Path(folder) / which))
    return found


def _seconds_to_first_step(cache, out):
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "imaml", "train", "--out", out],
        cwd=ROOT, env=os.environ | {"IMAML_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        while not child.stdout.readline().startswith("step "):
            if child.poll() is not None:
                raise RuntimeError(f"imaml train ended with status {child.returncode} before its first step")
        return time.monotonic() - started
    finally:
        child.kill()
        child.wait()


def host_share(rounds: int) -> dict[str, object]:
    """Measure the time of 100 meta-steps alone, relative to 100 steps of a training run with log and checkpoints.

    Args:
        rounds: number of measurements.
    """
    import jax

    from imaml import datasets
    from imaml.parallel.devices import global_mesh, on_all, use_all_cores
    from imaml.runs import training
    from imaml.runs.meta_step import initial_state
    from imaml.runs.step_compiler import StepCompiler
    from imaml.settings.overrides import override
    from imaml.settings.published_presets import preset, presets

    use_all_cores()
    chosen = override(preset(presets()[0]), "outer.steps", str(2 * STEPS))
    mesh = global_mesh(chosen.outer.tasks)
    pixels = datasets.load(chosen.dataset).train.pixels
    begun, pixels = on_all((initial_state(chosen), pixels), mesh)
    step = StepCompiler(chosen, mesh).step(pixels)
    begun = jax.block_until_ready(step(begun, pixels))[0]

    def alone():
        state, started = begun, time.perf_counter()
        for _ in range(STEPS):
            # Wait for each step: if several steps are dispatched, their sums over devices can block each other.
            state, _ = jax.block_until_ready(step(state, pixels))
        return time.perf_counter() - started

    def trained():
        seconds: dict[int, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            training.train(
                chosen, Path(folder) / "run", evaluation_tasks=2, checkpoint_seconds=5.0,
                on_progress=lambda progress: seconds.update({progress.step: time.perf_counter()}),
            )  # fmt: skip
        return seconds[STEPS + 50] - seconds[50]

    times = [(alone(), trained()) for _ in range(rounds)]
    shares = [steps_alone / training_time for steps_alone, training_time in times]
    return {"seconds_alone_and_trained": times, "share": statistics.median(shares), "shares": shares}
