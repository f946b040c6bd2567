"""Files that are there whole or not at all, and folders that one process at a time may write to.

What is written goes under another name first, is flushed, takes its place in one step, and the folder is flushed:
after a crash, a kill or a loss of power there is the old file or the new one. What a killed process left under such
another name is swept by the next one.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from imaml.errors import InputError

LOCK = "lock"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.imaml-tmp", re.DOTALL)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make or replace the file at ``path`` by what ``write`` puts into the stream that it is called with.

    Raises:
        OSError: where the disk is full or the folder cannot be written; the old file, if any, stands.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.imaml-tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file that is complete its name, in one step that survives a loss of power."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(directory: Path, older_than: float = 0.0) -> None:
    """Remove what killed processes left in ``directory`` under the names that :func:`write_whole` gives.

    Args:
        directory: only this folder, nothing below it.
        older_than: seconds for which nothing was written to it. 0 is for who holds the folder's lock.
    """
    for path in directory.iterdir():
        with contextlib.suppress(OSError):  # another process swept it; what cannot be removed harms nothing
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime >= older_than:
                path.unlink()


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """While inside, no other process gets in: for whoever writes to ``directory``; to read it nobody needs this.

    The lock is the kernel's (``flock`` on a file that stays): it ends with the process, however that ends.

    Raises:
        InputError: where another one is inside, with its process and host.
    """
    with (directory / LOCK).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory} is in use by {_holder(stream)}: wait for it, or stop it") from None
        stream.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, stream)
        stream.flush()
        yield


def _holder(stream):
    try:
        stream.seek(0)
        holder = json.load(stream)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has taken the lock and not yet said who it is
        return "another process"
