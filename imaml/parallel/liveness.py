"""Detection of processes that have ended, by a TCP connection from each other process to process 0.

If a process dies, a collective operation of the other processes either fails without naming the lost process, or never
returns. When a process ends for whatever reason, the kernel closes its TCP connections. The closed connection
identifies the lost process at once. A process that is stopped (SIGSTOP), or whose host has lost power, keeps its
connection open. The heartbeats of JAX's distributed runtime detect those cases.

During a run, a message has four bytes: the index of a lost process, or a farewell before a planned end.
"""

import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from imaml.errors import InputError

_GREETING = b"imaml train\n"
_MESSAGE_BYTES = 4
_FAREWELL = b"\xff" * _MESSAGE_BYTES
_ANSWER_SECONDS = 10.0
"""Time for which process 0 waits for the next message of a process that has connected."""


class LivenessMonitor:
    """A thread that watches the connections to other processes and reports the first process that is lost.

    Args:
        lines: connections by the index of the process at the other end. Process 0 has a connection to every other
            process. Each other process has only the one to process 0.
        on_loss: called at most once, from the watching thread, with the index of the first process that is lost. A
            process is lost if its connection closes without a farewell, or if process 0 reports it as lost.
    """

    def __init__(self, lines: dict[int, socket.socket], on_loss: Callable[[int], None]):
        self._lines, self._on_loss, self._leaving = lines, on_loss, False
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self, *, well: bool) -> None:
        """Close all connections.

        Args:
            well: if True, first send a farewell, after which the other processes expect the connection to close. If
                False, send none, so that the monitors of the other processes report this process as lost.
        """
        self._leaving = True
        for line in self._lines.values():
            if well:
                _send(line, _FAREWELL)
            _shut_down(line)

    def _watch(self):
        with ExitStack() as opened:
            selector = opened.enter_context(selectors.DefaultSelector())
            for process, line in self._lines.items():
                selector.register(opened.enter_context(line), selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    message = _receive(self._lines[key.data])
                    if message == _FAREWELL:
                        selector.unregister(key.fileobj)
                    elif self._leaving:
                        return
                    else:
                        return self._report_loss(int.from_bytes(message) if message else key.data)

    def _report_loss(self, lost):
        for process, line in self._lines.items():
            if process != lost:
                _send(line, lost.to_bytes(_MESSAGE_BYTES))
        self._on_loss(lost)


def accept_connections(port: int, processes: int, seconds: float) -> dict[int, socket.socket]:
    """Accept the connections of processes 1 to ``processes`` − 1. Called by process 0.

    Args:
        port: TCP port on which to listen.
        processes: number of processes, this one included.
        seconds: time in which all of them must connect.

    Returns:
        The connections by the index of the process at the other end.

    Raises:
        InputError: if the port is taken, if a process does not connect in time, if a process announces a different
            number of processes, or if the index of a process is out of range or already taken.
    """
    lines: dict[int, socket.socket] = {}
    deadline = time.monotonic() + seconds
    with ExitStack() as opened:
        server = opened.enter_context(_server(port))
        while missing := sorted(set(range(1, processes)) - set(lines)):
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                line, _ = server.accept()
            except TimeoutError:
                raise InputError(f"processes {missing} did not connect to port {port} within {seconds:.0f} s") from None
            opened.enter_context(line).settimeout(_ANSWER_SECONDS)
            numbers = b""
            if _receive(line, len(_GREETING)) == _GREETING:
                numbers = _receive(line, 2 * _MESSAGE_BYTES)
            if len(numbers) < 2 * _MESSAGE_BYTES:  # some other program has connected, or the process has ended
                line.close()
                continue
            caller, announced = (int.from_bytes(part) for part in (numbers[:_MESSAGE_BYTES], numbers[_MESSAGE_BYTES:]))
            if announced != processes or caller not in missing:
                raise InputError(
                    f"process {caller} of {announced} has connected, but process 0 of {processes} waits for one of the "
                    f"processes {missing}"
                )
            lines[caller] = line
        server.close()
        opened.pop_all()  # keep the connections open
    return lines


def connect(host: str, port: int, process: int, processes: int, seconds: float) -> dict[int, socket.socket]:
    """Connect to process 0, which listens or will soon listen at ``port``. Called by every other process.

    Args:
        host: name or IP address of process 0's host.
        port: TCP port on which process 0 listens.
        process: index of this process.
        processes: number of processes.
        seconds: time for which to retry, and the timeout of the connection.

    Returns:
        The connection, under the key 0.

    Raises:
        InputError: if the host is unknown, or if process 0 cannot be reached in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            line = socket.create_connection((host, port), max(deadline - time.monotonic(), 0.01))
            break
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > deadline:
                raise InputError(f"process 0 does not answer at port {port} of {host}: {error}") from error
            time.sleep(0.2)  # process 0 may start later than this process
    line.settimeout(seconds)
    line.sendall(_GREETING + process.to_bytes(_MESSAGE_BYTES) + processes.to_bytes(_MESSAGE_BYTES))
    return {0: line}


def send_number(lines: dict[int, socket.socket], number: int) -> None:
    """Send ``number``, an integer of at most 32 bits, from process 0 to all others.

    Call this before the :class:`LivenessMonitor` starts, because the monitor reads from the same connections.
    """
    for line in lines.values():
        _send(line, number.to_bytes(_MESSAGE_BYTES))


def receive_number(lines: dict[int, socket.socket]) -> int:
    """Return the number that process 0 sent by :func:`send_number`.

    Raises:
        InputError: if process 0 has closed the connection, or sends nothing before the timeout.
    """
    message = _receive(lines[0])
    if not message:
        raise InputError(
            "process 0 ended before all processes had connected, or did not answer in time: see its output"
        )
    return int.from_bytes(message)


def free_port() -> int:
    """Return a TCP port on which no process listens at present."""
    with _server(0) as server:
        return server.getsockname()[1]


def _server(port):
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise InputError(f"process 0 cannot listen at port {port}: {error.strerror}") from error


def _receive(line, size=_MESSAGE_BYTES) -> bytes:
    """Return the next ``size`` bytes, or fewer if the connection is closed or times out."""
    try:
        return line.recv(size, socket.MSG_WAITALL)
    except OSError:
        return b""


def _send(line, message):
    try:
        line.sendall(message)
    except OSError:
        return  # the receiver has ended; the monitor finds that its connection is closed


def _shut_down(line):
    try:
        line.shutdown(socket.SHUT_RDWR)  # takes effect at once, while the watching thread still uses the socket
    except OSError:
        return
