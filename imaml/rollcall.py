"""Who of several processes is still there: each holds a line to process 0, and the kernel drops it when one dies.

A collective that waits for a process that is gone either fails without a name or waits for ever. A line that breaks
says at once who it was, whatever killed it. What keeps its line and does nothing (a stopped process, a host without
power) is found by the heartbeats of JAX's own runtime instead.
"""

import hmac
import secrets
import selectors
import socket
import threading
from collections.abc import Callable

TOKEN_BYTES = 16
_WORD = 4
_FAREWELL = b"\xff" * _WORD


class RollCall:
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
        with selectors.DefaultSelector() as selector:
            for process, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, process)
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


class Listener:
    """Where process 0 waits for the others' lines.

    Attributes:
        port: chosen by the kernel, on all interfaces.
        token: what a caller must know, so that a stranger is not taken for a process.
    """

    def __init__(self):
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self.port: int = self._server.getsockname()[1]
        self.token = secrets.token_bytes(TOKEN_BYTES)

    def lines(self, processes: int, seconds: float) -> dict[int, socket.socket]:
        """The lines of processes 1 to ``processes`` − 1, once all have called.

        Raises:
            TimeoutError: where nobody calls for so many seconds.
        """
        lines: dict[int, socket.socket] = {}
        self._server.settimeout(seconds)
        with self._server:
            while len(lines) < processes - 1:
                line, _ = self._server.accept()
                line.settimeout(seconds)
                token, caller = _heard(line, TOKEN_BYTES), _heard(line)
                if hmac.compare_digest(token, self.token):
                    lines[int.from_bytes(caller)] = line
                else:
                    line.close()
        return lines


def call(host: str, port: int, token: bytes, process: int, seconds: float) -> dict[int, socket.socket]:
    """The line of ``process`` to process 0, whose listener is at ``host`` and ``port``.

    Raises:
        OSError: where it cannot be reached within so many seconds.
    """
    line = socket.create_connection((host, port), seconds)
    line.sendall(token + process.to_bytes(_WORD))
    return {0: line}


def _heard(line, size=_WORD):
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
