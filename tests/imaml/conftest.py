"""What the tests of imaml share: where the real archives are, and a cache of one's own."""

import os
from pathlib import Path

import pytest

ARCHIVES = ("images_background.zip", "images_evaluation.zip")


@pytest.fixture(scope="session")
def omniglot_directory() -> Path:
    """The folder with Omniglot's two archives: ``$OMNIGLOT_DIR``, else ``../shared/omniglot``; skips without them."""
    candidates = [Path(__file__).resolve().parents[2].parent / "shared" / "omniglot"]
    if named := os.environ.get("OMNIGLOT_DIR"):
        candidates.insert(0, Path(named))
    for directory in candidates:
        if all((directory / name).is_file() for name in ARCHIVES):
            return directory
    pytest.skip(f"Omniglot's archives are neither in $OMNIGLOT_DIR nor in {candidates[-1]}")


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own, not created yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("IMAML_CACHE", str(directory))
    return directory
