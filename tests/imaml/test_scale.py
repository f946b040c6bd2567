"""One run in two processes: the numbers of one process, one writer, and an end in time where one of them dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import bilevel as bl
import imaml
from imaml import checkpoints, cli, datasets, files, networks, presets, processes, runfolder, runlog, training
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.meta_step import initial_state
from imaml.presets import Outer
from imaml.tasks import Episode

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
PATIENCE = 400.0
"""Seconds for a process to end, compiling included; a few on an idle machine."""


class Flat:
    """A network that compiles in a second; what is tested here is the loop around it."""

    def build(self, ways):
        network = networks.mlp((28 * 28, 4, ways))
        return networks.Network(network.init, lambda p, x: network.apply(p, x.reshape(len(x), -1)))

    def __deepcopy__(self, memo):  # for its settings
        return "flat"


PRESET = replace(
    imaml.preset("glyphs-5way-1shot-gd"),
    episode=Episode(ways=2, shots=1, queries=1),
    network=Flat(),
    inner=bl.GradientDescent(0.1, steps=2),
    linear=bl.CG(2),
    outer=Outer(learning_rate=1e-2, tasks=2, queries=1, steps=STEPS),
)


def dataset(pixels):
    names = {split: tuple(f"{split}{i}" for i in range(len(pixels))) for split in ("train", "test")}
    return ImageDataset("tiny", *(ImageClasses(pixels, names[split]) for split in ("train", "test")))


# --- What each process runs ----------------------------------------------------------------------------------------


def worker(pixels: str, pause: str, *arguments: str) -> int:
    """The command line with the tiny preset and dataset, a checkpoint after each step, and a pause after each."""
    whole_train = training.train

    def train(*positional, on_progress, **options):
        def wait(progress):
            on_progress(progress)
            time.sleep(float(pause))

        return whole_train(*positional, on_progress=wait, evaluation_tasks=4, checkpoint_seconds=0.0, **options)

    training.train = train
    tiny = dataset(np.load(pixels))
    datasets.load = lambda name, data=None: tiny
    presets._PRESETS[PRESET.name] = PRESET
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[1:]))


@pytest.fixture(scope="module")
def start(tiny_pixels, tmp_path_factory):
    """``with start(directory, pause=0.0) as (first, second):`` runs two processes and kills what is left of them."""
    folder = tmp_path_factory.mktemp("processes")
    np.save(folder / "pixels.npy", tiny_pixels)
    environment = os.environ | {"IMAML_CACHE": str(folder), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}

    @contextmanager
    def start(directory, pause=0.0):
        command = [sys.executable, __file__, folder / "pixels.npy", pause, "--out", directory, "--processes", 2]
        command += ["--coordinator", f"127.0.0.1:{free_port()}", "--process-id"]
        pair = [
            subprocess.Popen(
                [*map(str, command), str(number)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, encoding="utf-8", cwd=folder,
            )
            for number in (0, 1)
        ]  # fmt: skip
        try:
            yield pair
        finally:
            for process in pair:
                process.kill()
                process.communicate()

    return start


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ended(process):
    """Its exit code, and what it said on stdout and stderr."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def wait_for_steps(directory, process, count):
    """Until so many meta-steps have been logged."""
    deadline = time.monotonic() + PATIENCE
    while len(runlog.read(directory)) < count:
        assert time.monotonic() < deadline and process.poll() is None, ended(process)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def together(start, tmp_path_factory):
    """A run from beginning to end in two processes: its folder, and what each of them said."""
    directory = tmp_path_factory.mktemp("together") / "run"
    with start(directory) as pair:
        return directory, [ended(process) for process in pair]


def saved_theta(directory):
    found = checkpoints.newest(directory)
    assert found is not None
    return found.restore(initial_state(PRESET)).theta


def logged(directory):
    return [replace(progress, seconds=0.0) for progress in runlog.read(directory)]


def test_two_processes_give_what_one_gives(together, tiny_pixels, tmp_path, monkeypatch):
    directory, said = together
    assert [code for code, _, _ in said] == [0, 0], said
    monkeypatch.setattr(datasets, "load", lambda name, data=None: dataset(tiny_pixels))
    alone = imaml.train(PRESET, tmp_path / "run", devices=1, evaluation_tasks=4)
    for one, two in zip(logged(alone.directory), logged(directory), strict=True):
        assert (one.step, one.tasks, one.statuses) == (two.step, two.tasks, two.statuses)
        print(one.loss - two.loss, one.accuracy, two.accuracy)
    print(jax.tree.map(lambda a, b: np.abs(a - b).max(), alone.theta, saved_theta(directory)))
    assert 0


def test_only_process_0_writes_and_speaks(together):
    directory, ((_, out, _), (_, silent, _)) = together
    names = {f"checkpoint-{step:08}.npz" for step in (STEPS - 1, STEPS)} | {checkpoints.best(directory).path.name}
    assert {path.name for path in directory.iterdir()} == names | {
        runlog.FILE, runfolder.RESULT, files.LOCK, "learning_curve.png"
    }  # fmt: skip
    assert [progress.step for progress in runlog.read(directory)] == list(range(1, STEPS + 1))
    assert "test accuracy" in out and "imaml" not in silent and "accuracy" not in silent


@pytest.mark.parametrize("victim", [1, 0])
def test_where_one_is_killed_the_other_stops_in_time_and_says_which_and_a_rerun_goes_on(
    victim, start, together, tmp_path
):
    directory = tmp_path / "run"
    with start(directory, pause=0.5) as pair:
        wait_for_steps(directory, pair[0], 2)
        pair[victim].kill()
        killed = time.monotonic()
        code, _, err = ended(pair[1 - victim])
        assert time.monotonic() - killed < 10  # the kernel tells at once; what is left is the end of a pause, and load
    assert code == processes.LOST
    assert f"process {victim} of 2, counted from 0, has ended before the run did" in err and "Traceback" not in err
    found = checkpoints.newest(directory, lambda path, message: pytest.fail(message))
    assert 1 <= found.step < STEPS
    if victim:
        with start(directory) as pair:
            assert [ended(process)[0] for process in pair] == [0, 0]
        jax.tree.map(np.testing.assert_array_equal, saved_theta(directory), saved_theta(together[0]))
        assert logged(directory) == logged(together[0])


def test_a_signal_to_one_stops_both_at_the_same_step(start, tmp_path):
    directory = tmp_path / "run"
    with start(directory, pause=0.5) as pair:
        wait_for_steps(directory, pair[0], 1)
        pair[1].send_signal(signal.SIGTERM)
        said = [ended(process) for process in pair]
    assert [code for code, _, _ in said] == [143, 143], said
    step = checkpoints.newest(directory).step
    assert step == len(runlog.read(directory)) < STEPS
    assert f"stopped at step {step} of {STEPS} and saved" in said[0][1]
