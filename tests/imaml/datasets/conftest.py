"""A fixture of the tests of Omniglot: small archives that replace the official ones."""

from pathlib import Path

import pytest
from archives import TRAIN_CHARACTERS, Tiny, expected

from imaml.datasets import omniglot


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> Tiny:
    """A folder with small archives that :func:`.omniglot.load` accepts as the official ones, and an empty cache."""
    folder = Tiny(tmp_path / "data")
    monkeypatch.setattr(omniglot, "ARCHIVES", expected(folder.members))
    monkeypatch.setattr(omniglot, "TRAIN_CHARACTERS", TRAIN_CHARACTERS)
    return folder
