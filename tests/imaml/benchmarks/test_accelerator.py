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
from benchmarks.accelerator.training import Cell, take_turns
from imaml.runs import checkpoints
from imaml.runs.log import read_log
from imaml.storage.files import alone_in

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


def test_a_way_is_parsed_and_an_unknown_one_refused():
    assert Way.parse("all:patches:bfloat16") == Way("all", "patches", "bfloat16")
    for text in ("all:patches", "some:patches:float32", "all:patches:float16", "all:conv:float32"):
        with pytest.raises(ValueError, match=rf"no way '{text}'.*{{one,groups,all}}:{{patches,xla}}:{{float32"):
            Way.parse(text)


class Runner:
    """A stand-in for a process that trains or does not."""

    def __init__(self, training):
        self.training, self.going = training, True

    def trains(self):
        return self.training

    def go_on(self):
        self.going = True

    def stop(self):
        self.going = False


def test_only_the_first_run_that_trains_goes_on_and_the_others_go_on_when_it_has_trained():
    prepares, first, _ = jobs = [Runner(False), Runner(True), Runner(True)]
    take_turns(jobs)
    assert [job.going for job in jobs] == [True, True, False]

    prepares.training = True  # Its turn comes at once, because it is the first in order.
    take_turns(jobs)
    assert [job.going for job in jobs] == [True, False, False]

    prepares.training = first.training = False  # Both evaluate.
    take_turns(jobs)
    assert [job.going for job in jobs] == [True, True, True]


@pytest.mark.slow("compiles and trains two runs")
def test_of_two_runs_one_is_stopped_while_the_other_trains_and_both_end(tmp_path):
    cells = ["glyphs-5way-1shot-gd:200:4", "glyphs-5way-1shot-hf:50:4"]
    way = ["--way", "one:patches:float32", "--jobs", "2"]
    assert begin(tmp_path, cells=cells, options=way).wait() == 0
    assert not (tmp_path / "comparison.json").exists()
    stopped = 0.0
    for cell in cells:
        name, steps, _ = cell.split(":")
        record = json.loads((tmp_path / "records" / f"{name}.json").read_text())
        assert record["meta_steps"] == int(steps) and record["config"]["network"]["convolutions"] == "patches"
        if record["note"]:
            seconds = float(record["note"].split()[1])
            assert record["note"] == f"for {seconds:.0f} of the seconds, the run was stopped while others trained"
            assert seconds <= record["seconds"] + 1
            stopped += seconds
    assert stopped >= 1


@pytest.mark.slow("compiles and trains two runs")
def test_if_the_command_is_killed_its_runs_end_also_the_one_that_was_stopped(tmp_path):
    cells = ["glyphs-5way-1shot-gd:100000:4", "glyphs-5way-1shot-hf:100000:4"]
    command = begin(tmp_path, cells=cells, options=["--way", "one:patches:float32", "--jobs", "2"])
    runs = [tmp_path / cell.split(":")[0] for cell in cells]
    while not all((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text() for run in runs):
        assert command.poll() is None, "the command ended before it could be killed"
        time.sleep(0.1)
    time.sleep(1)  # One of the runs has been stopped by now.
    command.kill()
    command.wait()
    time.sleep(1)
    for run in runs:
        with alone_in(run):  # The lock is free, so no process trains in this folder.
            pass


def begin(out, minutes=20, cells=(f"{PRESET}:{STEPS}:4",), options=()):
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--minutes", str(minutes), "--out", str(out), *options]
    # The command runs only briefly. Compiling without most of XLA's optimisations takes half the time.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen([*command, "--cells", *cells, *SMALL], cwd=ROOT, env=environment)


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
