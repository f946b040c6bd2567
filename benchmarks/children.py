"""Child processes of benchmarks. They read requests from stdin and write answers to stdout, one JSON line for each."""

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Missing(RuntimeError):
    """Error for a process that cannot be started or has ended, or for a missing record; the message has the reason."""


class Child:
    """A process that answers requests. As a context manager, this object ends the process when the block ends.

    Args:
        name: name of the process in error messages.
        command: the program and its arguments, started in the root of the repository.
        environment: environment variables that are added to those of the calling process.
    """

    def __init__(self, name: str, command: Sequence[str | os.PathLike[str]], environment: Mapping[str, str]):
        self._name = name
        self._child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            bufsize=1,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # close() flushes, which fails if the process has ended
            self._child.stdin.close()
        self._child.stdout.close()
        try:
            self._child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def answer(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            Missing: if the process has ended.
        """
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise Missing(f"{self._name} ended with status {self._child.wait()}; its error output is above")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            Missing: if the process has ended.
        """
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended, so answer() raises Missing
            print(json.dumps(request), file=self._child.stdin, flush=True)
        return self.answer()
