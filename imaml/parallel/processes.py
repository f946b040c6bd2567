"""Several processes, on one host or many, that train one run together: how they meet, and how they part.

Every process runs the same command and computes its share of each meta-step. None can go on without the others: where
one ends before the run does, the others stop and say which it was.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from imaml.errors import InputError, check
from imaml.parallel.liveness import LivenessMonitor, accept_connections, connect, free_port, receive_number, send_number

MEETING_SECONDS = 300
"""For which a process waits for the others, before the run and after it."""
HEARTBEAT_SECONDS = 60
"""After which JAX's runtime ends all processes where one is silent, though its connection stands."""
VERDICT_SECONDS = 5.0
"""For which a process whose collective failed waits to hear who is missing."""
LOST = os.EX_TEMPFAIL
"""The exit code where another process was lost: the same command may well do better."""


@dataclass(frozen=True)
class Processes:
    """How many processes take part in a run, and which of them this is.

    Args:
        coordinator: ``HOST:PORT`` of process 0, where all meet.
        count: how many.
        index: this one's number, from 0.

    Raises:
        InputError: for an address without a port, or numbers out of range.
    """

    coordinator: str
    count: int
    index: int

    def __post_init__(self):
        check(self.count >= 1, f"--processes must be at least 1, got {self.count}")
        check(
            0 <= self.index < self.count,
            f"--process-id must lie between 0 and {self.count - 1} for --processes {self.count}, got {self.index}",
        )
        address = re.fullmatch(r"(?:[^:\s]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", self.coordinator)
        check(
            address is not None and 0 < int(address[1]) < 2**16,
            f"--coordinator takes HOST:PORT of process 0, the same for all, got {self.coordinator!r}",
        )

    @property
    def host(self) -> str:
        """Of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")


@contextmanager
def joined(processes: Processes | None) -> Iterator[None]:
    """While inside, JAX's devices are those of all ``processes``, and the loss of one ends this one; None is alone.

    To be entered before JAX starts. The loss of another process is told on stderr, and this one ends with
    :data:`LOST`: nothing can be unwound, since the main thread may wait in a collective for ever.

    Raises:
        InputError: where the processes do not meet.
    """
    if processes is None or processes.count == 1:
        yield
        return
    lines, address = _meet(processes)
    monitor = LivenessMonitor(lines, lambda lost: _end(processes, lost))
    try:
        _initialize(processes, address)
        yield
    except BaseException as error:
        if not isinstance(error, InputError | OSError | KeyboardInterrupt | SystemExit):
            time.sleep(VERDICT_SECONDS)  # most likely a collective that failed: the monitor ends this process first
        monitor.close(well=False)
        raise
    monitor.close(well=True)
    jax.distributed.shutdown()


def leave(code: int, threads: bool) -> None:
    """End this process at once, if it failed, where JAX's own way out would wait for the others that it has joined.

    Args:
        code: the exit code.
        threads: whether to go, too, where Python's own way out would wait for a thread: a compilation, or JAX's alarm
            clock of a minute, which nobody stops when its start is interrupted.
    """
    waits = threads and any(not t.daemon and t is not threading.main_thread() for t in threading.enumerate())
    if code and (waits or jax.distributed.is_initialized()):
        _exit(code)


def _meet(processes):
    """The connections to the other processes, and the address of JAX's own coordinator, which is sent over them."""
    host, port = processes.host, int(processes.coordinator.rpartition(":")[2])
    if processes.index == 0:
        lines, its_port = accept_connections(port, processes.count, MEETING_SECONDS), free_port()
        send_number(lines, its_port)
    else:
        lines = connect(host, port, processes.index, processes.count, MEETING_SECONDS)
        its_port = receive_number(lines)
    return lines, f"[{host}]:{its_port}" if ":" in host else f"{host}:{its_port}"


def _initialize(processes, address):
    # One CPU device for each process: gloo's collectives know processes, not devices.
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        address, processes.count, processes.index, initialization_timeout=MEETING_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=MEETING_SECONDS,
    )  # fmt: skip


def _end(processes, lost):
    print(
        f"\nimaml train: process {lost} of {processes.count}, counted from 0, has ended before the run did: its own "
        "output says why. This one stops too; the same commands go on from the last checkpoint",
        file=sys.stderr,
    )
    _exit(LOST)


def _exit(code):
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whoever read the output may have gone too
        os._exit(code)
