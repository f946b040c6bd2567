"""Fixtures of the tests of imaml: Omniglot's archives, an empty cache, a small disk and a read-only folder."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

ARCHIVES = ("images_background.zip", "images_evaluation.zip")


@pytest.fixture(scope="session")
def omniglot_directory() -> Path:
    """The folder with Omniglot's two archives: ``$OMNIGLOT_DIR`` if it has both, else ``shared/omniglot`` next to the
    repository.

    The test is skipped if neither folder has both archives.
    """
    candidates = [Path(__file__).resolve().parents[2].parent / "shared" / "omniglot"]
    if named := os.environ.get("OMNIGLOT_DIR"):
        candidates.insert(0, Path(named))
    for directory in candidates:
        if all((directory / name).is_file() for name in ARCHIVES):
            return directory
    pytest.skip(f"Omniglot's archives are neither in $OMNIGLOT_DIR nor in {candidates[-1]}")


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a cache folder for one test. The folder does not exist yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("IMAML_CACHE", str(directory))
    return directory


def mount(*words: str | Path) -> None:
    """Run ``mount`` with the arguments ``words``. Skip the test if that fails: in general, only root may mount."""
    try:
        done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mount failed: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 512 KiB. The test is skipped if the file system cannot be mounted."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=512k", "none", folder)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def sealed(tmp_path: Path) -> Callable[[dict[str, bytes]], AbstractContextManager[Path]]:
    """A context manager ``sealed(contents)`` that yields a read-only folder with the files ``{name: bytes}``."""

    def seal_by_permissions(folder):
        folder.chmod(0o555)
        return lambda: folder.chmod(0o755)

    def seal_by_mount(folder):  # permissions do not restrict root
        mount("--bind", folder, folder)
        mount("-o", "remount,bind,ro", folder)
        return lambda: subprocess.run(["umount", str(folder)], check=True)

    @contextmanager
    def seal(contents):
        folder = tmp_path / "sealed"
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        undo = (seal_by_permissions if os.geteuid() else seal_by_mount)(folder)
        try:
            yield folder
        finally:
            undo()

    return seal
