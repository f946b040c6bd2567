"""SIGINT and SIGTERM as a request to end the step, save, and go."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """The signal that asked to stop, or None."""

    received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None


@contextmanager
def stop_on_signals(on_request: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """While inside, the first SIGINT or SIGTERM is noted; a second one acts as it would have without this.

    Args:
        on_request: called when the first one comes.
    """
    request = StopRequest()
    before = _handlers(signal.SIGINT, signal.SIGTERM)

    def note(number, frame):
        request.received = signal.Signals(number)
        for watched, handler in before.items():
            signal.signal(watched, handler)
        with contextlib.suppress(RuntimeError):  # what prints may not, where the signal came amid another print
            on_request()

    with _handled_by(note, before):
        yield request


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """While inside, SIGTERM unwinds the stack as SIGINT does, so that nothing half-written is left; exit code 143."""

    def leave(number, frame):
        sys.exit(128 + number)

    with _handled_by(leave, _handlers(signal.SIGTERM)):
        yield


def _handlers(*numbers):
    return {number: signal.getsignal(number) for number in numbers}


@contextmanager
def _handled_by(handler, before):
    """While inside, ``handler`` stands in for those of ``before``."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
