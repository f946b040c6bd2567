"""A run in two processes equals a run in one, process 0 alone writes, and a lost process stops the other in time."""

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_preset import dataset, tiny_preset

import imaml
from imaml import InputError, cli, datasets
from imaml.parallel import liveness, processes
from imaml.parallel.devices import check_shares, global_mesh
from imaml.parallel.liveness import LivenessMonitor, accept_connections, connect, free_port, receive_number, send_number
from imaml.parallel.processes import Processes
from imaml.runs import checkpoints, training
from imaml.runs import folder as runfolder
from imaml.runs import log as runlog
from imaml.runs.meta_step import initial_state
from imaml.settings.parts import Validation
from imaml.storage import files

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[3]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
STEPS = 12
TIMEOUT = 400.0
"""Time limit of a process in seconds, compilation included. On an idle machine a process takes a few seconds."""


PRESET = tiny_preset(STEPS)


# --- What each process runs ----------------------------------------------------------------------------------------


def worker(pixels: str, pause: str, *arguments: str) -> int:
    """Run ``imaml train`` on the tiny preset and dataset. Each step saves a checkpoint and sleeps ``pause`` seconds."""
    original_train = training.train

    def train(*positional, on_progress, **options):
        def wait(progress):
            on_progress(progress)
            time.sleep(float(pause))

        return original_train(*positional, on_progress=wait, evaluation_tasks=4, checkpoint_seconds=0.0, **options)

    training.train = train
    tiny = dataset(np.load(pixels))
    datasets.load = lambda name, data=None, meanwhile=None: tiny
    imaml.register_preset(PRESET)
    return cli.main(["train", PRESET.name, *arguments])


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[1:]))


@pytest.fixture(scope="module")
def start(tiny_pixels, tmp_path_factory):
    """A context manager ``start(directory, pause, *words)`` that yields two training processes and kills them on exit.

    The words are added to the command line of both processes.
    """
    folder = tmp_path_factory.mktemp("processes")
    np.save(folder / "pixels.npy", tiny_pixels)
    environment = os.environ | {"IMAML_CACHE": str(folder), "PYTHONPATH": PATHS, "PYTHONIOENCODING": "utf-8"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # like the fixture quick_compilation in this process

    @contextmanager
    def start(directory, pause=0.0, *words):
        command = [sys.executable, __file__, folder / "pixels.npy", pause, *words, "--out", directory, "--processes", 2]
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


def wait_for_end(process):
    """Wait for ``process`` to end and return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def wait_for_steps(directory, process, count):
    """Wait until ``count`` meta-steps are in the log of ``directory``."""
    deadline = time.monotonic() + TIMEOUT
    while len(runlog.read_log(directory)) < count:
        assert time.monotonic() < deadline and process.poll() is None, wait_for_end(process)
        time.sleep(0.02)


def logged(directory):
    return [replace(progress, seconds=0.0) for progress in runlog.read_log(directory)]


@dataclass(frozen=True)
class InterruptedRun:
    """The record of a run in two processes that was started three times.

    The first time it was stopped by a signal to process 1. The second time process 1 was killed. The third time it
    completed.

    Attributes:
        directory: the run folder.
        stopped: exit code, stdout and stderr of both processes of the first start.
        lost: exit code, stdout and stderr of process 0 of the second start.
        done: exit code, stdout and stderr of both processes of the third start.
        steps: steps of the newest checkpoints after the first and the second start.
        seconds: time from the kill of process 1 to the end of process 0.
    """

    directory: Path
    stopped: list
    lost: tuple
    done: list
    steps: tuple
    seconds: float


@pytest.fixture(scope="module")
def interrupted_run(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupted_run") / "run"
    with start(directory, pause=0.5) as pair:
        wait_for_steps(directory, pair[0], 1)
        pair[1].send_signal(signal.SIGTERM)
        stopped = [wait_for_end(process) for process in pair]
    first = newest_checkpoint(directory).step
    with start(directory, pause=0.5) as pair:
        wait_for_steps(directory, pair[0], first + 1)
        pair[1].kill()
        killed = time.monotonic()
        lost = wait_for_end(pair[0])
        seconds = time.monotonic() - killed
    second = newest_checkpoint(directory).step
    with start(directory) as pair:
        done = [wait_for_end(process) for process in pair]
    return InterruptedRun(directory, stopped, lost, done, (first, second), seconds)


def newest_checkpoint(directory):
    return checkpoints.newest(directory, lambda path, message: pytest.fail(message))


@pytest.mark.slow("starts two processes")
def test_a_signal_to_one_process_stops_both_at_the_same_step(interrupted_run):
    assert [code for code, _, _ in interrupted_run.stopped] == [143, 143], interrupted_run.stopped
    assert f"stopped at step {interrupted_run.steps[0]} of {STEPS} and saved" in interrupted_run.stopped[0][1]


@pytest.mark.slow("starts two processes")
def test_after_a_kill_the_other_process_stops_in_time_and_names_the_lost_one(interrupted_run):
    code, _, err = interrupted_run.lost
    assert code == processes.LOST, interrupted_run.lost
    assert "process 1 of 2 (counted from 0) ended before the run was complete" in err and "Traceback" not in err
    assert interrupted_run.steps[0] <= interrupted_run.steps[1] < STEPS
    assert interrupted_run.seconds < 10  # the kernel closes the connection at once; 10 s allow for a loaded machine


@pytest.mark.slow("starts two processes")
def test_two_processes_interrupted_twice_give_the_result_of_one_process(
    interrupted_run, tiny_pixels, tmp_path, monkeypatch
):
    assert [code for code, _, _ in interrupted_run.done] == [0, 0], interrupted_run.done
    monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: dataset(tiny_pixels))
    alone = imaml.train(PRESET, tmp_path / "run", devices=1, evaluation_tasks=4)
    # Both programs sum the gradients of the same two tasks, with different rounding errors of up to 100 ε relative to
    # the terms. Adam moves a parameter by its learning rate times a ratio of gradients. If a sum cancels to a
    # hundredth of its terms, the relative error of that ratio is 100 times larger. A run on other tasks would differ by
    # about the learning rate in each step, far more than this tolerance.
    rounding = 100 * float(np.finfo(np.float32).eps)
    tolerance = STEPS * PRESET.outer.learning_rate * 100 * rounding
    saved = newest_checkpoint(interrupted_run.directory).restore(initial_state(PRESET))
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, rounding, tolerance), alone.theta, saved.theta)
    steps = list(zip(logged(alone.directory), logged(interrupted_run.directory), strict=True))
    assert steps[0][0].loss == pytest.approx(steps[0][1].loss, rel=rounding)
    for one, two in steps:
        assert (one.step, one.tasks) == (two.step, two.tasks)
        assert one.loss == pytest.approx(two.loss, rel=100 * rounding)
    assert f"test accuracy {alone.evaluation.accuracy:.2%}" in interrupted_run.done[0][1]


@pytest.mark.slow("starts two processes")
def test_only_process_0_writes_files_and_prints(interrupted_run):
    out, other_out = (stdout for _, stdout, _ in interrupted_run.done)
    best = checkpoints.best(interrupted_run.directory)
    names = {f"checkpoint-{step:08}.npz" for step in (STEPS - 1, STEPS)} | {best.path.name}
    assert {path.name for path in interrupted_run.directory.iterdir()} == names | {
        runlog.FILE, runfolder.RESULT, files.LOCK, "learning_curve.png"
    }  # fmt: skip
    assert [progress.step for progress in runlog.read_log(interrupted_run.directory)] == list(range(1, STEPS + 1))
    assert "test accuracy" in out and not [line for line in other_out.splitlines() if "Gloo" not in line]


@pytest.mark.slow("starts two processes")
def test_validation_in_two_processes_gives_the_numbers_of_one_process(start, tiny_pixels, tmp_path, monkeypatch):
    validation = Validation(every=1, tasks=20, patience=2, held_out=0.5)
    words = [f"--validation.{name}={value}" for name, value in asdict(validation).items()]
    with start(tmp_path / "two", 0.0, *words) as pair:
        ends = [wait_for_end(process) for process in pair]
    assert [code for code, _, _ in ends] == [0, 0], ends
    monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: dataset(tiny_pixels))
    alone = imaml.train(replace(PRESET, validation=validation), tmp_path / "one", devices=1, evaluation_tasks=4)
    one, two = (
        [(entry.step, entry.validation, entry.validation_interval) for entry in runlog.read_log(tmp_path / name)]
        for name in ("one", "two")
    )
    assert one == two and None not in one[0]
    assert alone.best_step < alone.step < STEPS  # both processes stop early at the same step
    saved = [newest_checkpoint(tmp_path / name).description["validation"] for name in ("one", "two")]
    assert saved[0] == saved[1] and saved[0]["step"] == alone.best_step
    assert checkpoints.best(tmp_path / "two").step == alone.best_step


# --- Without other processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--processes 2", "belong together: --coordinator and --process-id missing"),
        ("--coordinator here:1234 --processes 2", "belong together: --process-id missing"),
        ("--coordinator here --processes 2 --process-id 0", "--coordinator takes HOST:PORT of process 0"),
        ("--coordinator here:0 --processes 2 --process-id 0", "--coordinator takes HOST:PORT of process 0"),
        ("--coordinator here:99999 --processes 2 --process-id 0", "--coordinator takes HOST:PORT of process 0"),
        ("--coordinator here:12 --processes 0 --process-id 0", "--processes must be at least 1, got 0"),
        ("--coordinator here:12 --processes 2 --process-id 2", "--process-id must lie between 0 and 1"),
        ("--coordinator here:12 --processes 2 --process-id=-1", "--process-id must lie between 0 and 1"),
        ("--coordinator here:12 --processes few --process-id 0", "invalid int value: 'few'"),
        (
            "--coordinator here:12 --processes 3 --process-id 0",
            "the 4 tasks of a meta-step (--outer.tasks) cannot be divided equally among 3 devices (1 in each of 3 pr",
        ),
        ("--devices 3", "the 4 tasks of a meta-step (--outer.tasks) cannot be divided equally among 3 devices"),
        ("--devices some", "must be a whole number of at least 1, or 'all', got 'some'"),
        ("--devices 0", "must be a whole number of at least 1, or 'all', got '0'"),
        ("--process 2", "there is no option --process: did you mean --process"),
    ],
)
def test_wrong_options_are_reported_before_jax_starts(options, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "start_jax", lambda: pytest.fail("starts JAX"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *options.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["10.0.0.1:1234", "host.example:65535", "[::1]:1"])
def test_host_names_and_ip_addresses_of_both_versions_are_accepted(address):
    assert Processes(address, 2, 1).host == address.rpartition(":")[0].strip("[]")


def test_a_mesh_has_the_requested_number_of_devices_or_the_largest_that_divides_the_tasks():
    count = jax.local_device_count()
    assert global_mesh(8 * count).size == count and global_mesh(8 * count, "all").size == count
    assert global_mesh(8 * count, 1).size == global_mesh(1).size == 1
    with pytest.raises(InputError, match=f"{count + 1} devices were requested .*, but a process has {count}"):
        global_mesh(8 * count, count + 1)
    with pytest.raises(InputError, match="0 devices were requested"):
        global_mesh(8 * count, 0)
    with pytest.raises(InputError, match=f"the 1 tasks of .* among {2 * count} devices"):
        check_shares(1, 1, 2 * count)


def test_processes_with_different_settings_are_refused(monkeypatch):
    monkeypatch.setattr(
        training, "gathered", lambda digest: np.stack([digest, digest ^ np.eye(32, dtype=np.uint8)[0], digest])
    )
    with pytest.raises(InputError, match=r"processes \[1\] were started with other settings, data or start"):
        training._check_alike({"config": {}, "data": "of this process"})


def connect_all(*callers, processes=3, seconds=10.0):
    """Connect processes to process 0 in threads.

    Args:
        callers: for each process that connects, its index and the number of processes that it announces.
        processes: number of processes that process 0 expects.
        seconds: time limit of both sides.

    Returns:
        For process 0 and each caller in order, its connections or the exception that it raised.
    """
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(accept_connections, port, processes, seconds)
        others = [pool.submit(connect, "127.0.0.1", port, *caller, seconds) for caller in callers]
        return [future.exception() or future.result() for future in (first, *others)]


@pytest.fixture
def three_monitors():
    """The liveness monitors of three processes, and a queue of pairs ``(reporting process, lost process)``."""
    losses = queue.SimpleQueue()
    lines = connect_all((1, 3), (2, 3))
    monitors = [LivenessMonitor(line, lambda lost, n=n: losses.put((n, lost))) for n, line in enumerate(lines)]
    yield monitors, losses
    for monitor in monitors:
        monitor.close(well=True)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_processes_learn_which_one_was_lost(victim, three_monitors):
    monitors, losses = three_monitors
    monitors[victim].close(well=False)
    others = {0, 1, 2} - {victim}
    assert {losses.get(timeout=10) for _ in others} == {(other, victim) for other in others}


def test_a_process_that_says_farewell_is_not_reported_as_lost(three_monitors):
    monitors, losses = three_monitors
    for number in (1, 0):
        monitors[number].close(well=True)
        with pytest.raises(queue.Empty):
            losses.get(timeout=0.2)


def test_processes_that_did_not_connect_are_named():
    error, line = connect_all((2, 3), seconds=0.5)
    assert isinstance(error, InputError) and str(error).startswith("processes [1] did not connect to port ")
    with line[0], pytest.raises(InputError, match="process 0 ended before all processes had connected"):
        receive_number(line)


@pytest.mark.parametrize("caller", [(1, 4), (3, 3), (0, 3)])
def test_a_process_with_another_count_or_a_wrong_number_is_refused(caller):
    error, line = connect_all(caller)
    line[0].close()
    expected = (
        f"process {caller[0]} of {caller[1]} has connected, but process 0 of 3 waits for one of the processes [1, 2]"
    )
    assert str(error) == expected


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1", liveness._GREETING, liveness._GREETING + b"1"])
def test_a_connection_without_the_greeting_or_without_numbers_is_ignored(sent):
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(accept_connections, port, 2, 10.0)
        with connect_when_listening(port) as other_program:
            other_program.sendall(sent)
            with suppress(OSError):  # process 0 may have closed the connection already
                other_program.shutdown(socket.SHUT_WR)
            own_lines = connect("127.0.0.1", port, 1, 2, 10.0)
            lines = first.result()
    with lines[1], own_lines[0]:
        send_number(lines, 4711)
        assert receive_number(own_lines) == 4711


def connect_when_listening(port):
    """Return a connection to ``port``, retrying until a process listens on it."""
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), 10.0)
        time.sleep(0.01)


def test_an_unreachable_process_0_and_a_port_in_use_are_reported():
    with pytest.raises(InputError, match="process 0 does not answer at port"):
        connect("127.0.0.1", free_port(), 1, 2, 0.1)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"process 0 cannot listen at port {port}: Address already in use"):
            accept_connections(port, 2, 0.1)
