"""Atomic writes, removal of leftover temporary files, and the lock of a folder."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from imaml.errors import InputError
from imaml.storage import files
from imaml.storage.files import alone_in, sweep, write_whole

PACKAGE = Path(__file__).resolve().parents[3] / "imaml"
# Child processes use an empty package in place of imaml/__init__.py, so that they import little and start fast.
PRELUDE = f"""
import os, signal, sys, types
from pathlib import Path
package = types.ModuleType("imaml")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["imaml"] = package
from imaml.storage.files import alone_in, write_whole
"""


def writer_of(content):
    return lambda stream: stream.write(content)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_created_and_replaced(tmp_path):
    for content in (b"first", b"second, which is longer", b""):
        write_whole(tmp_path / "file", writer_of(content))
        assert (tmp_path / "file").read_bytes() == content
        assert names(tmp_path) == ["file"]


def test_file_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", writer_of(b"x"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_the_contents_are_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else handle)
        fsync(handle)

    def recorded_replace(source, target):
        calls.append(("replace", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", recorded_fsync)
    monkeypatch.setattr(files.os, "replace", recorded_replace)
    write_whole(tmp_path / "file", writer_of(b"x"))
    flushed, (_, source, target), folder = calls
    assert target == str(tmp_path / "file")
    if isinstance(flushed, str):
        assert (flushed, folder) == (source, str(tmp_path))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_system_call_leaves_only_the_old_file(function, tmp_path, monkeypatch):
    write_whole(tmp_path / "file", writer_of(b"old"))

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", writer_of(b"new"))
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143), RuntimeError])
def test_an_exception_during_the_write_leaves_only_the_old_file(stop, tmp_path):
    write_whole(tmp_path / "file", writer_of(b"old"))

    def half(stream):
        stream.write(b"ne")
        raise stop

    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        write_whole(tmp_path / "file", half)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_leaves_only_the_old_file(small_disk):
    write_whole(small_disk / "file", writer_of(b"old"))
    with pytest.raises(OSError) as caught:
        write_whole(small_disk / "file", writer_of(bytes(10_000_000)))
    assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == ["file"] and (small_disk / "file").read_bytes() == b"old"
    write_whole(small_disk / "file", writer_of(bytes(100_000)))  # the failed write has freed its space


def test_a_read_only_folder_keeps_the_old_file(sealed):
    with sealed({"file": b"old"}) as folder:
        with pytest.raises(OSError) as caught:
            write_whole(folder / "file", writer_of(b"new"))
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
        assert names(folder) == ["file"] and (folder / "file").read_bytes() == b"old"


def leftover_of_a_killed_write(directory):
    """Kill a process during a write to ``directory`` and return the temporary file that it leaves."""
    before = set(directory.iterdir())
    kill = 'write_whole(Path(sys.argv[1]) / "file", lambda stream: os.kill(os.getpid(), signal.SIGKILL))'
    done = subprocess.run([sys.executable, "-c", PRELUDE + kill, directory], check=False)
    assert done.returncode == -signal.SIGKILL
    (path,) = set(directory.iterdir()) - before
    return path


def test_sweep_removes_only_the_temporary_files_of_killed_writes(tmp_path):
    others = [".file", ".file.tmp", "file.imaml-tmp", ".file.0123.imaml-tmp", "file", ".imaml-tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below").mkdir()
    below = leftover_of_a_killed_write(tmp_path / "below")
    leftover_of_a_killed_write(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*others, "below"]) and below.exists()


def test_sweep_keeps_files_younger_than_the_given_age(tmp_path):
    path = leftover_of_a_killed_write(tmp_path)
    sweep(tmp_path, older_than=3600)
    assert path.exists()
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3601))
    sweep(tmp_path, older_than=3600)
    assert not path.exists()


HOLD = """
with alone_in(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "inside\n"
        yield process
        process.kill()


def test_the_error_names_the_holder_of_a_lock_and_killing_it_frees_the_folder(holder, tmp_path):
    message = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}: wait for it, or stop it"
    with pytest.raises(InputError, match=re.escape(message)), alone_in(tmp_path):
        pass
    holder.kill()  # SIGKILL: the process cannot release the lock itself
    holder.wait()
    with alone_in(tmp_path):
        pass


def test_a_lock_is_exclusive_within_a_process_and_released_on_exit(tmp_path):
    for _ in range(2):
        with alone_in(tmp_path):
            with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "), alone_in(tmp_path):
                pass
            # The failed attempt above has not released the lock.
            with pytest.raises(InputError, match="is in use"), alone_in(tmp_path):
                pass
    assert names(tmp_path) == [files.LOCK]


def test_a_lock_is_respected_before_its_holder_has_written_its_process_id(tmp_path):
    with alone_in(tmp_path):
        (tmp_path / files.LOCK).write_text("")
        with pytest.raises(InputError, match="in use by another process"), alone_in(tmp_path):
            pass
