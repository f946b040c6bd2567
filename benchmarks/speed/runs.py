"""What a person waits for: the first meta-step of `imaml train`, and what a run spends beside its meta-steps."""

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
    """Seconds from the command to the first meta-step shown: with an empty cache, and again with a full one."""
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
    """The time of a hundred meta-steps alone over that of a hundred steps of `imaml train` with all it does besides."""
    import jax

    from imaml.parallel.devices import global_mesh, on_all, use_all_cores
    from imaml.runs import training
    from imaml.runs.compilation import StepCompiler
    from imaml.runs.meta_step import initial_state
    from imaml.settings.overrides import override
    from imaml.settings.published_presets import preset, presets

    use_all_cores()
    chosen = override(preset(presets()[0]), "outer.steps", str(2 * STEPS))
    mesh = global_mesh(chosen.outer.tasks)
    pixels = training.datasets.load(chosen.dataset).train.pixels
    begun, pixels = on_all((initial_state(chosen), pixels), mesh)
    step = StepCompiler(chosen, mesh).step(pixels)
    begun = jax.block_until_ready(step(begun, pixels))[0]

    def alone():
        state, started = begun, time.perf_counter()
        for _ in range(STEPS):
            # Each is waited for: the collectives of many under way would wait for each other.
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
    shares = [bare / whole for bare, whole in times]
    return {"seconds_alone_and_trained": times, "share": statistics.median(shares), "shares": shares}
