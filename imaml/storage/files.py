"""Atomic file writes, and a lock that lets one process at a time write to a folder.

A write goes to a temporary file in the same folder. That file is flushed to disk and renamed to the final name, and
then the folder is flushed. After a crash, a kill or a power failure, the path holds either the complete old file or
the complete new one. A killed process may leave its temporary file behind; :func:`sweep` removes such files.
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
    """Create or replace the file at ``path`` atomically.

    Args:
        path: the file to create or to replace.
        write: called with an open binary stream; writes the contents of the file to that stream.

    Raises:
        OSError: if the file cannot be written, for example because the disk is full. An existing file at ``path`` is
            then unchanged, unless the error comes from the flush of the folder, which follows the rename.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.imaml-tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # report the original error, not one from the clean-up
            temporary.unlink(missing_ok=True)
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush the complete file ``temporary`` to disk and rename it to ``path`` atomically.

    Both paths must be on one file system. Once this function has returned, the new name survives a power failure.

    Raises:
        OSError: if flushing or renaming fails.
    """
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
    """Remove the temporary files of :func:`write_whole` that killed processes left in ``directory``.

    Args:
        directory: the folder to clean. Its subfolders are not searched.
        older_than: minimum age in seconds since the last write to a file. Use 0 only while this process holds the
            folder's lock (:func:`alone_in`). Otherwise a file that another process is writing may be removed.
    """
    for path in directory.iterdir():
        with contextlib.suppress(OSError):  # the file may be gone already, and a leftover file does no harm
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime >= older_than:
                path.unlink()


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``directory`` during the ``with`` block. Writers take the lock; readers need none.

    The lock is an ``flock`` on the file ``lock``, which is never removed. The kernel releases an ``flock`` when
    its process ends, even after SIGKILL.

    Args:
        directory: the folder to lock, which must exist.

    Raises:
        InputError: if the lock is held already. The message names the holder's process and host, if known.
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
    except (ValueError, KeyError, TypeError):  # the holder has not yet written its process id
        return "another process"
