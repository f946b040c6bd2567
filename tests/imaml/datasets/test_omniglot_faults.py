"""Faults of Omniglot's archives, each tested on a small archive in the same layout (tests/archives.py)."""

import os
import random
import stat
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from archives import BACKGROUND, EVALUATION, LABELS, Tiny, damage, pack, png

from imaml.datasets import omniglot
from imaml.errors import InputError


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a PNG chunk of type ``kind`` with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int) -> bytes:
    """Return the IHDR chunk of a picture with one bit per pixel."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))


def refusal(directory: Path, cache: Path) -> str:
    """Check that loading raises an InputError of one line and leaves no file in ``cache``. Return the message."""
    with pytest.raises(InputError) as caught:
        omniglot.load(directory)
    assert not cache.exists() or not list(cache.iterdir())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# --- Faults of the folder and of the files -------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path, fresh_cache: Path):
    message = refusal(tmp_path / "nowhere", fresh_cache)
    assert str(tmp_path / "nowhere") in message and "--data" in message
    assert "images_background.zip" in message and "images_evaluation.zip" in message


def test_file_instead_of_the_folder(tiny: Tiny, fresh_cache: Path):
    assert "no such folder" in refusal(tiny.path(), fresh_cache)


@pytest.mark.parametrize("folder", LABELS)
def test_missing_archive(folder: str, tiny: Tiny, fresh_cache: Path):
    tiny.path(folder).unlink()
    assert f"does not hold the file {folder}.zip; name the one that holds" in refusal(tiny.directory, fresh_cache)


def test_folder_instead_of_an_archive(tiny: Tiny, fresh_cache: Path):
    tiny.path().unlink()
    tiny.path().mkdir()
    assert "does not hold the file images_evaluation.zip" in refusal(tiny.directory, fresh_cache)


def test_unreadable_archive(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, mode: str):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert "images_background.zip: cannot be read (Input/output error)" in refusal(tiny.directory, fresh_cache)


def test_archive_too_large(tiny: Tiny, fresh_cache: Path):
    os.truncate(tiny.path(), 40_000_000)  # a sparse file
    assert "images_evaluation.zip: larger than" in refusal(tiny.directory, fresh_cache)


def test_missing_pillow(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in refusal(tiny.directory, fresh_cache)


@pytest.mark.parametrize("kept", [0, 1, 10, -1, -30, "half"])
def test_truncated_archive(kept: int | str, tiny: Tiny, fresh_cache: Path):
    content = tiny.path().read_bytes()
    tiny.path().write_bytes(content[: len(content) // 2 if kept == "half" else kept])  # type: ignore[misc]
    assert f"{tiny.path()}: truncated, damaged or not a zip" in refusal(tiny.directory, fresh_cache)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><title>404</title>", b"PK\x05\x06" + bytes(17), bytes(1000)])
def test_not_a_zip(content: bytes, tiny: Tiny, fresh_cache: Path):
    tiny.path().write_bytes(content)
    assert f"{tiny.path()}: truncated, damaged or not a zip" in refusal(tiny.directory, fresh_cache)


# --- Faults of the container ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up.png", f"{EVALUATION}/../../up.png", "..\\up.png", "\\up.png", "__MACOSX/../../up"]
)
def test_member_outside_of_the_folder(name: str, tiny: Tiny, fresh_cache: Path):
    tiny.append(name)
    message = refusal(tiny.directory, fresh_cache)
    assert f"{tiny.path()}: member {name!r} points outside the archive's folder" in message


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
@pytest.mark.parametrize("name", ["Gamma/character01/0002_20.png", "__MACOSX/link", "Gamma/"])
def test_link_or_device(name: str, kind: int, tiny: Tiny, fresh_cache: Path):
    link = zipfile.ZipInfo(f"{EVALUATION}/{name}")
    link.external_attr = (kind | 0o777) << 16
    tiny.members[EVALUATION].pop(link.filename, None)
    tiny.pack()
    tiny.append(link, b"/etc/passwd")
    message = refusal(tiny.directory, fresh_cache)
    assert f"{tiny.path()}: member {link.filename!r} is a symbolic link or device" in message


def test_a_bomb_that_declares_its_size(tiny: Tiny, fresh_cache: Path):
    tiny.replace(bytes(10_000_000))
    message = refusal(tiny.directory, fresh_cache)
    assert str(tiny.path()) in message and repr(tiny.name()) in message and "declares 10,000,000 bytes" in message


def test_a_bomb_that_declares_a_small_size(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.replace(bytes(10_000_000))
    size = struct.pack("<I", 10_000_000)
    content = tiny.path().read_bytes()
    assert content.count(size) == 2  # once in the member's local header and once in the zip's central directory
    tiny.path().write_bytes(content.replace(size, struct.pack("<I", 500)))
    assert f"{tiny.path()}: member {tiny.name()!r} is damaged" in refusal(tiny.directory, fresh_cache)


def test_members_too_large_in_total(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(omniglot, "_MAX_TOTAL_BYTES", 4000)
    assert "its members declare" in refusal(tiny.directory, fresh_cache)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression(method: int, tiny: Tiny, fresh_cache: Path):
    tiny.pack(compression=method)
    message = refusal(tiny.directory, fresh_cache)
    assert str(tiny.path()) in message and "neither stored nor deflated" in message


def test_encrypted_member(tiny: Tiny, fresh_cache: Path):
    content = bytearray(tiny.path().read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    tiny.path().write_bytes(content)
    assert f"{tiny.path()}: member {tiny.name(0)!r} is damaged or encrypted" in refusal(tiny.directory, fresh_cache)


@pytest.mark.parametrize(
    "name", ["readme.txt", f"{EVALUATION}/Gamma/notes.png", f"{BACKGROUND}/Alpha/character01/0001_01.png", "x" * 60_000]
)
def test_unexpected_member(name: str, tiny: Tiny, fresh_cache: Path):
    tiny.append(name)
    message = refusal(tiny.directory, fresh_cache)
    assert f"{tiny.path()}: unexpected member '{name[:90]}" in message


def test_archives_with_swapped_names(tiny: Tiny, fresh_cache: Path):
    one, other = (tiny.path(folder).read_bytes() for folder in LABELS)
    tiny.path(BACKGROUND).write_bytes(other)
    tiny.path(EVALUATION).write_bytes(one)
    assert f"{tiny.path(BACKGROUND)}: unexpected member" in refusal(tiny.directory, fresh_cache)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(tiny: Tiny, fresh_cache: Path):
    tiny.append(tiny.name())
    assert f"{tiny.path()}: member {tiny.name()!r} occurs twice" in refusal(tiny.directory, fresh_cache)


@pytest.mark.parametrize("folder", LABELS)
def test_character_missing_or_too_many(folder: str, tiny: Tiny, fresh_cache: Path):
    label, count = LABELS[folder][-1], len(LABELS[folder])
    kept = {name: content for name, content in tiny.members[folder].items() if f"/{label}/" not in name}
    copied = {f"{folder}/Omega/character09/0009_{n:02d}.png": content for n, content in enumerate(kept.values())}
    for members, got in ((kept, count - 1), (tiny.members[folder] | copied, count + 1)):
        pack(tiny.path(folder), members)
        message = refusal(tiny.directory, fresh_cache)
        assert f"{tiny.path(folder)}: {got} characters instead of {count}" in message


def test_drawing_missing_or_too_many(tiny: Tiny, fresh_cache: Path):
    content = tiny.members[EVALUATION].pop(tiny.name())
    tiny.pack()
    assert f"{tiny.path()}: 19 drawings of 'Alpha_b/character01' instead" in refusal(tiny.directory, fresh_cache)
    for number in (30, 31):
        tiny.members[EVALUATION][f"{EVALUATION}/Alpha_b/character01/0001_{number}.png"] = content
    tiny.pack()
    assert f"{tiny.path()}: 21 drawings of 'Alpha_b/character01' instead" in refusal(tiny.directory, fresh_cache)


# --- Faults of a drawing in an intact container --------------------------------------------------------------------

BODY = chunk(b"IDAT", zlib.compress(bytes(15 * 105)))
SIGNATURE, END = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")


TEXT_BOMB = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000)))
START = SIGNATURE + header(105, 105)
FAULTY = {
    "small": (png(np.zeros((28, 28), np.uint8)), "28 x 28 pixels instead of 105 x 105"),
    "narrow": (png(np.zeros((105, 104), np.uint8)), "104 x 105 pixels instead"),
    "huge": (SIGNATURE + header(50_000, 50_000) + BODY + END, "50000 x 50000 pixels instead"),
    "second-header": (START + header(9_000, 9_000) + BODY + END, "9000 x 9000 pixels instead"),
    "huge-second-header": (START + header(60_000, 60_000) + BODY + END, "cannot be decoded"),
    "late-header": (START + BODY + header(9_000, 9_000) + END, "content hash"),
    "text-bomb": (START + TEXT_BOMB + BODY + END, "cannot be decoded"),
    "cut-body": (START + BODY[:-9] + END, "cannot be decoded"),
    "short-body": (START + chunk(b"IDAT", zlib.compress(bytes(100))) + END, "cannot be decoded"),
    "no-body": (START + END, "cannot be decoded"),
    "header-alone": (START, "cannot be decoded"),
    "header-checksum": (START[:-1] + b"x" + BODY + END, "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
    "gif": (b"GIF89a" + bytes(100), "is not a PNG"),
    "shifted": (b"BM" + START + BODY + END, "is not a PNG"),
    "other-pixels": (START + BODY + END, "content hash"),
}


@pytest.mark.parametrize(("content", "expected"), FAULTY.values(), ids=FAULTY)
def test_faulty_drawing(content: bytes, expected: str, tiny: Tiny, fresh_cache: Path):
    tiny.replace(content)
    message = refusal(tiny.directory, fresh_cache)
    assert str(tiny.path()) in message and expected in message
    assert repr(tiny.name()) in message or expected == "content hash"


def test_swapped_drawings(tiny: Tiny, fresh_cache: Path):
    members = tiny.members[EVALUATION]
    first, second = tiny.name(0), tiny.name(1)
    members[first], members[second] = members[second], members[first]
    tiny.pack()
    assert f"{tiny.path()}: its drawings are not Omniglot's" in refusal(tiny.directory, fresh_cache)


def test_a_renamed_alphabet(tiny: Tiny, fresh_cache: Path):
    members = tiny.members[EVALUATION]
    tiny.members[EVALUATION] = {name.replace("Gamma", "Delta"): content for name, content in members.items()}
    tiny.pack()
    assert f"{tiny.path()}: its drawings are not Omniglot's" in refusal(tiny.directory, fresh_cache)


# --- Random damage -------------------------------------------------------------------------------------------------


def refused_or_unchanged(tiny: Tiny, fresh_cache: Path, fingerprint: str) -> bool:
    """Load the archives, and return True if they are refused.

    If loading raises InputError, check that the message names the archive and that the cache is unchanged, and return
    True. Otherwise check the fingerprint of the data and return False.
    """
    before = sorted(fresh_cache.iterdir())
    try:
        data = omniglot.load(tiny.directory)
    except InputError as error:
        assert str(tiny.path()) in str(error)
        assert sorted(fresh_cache.iterdir()) == before
        return True
    assert data.fingerprint() == fingerprint
    return False


def test_random_damage_to_the_archive(tiny: Tiny, fresh_cache: Path):
    fingerprint, source = omniglot.load(tiny.directory).fingerprint(), random.Random(5)
    content = tiny.path().read_bytes()
    central_directory = content.index(b"PK\x01\x02")
    regions = [(0, central_directory), (central_directory, len(content)), (len(content) - 40, len(content))]
    outcomes = []
    for trial in range(150):
        tiny.path().write_bytes(damage(content, source, *regions[trial % len(regions)]))
        outcomes.append(refused_or_unchanged(tiny, fresh_cache, fingerprint))
    assert 75 < sum(outcomes) < 150  # some bytes, such as those of dates, do not affect the data


def test_random_damage_to_a_drawing(tiny: Tiny, fresh_cache: Path):
    fingerprint, source = omniglot.load(tiny.directory).fingerprint(), random.Random(6)
    content = tiny.members[EVALUATION][tiny.name()]
    for _ in range(100):
        tiny.replace(damage(content, source, 0, len(content)))
        refused_or_unchanged(tiny, fresh_cache, fingerprint)
