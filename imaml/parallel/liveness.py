"""Who of several processes is still there: each holds a line to process 0, and the kernel drops it when one dies.

A collective that waits for a process that is gone either fails without a name or waits for ever. A line that breaks
says at once who it was, whatever killed it. What keeps its line and does nothing (a stopped process, a host without
power) is found by the heartbeats of JAX's own runtime instead.
"""

import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from imaml.errors import InputError

_GREETING = b"imaml train\n"
_WORD = 4
_FAREWELL = b"\xff" * _WORD
_ANSWER_SECONDS = 10.0
"""For which process 0 waits for the next word of one who has called."""


class LivenessMonitor:
    """Watches the lines to other processes until it is closed.

    Args:
        lines: by the number of the process at the other end: on process 0 all others, elsewhere process 0.
        on_loss: called in a thread of its own, once, with the number of the first process that went without a farewell.
    """

    def __init__(self, lines: dict[int, socket.socket], on_loss: Callable[[int], None]):
        self._lines, self._on_loss, self._leaving = lines, on_loss, False
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self, *, well: bool) -> None:
        """Hang up: with a farewell where all is ``well``, without one where the others shall stop too."""
        self._leaving = True
        for line in self._lines.values():
            if well:
                _say(line, _FAREWELL)
            _hang_up(line)

    def _watch(self):
        with ExitStack() as opened:
            selector = opened.enter_context(selectors.DefaultSelector())
            for process, line in self._lines.items():
                selector.register(opened.enter_context(line), selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    word = _heard(self._lines[key.data])
                    if word == _FAREWELL:
                        selector.unregister(key.fileobj)
                    elif self._leaving:
                        return
                    else:
                        return self._report(int.from_bytes(word) if word else key.data)

    def _report(self, lost):
        for process, line in self._lines.items():
            if process != lost:
                _say(line, lost.to_bytes(_WORD))
        self._on_loss(lost)


def accept_connections(port: int, processes: int, seconds: float) -> dict[int, socket.socket]:
    """On process 0: the lines of processes 1 to ``processes`` − 1, once all have called at ``port``.

    Raises:
        InputError: where the port is taken, some do not call within so many seconds, or they do not fit together.
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
                raise InputError(f"processes {missing} have not called at port {port} in {seconds:.0f} s") from None
            opened.enter_context(line).settimeout(_ANSWER_SECONDS)
            if _heard(line, len(_GREETING)) != _GREETING:  # a stranger
                line.close()
                continue
            caller, of = (int.from_bytes(_heard(line)) for _ in range(2))
            if of != processes or caller not in missing:
                raise InputError(f"a process {caller} of {of} has called, where {missing} of {processes} were missing")
            lines[caller] = line
        server.close()
        opened.pop_all()  # the lines stay
    return lines


def connect(host: str, port: int, process: int, processes: int, seconds: float) -> dict[int, socket.socket]:
    """On another process: its line to process 0, who waits for it at ``port`` of ``host``, or soon will.

    Raises:
        InputError: where it cannot be reached within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            line = socket.create_connection((host, port), max(deadline - time.monotonic(), 0.01))
            break
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > deadline:
                raise InputError(f"process 0 does not answer at port {port} of {host}: {error}") from error
            time.sleep(0.2)  # it may start later than this one
    line.settimeout(seconds)
    line.sendall(_GREETING + process.to_bytes(_WORD) + processes.to_bytes(_WORD))
    return {0: line}


def send_number(lines: dict[int, socket.socket], number: int) -> None:
    """From process 0 to all others, before the :class:`LivenessMonitor` starts."""
    for line in lines.values():
        _say(line, number.to_bytes(_WORD))


def receive_number(lines: dict[int, socket.socket]) -> int:
    """What process 0 has sent.

    Raises:
        InputError: where it has hung up instead.
    """
    word = _heard(lines[0])
    if not word:
        raise InputError("process 0 has gone before all had met: its own output says why")
    return int.from_bytes(word)


def free_port() -> int:
    """One on which nobody listens now."""
    with _server(0) as server:
        return server.getsockname()[1]


def _server(port):
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise InputError(f"process 0 cannot listen at port {port}: {error.strerror}") from error


def _heard(line, size=_WORD) -> bytes:
    """The next bytes, or none where the line is dead."""
    try:
        return line.recv(size, socket.MSG_WAITALL)
    except OSError:
        return b""


def _say(line, word):
    try:
        line.sendall(word)
    except OSError:
        return  # that one is gone as well


def _hang_up(line):
    try:
        line.shutdown(socket.SHUT_RDWR)  # at once, though the watching thread still holds it
    except OSError:
        return
