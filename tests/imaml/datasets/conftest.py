"""A fixture of the tests of Omniglot: small archives that replace the official ones."""

from pathlib import Path

import pytest
from archives import EVALUATION_ALPHABETS, TRAIN_CHARACTERS, Tiny, expected

from imaml.datasets import omniglot, omniglot_alphabets


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> Tiny:
    """A folder with small archives that both splits of Omniglot accept as the official ones, and an empty cache."""
    folder = Tiny(tmp_path / "data")
    monkeypatch.setattr(omniglot, "ARCHIVES", expected(folder.members))
    monkeypatch.setattr(omniglot, "TRAIN_CHARACTERS", TRAIN_CHARACTERS)
    monkeypatch.setattr(omniglot_alphabets, "EVALUATION_ALPHABETS", EVALUATION_ALPHABETS)
    return folder
