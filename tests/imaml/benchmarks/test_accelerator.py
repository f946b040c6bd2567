"""``python -m benchmarks.accelerator`` trains with the fastest accurate way to compute meta-gradients.

A run that is stopped and resumed gives the same numbers as an uninterrupted run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accelerator.comparison import LARGEST_DISTANCE, Measurement, Way, best
from benchmarks.accelerator.training import Cell
from imaml.runs import checkpoints
from imaml.runs.log import read_log

ROOT = Path(__file__).parents[3]
PRESET, STEPS = "glyphs-5way-1shot-gd", 100
# With a large λ, the tasks of this small network have usable meta-gradients from the first meta-step on.
SMALL = ["--", "--network.filters", "4", "--strength", "10", "--outer.queries", "1"]


def measured(products, seconds, distance):
    return Measurement(Way("all", "patches", products), seconds, distance, 1.0)


def test_the_fastest_way_within_the_largest_distance_from_float64_is_kept():
    precise = measured("float32", 3.0, 1e-6)
    rounded = measured("tensorfloat32", 2.0, 0.9 * LARGEST_DISTANCE)
    coarse = measured("bfloat16", 1.0, 1.1 * LARGEST_DISTANCE)
    assert best([precise, rounded, coarse]) == rounded.way
    assert best([precise, coarse]) == precise.way


def test_if_every_way_is_too_far_from_float64_the_fastest_in_float32_is_kept():
    slow, fast = measured("float32", 3.0, 0.2), measured("float32", 2.0, float("inf"))
    assert best([slow, measured("bfloat16", 1.0, 0.1), fast]) is fast.way


def test_a_cell_is_parsed_with_and_without_its_numbers_of_steps_and_tasks():
    assert Cell.parse("a-preset") == Cell("a-preset") and Cell("a-preset").options() == []
    assert Cell.parse("a-preset:300:8").options() == ["--outer.steps", "300", "--outer.tasks", "8"]


def begin(out, minutes=20):
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--minutes", str(minutes), "--out", str(out)]
    # The command runs only briefly. Compiling without most of XLA's optimisations takes half the time.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen([*command, "--cells", f"{PRESET}:{STEPS}:4", *SMALL], cwd=ROOT, env=environment)


def last(out):
    found = checkpoints.newest(out / PRESET)
    assert found.step == STEPS
    return found


@pytest.mark.slow("compiles the meta-gradient in eight ways, and trains the same small run twice")
def test_several_calls_give_the_numbers_of_an_uninterrupted_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert begin(whole).wait() == 0
    content = json.loads((whole / "comparison.json").read_text())
    assert len(content["measured"]) == 8 and all(not each["error"] for each in content["measured"])
    assert (whole / "records" / f"{PRESET}.json").exists()

    parts.mkdir()
    shutil.copy(whole / "comparison.json", parts)  # A new measurement might keep another way, which rounds differently.
    first = begin(parts)
    while not (log := parts / PRESET / "metrics.jsonl").exists() or log.read_text().count("\n") < 5:
        assert first.poll() is None, "the first call ended before it could be interrupted"
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    assert 0 < checkpoints.newest(parts / PRESET).step < STEPS and not (parts / PRESET / "result.json").exists()

    assert begin(parts).wait() == 0
    for one, other in zip(read_log(whole / PRESET), read_log(parts / PRESET), strict=True):
        assert (one.step, one.loss, one.linear_residual, one.tasks) == (
            other.step, other.loss, other.linear_residual, other.tasks,
        )  # fmt: skip
    for ours, theirs in zip(last(whole).leaves, last(parts).leaves, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    results = [json.loads((out / PRESET / "result.json").read_text())["evaluations"] for out in (whole, parts)]
    assert results[0] == results[1]
