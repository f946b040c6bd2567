"""Handlers by which SIGINT and SIGTERM request a stop after the current meta-step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """Record of the signal that requested a stop. The truth value of the record is whether there was such a signal.

    Attributes:
        received: the signal, or None if there was none.
    """

    received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None


@contextmanager
def stop_on_signals(on_request: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """Record the first SIGINT or SIGTERM inside the context, and let the program go on.

    A second signal acts as it would have without this context. In threads other than the main one, where Python allows
    no handlers, the context does nothing.

    Args:
        on_request: called inside the handler of the first signal.
    """
    request = StopRequest()
    before = _handlers(signal.SIGINT, signal.SIGTERM)

    def note(number, frame):
        request.received = signal.Signals(number)
        for watched, handler in before.items():
            signal.signal(watched, handler)
        # Printing in a handler raises RuntimeError if the signal interrupted another print to the same stream.
        with contextlib.suppress(RuntimeError):
            on_request()

    with _handled_by(note, before):
        yield request


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit with code 143 inside the context, so that cleanup code removes temporary files.

    In threads other than the main one the context does nothing.
    """

    def leave(number, frame):
        sys.exit(128 + number)

    with _handled_by(leave, _handlers(signal.SIGTERM)):
        yield


def _handlers(*numbers):
    return {number: signal.getsignal(number) for number in numbers}


@contextmanager
def _handled_by(handler, before):
    """Handle the signals of ``before`` by ``handler`` inside the context, then restore the handlers in ``before``."""
    # Python sets signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
