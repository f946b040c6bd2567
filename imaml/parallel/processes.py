"""Start and end of a training run that is shared by several processes, on one host or on many.

Every process runs the same command and computes its share of each meta-step. No process can continue without the
others. If a process ends before the run is complete, the others stop and print the index of that process.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from imaml.errors import InputError, check
from imaml.parallel.liveness import LivenessMonitor, accept_connections, connect, free_port, receive_number, send_number

MEETING_SECONDS = 300
"""Time for which a process waits for the others to connect at the start and to finish at the end."""
HEARTBEAT_SECONDS = 60
"""Time without a heartbeat from one process after which JAX's runtime ends all processes."""
VERDICT_SECONDS = 5.0
"""Time for which a process waits before it raises the error of a failed computation, because the cause may be that
another process was lost. In that case the monitor ends the process while it waits."""
LOST = os.EX_TEMPFAIL
"""Exit status of a process that stops because another process was lost. A new attempt may succeed."""


@dataclass(frozen=True)
class Processes:
    """How many processes a run has, the index of this one, and the address of process 0.

    Args:
        coordinator: ``HOST:PORT`` on which process 0 listens, the same in every process. An IPv6 address stands in
            brackets.
        count: number of processes, at least 1.
        index: index of this process, from 0 to ``count`` − 1.

    Raises:
        InputError: if ``coordinator`` does not have this form, or if a number is out of range.
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
            f"--coordinator takes HOST:PORT of process 0, the same in every process, got {self.coordinator!r}",
        )

    @property
    def host(self) -> str:
        """The host name or IP address of process 0, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")


@contextmanager
def joined(processes: Processes | None) -> Iterator[None]:
    """Connect this process to the others of a run, so that JAX sees the devices of all of them.

    Enter this context before JAX starts. If another process is lost during the ``with`` block, this process prints the
    index of that process to stderr and exits at once with status :data:`LOST`. No clean-up code runs, because the main
    thread may be blocked in a collective operation that never returns.

    Args:
        processes: the processes of the run. With None or a count of 1, this context does nothing.

    Raises:
        InputError: if the processes cannot connect to each other.
    """
    if processes is None or processes.count == 1:
        yield
        return
    import jax

    lines, address = _meet(processes)
    monitor = LivenessMonitor(lines, lambda lost: _end(processes, lost))
    try:
        _initialize(processes, address)
        yield
    except BaseException as error:
        if not isinstance(error, InputError | OSError | KeyboardInterrupt | SystemExit):
            # If another process was lost, a collective operation may fail here before the monitor reports the loss.
            # Wait, so that the monitor prints the index of the lost process and ends this one.
            time.sleep(VERDICT_SECONDS)
        monitor.close(well=False)
        raise
    monitor.close(well=True)
    jax.distributed.shutdown()


def leave(code: int, threads: bool) -> None:
    """Exit at once with status ``code`` if it is nonzero and a normal exit would wait; otherwise return.

    A normal exit of a process that has joined others waits for them, because JAX's distributed runtime shuts down
    collectively. A failed process must not wait for the others.

    Args:
        code: the exit status.
        threads: if True, exit at once also if a non-daemon thread is running, because a normal exit would wait for it.
            Such threads are compilations, and a timer of one minute that JAX leaves running if its start is
            interrupted.
    """
    waits = threads and any(not t.daemon and t is not threading.main_thread() for t in threading.enumerate())
    jax = sys.modules.get("jax")  # a wrong argument is reported without importing JAX
    if code and (waits or (jax is not None and jax.distributed.is_initialized())):
        _exit(code)


def _meet(processes):
    """Return the connections of this process, and the address of JAX's coordinator, whose port process 0 chooses.

    Process 0 is connected to all others, which are connected to process 0 only.
    """
    host, port = processes.host, int(processes.coordinator.rpartition(":")[2])
    if processes.index == 0:
        lines, jax_port = accept_connections(port, processes.count, MEETING_SECONDS), free_port()
        send_number(lines, jax_port)
    else:
        lines = connect(host, port, processes.index, processes.count, MEETING_SECONDS)
        jax_port = receive_number(lines)
    return lines, f"[{host}]:{jax_port}" if ":" in host else f"{host}:{jax_port}"


def _initialize(processes, address):
    import jax

    # Gloo's collectives connect processes, not devices: use one CPU device per process.
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # this service would intercept SIGTERM
    jax.distributed.initialize(
        address, processes.count, processes.index, initialization_timeout=MEETING_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=MEETING_SECONDS,
    )  # fmt: skip


def _end(processes, lost):
    print(
        f"\nimaml train: process {lost} of {processes.count} (counted from 0) ended before the run was complete. "
        "See its output for the reason, if it was not killed. This process stops too. Start the same commands again to "
        "resume from the last checkpoint",
        file=sys.stderr,
    )
    _exit(LOST)


def _exit(code):
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # flushing fails if the reader of a pipe has ended
        os._exit(code)
