"""Small archives in Omniglot's layout for tests of damaged input, and a function that damages bytes at random.

The two archives hold 3 and 2 characters of random drawings. Their content hashes are computed here from the pixels that
Pillow decodes. With these hashes the loader runs all its checks on the small archives, within milliseconds.
"""

import hashlib
import io
import random
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from imaml.datasets import omniglot

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
# The labels of the second archive sort first, so a loader that concatenates without sorting fails the tests.
LABELS = {
    BACKGROUND: ["Mu/character01", "Mu/character02", "Nu_(x)/character01"],
    EVALUATION: ["Alpha_b/character01", "Gamma/character01"],
}
EVALUATION_ALPHABETS = frozenset({"Alpha_b", "Gamma"})
"""The alphabets in the second archive, with which tests replace ``omniglot_alphabets.EVALUATION_ALPHABETS``."""
Members = dict[str, bytes]


def png(pixels: np.ndarray, mode: str = "1") -> bytes:
    """Return ``pixels``, an array ``[height, width]`` of zeros and 255s, as a PNG in Pillow's ``mode``."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("L").convert(mode, dither=Image.Dither.NONE).save(stream, "PNG")
    return stream.getvalue()


def drawings(folder: str) -> Members:
    """Return the PNG files of an archive by member path: for each label, twenty drawings of random square blocks."""
    generator = np.random.default_rng(len(folder) + len(LABELS[folder]))
    members = {}
    for number, label in enumerate(LABELS[folder], start=1):
        for drawing in range(1, 21):
            blocks = generator.random((15, 15)) < 0.7
            pixels = np.kron(blocks, np.ones((7, 7), bool)).astype(np.uint8) * 255
            members[f"{folder}/{label}/{number:04d}_{drawing:02d}.png"] = png(pixels)
    return members


def content_hash(members: Members) -> str:
    """Return the hash of member paths and decoded pixels, as the loader computes it."""
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(name.encode() + b"\n" + Image.open(io.BytesIO(members[name])).convert("L").tobytes())
    return digest.hexdigest()


def pack(path: Path, members: Members, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """Write ``members`` to a zip archive at ``path``."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def expected(members: dict[str, Members]) -> tuple[omniglot._Archive, ...]:
    """Return the records of the small archives, with which tests replace ``omniglot.ARCHIVES``."""
    return tuple(omniglot._Archive(name, len(LABELS[name]), content_hash(members[name])) for name in LABELS)


TRAIN_CHARACTERS = 3
"""Number of training characters among the five, with which tests replace the official 1,200."""


class Tiny:
    """A folder with both small archives, and methods that change their members."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.members = {folder: drawings(folder) for folder in LABELS}
        directory.mkdir()
        for folder in LABELS:
            self.pack(folder)

    def path(self, folder: str = EVALUATION) -> Path:
        return self.directory / f"{folder}.zip"

    def pack(self, folder: str = EVALUATION, **options) -> None:
        pack(self.path(folder), self.members[folder], **options)

    def name(self, index: int = 7) -> str:
        return list(self.members[EVALUATION])[index]

    def replace(self, content: bytes) -> None:
        self.members[EVALUATION][self.name()] = content
        self.pack()

    def append(self, info: str | zipfile.ZipInfo, content: bytes = b"x", folder: str = EVALUATION) -> None:
        with zipfile.ZipFile(self.path(folder), "a") as archive:
            archive.writestr(info, content)


def damage(content: bytes, source: random.Random, start: int, end: int) -> bytes:
    """Return ``content`` with one random fault that begins between ``start`` and ``end``.

    The fault is a flipped bit, some bytes that are removed, zeroed or replaced by random ones, or a truncation.
    """
    at = source.randrange(start, end)
    until = min(at + source.choice([1, 4, 50, 1000]), end)
    kind = source.choice(["flip", "flip", "cut", "zero", "truncate", "random"])
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << source.randrange(8)]) + content[at + 1 :]
    if kind == "truncate":
        return content[:at]
    filling = {"cut": b"", "zero": bytes(until - at), "random": source.randbytes(until - at)}[kind]
    return content[:at] + filling + content[until:]
