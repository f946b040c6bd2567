"""SIGINT and SIGTERM as a request to end the step, save, and go."""

import contextlib
import signal
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
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def note(number, frame):
        request.received = signal.Signals(number)
        for watched_number, handler in before.items():
            signal.signal(watched_number, handler)
        with contextlib.suppress(RuntimeError):  # what prints may not, where the signal came amid another print
            on_request()

    for number in watched:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
