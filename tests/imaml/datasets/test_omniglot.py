"""Omniglot's archives: the real ones once, and every fault on tiny ones of the same layout.

The tiny archives and random damage come from archives.py.
"""

import io
import os
import random
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives import BACKGROUND, EVALUATION, LABELS, TRAIN_CHARACTERS, Tiny, damage, expected, pack, png
from PIL import Image

from imaml.datasets import omniglot
from imaml.errors import InputError

# Of the split, its labels and pixels, as first read from the official archives. Another value is another
# data set: checkpoints made before would be refused.
REAL_FINGERPRINT = "9f484b36f34d756483889625cdd4b58c397a838c3c6b0a676449fc4b56636daa"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> Tiny:
    folder = Tiny(tmp_path / "data")
    monkeypatch.setattr(omniglot, "ARCHIVES", expected(folder.members))
    monkeypatch.setattr(omniglot, "TRAIN_CHARACTERS", TRAIN_CHARACTERS)
    return folder


def refused(directory: Path, cache: Path) -> str:
    """The one sentence of the refusal; nothing may have been cached."""
    with pytest.raises(InputError) as caught:
        omniglot.load(directory)
    assert not cache.exists() or not list(cache.iterdir())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# The real archives


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture
def real(omniglot_directory: Path, real_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMAML_CACHE", str(real_cache))
    return omniglot.load(omniglot_directory)


def test_real_archives_give_the_published_counts_and_the_recorded_split(real):
    assert real.name == "omniglot"
    assert real.train.pixels.shape == (1200, 20, 28, 28, 1) and real.train.pixels.dtype == np.uint8
    assert real.test.pixels.shape == (423, 20, 28, 28, 1) and real.test.pixels.dtype == np.uint8
    assert len({*real.train.labels, *real.test.labels}) == 1623
    assert len({label.split("/")[0] for label in (*real.train.labels, *real.test.labels)}) == 50
    assert real.fingerprint() == REAL_FINGERPRINT


def test_the_shape_of_the_training_classes_is_known_before_they_are_decoded(tiny: Tiny, fresh_cache: Path):
    told: list[omniglot.ImageClasses] = []
    loaded = omniglot.load(tiny.directory, told.append)
    assert [classes.pixels.shape for classes in told] == [loaded.train.pixels.shape]
    omniglot.load(tiny.directory, told.append)
    assert len(told) == 1  # from the cache, beside which there is no time for anything


def test_real_ink_is_bright_on_black(real):
    assert 10 < real.train.pixels.mean() < 40  # a few strokes: about 8 % of a drawing is ink
    assert np.median(real.test.pixels) == 0 and real.test.pixels.max() == 255


def test_second_load_is_fast_and_the_same(real, omniglot_directory: Path):
    start = time.process_time()
    again = omniglot.load(omniglot_directory)
    assert time.process_time() - start < 1
    assert np.array_equal(again.train.pixels, real.train.pixels) and again.test.labels == real.test.labels


@pytest.mark.parametrize("part", ["train", "test"])
def test_real_pixels_are_those_of_pillow_inverted(real, part: str, omniglot_directory: Path):
    classes = getattr(real, part)
    members = {}
    for folder in (BACKGROUND, EVALUATION):
        with zipfile.ZipFile(omniglot_directory / f"{folder}.zip") as archive:
            for index in range(0, 400, 40):
                label = classes.labels[index]
                names = sorted(name for name in archive.namelist() if f"/{label}/" in name)
                members.update({(index, sample): archive.read(name) for sample, name in enumerate(names)})
    assert len(members) == 200
    for (index, sample), content in members.items():
        grey = Image.open(io.BytesIO(content)).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
        assert np.array_equal(classes.pixels[index, sample, :, :, 0], 255 - np.asarray(grey))


def test_real_archive_zipped_anew_in_another_order_has_the_same_drawings(omniglot_directory: Path, tmp_path: Path):
    path, official = tmp_path / "images_evaluation.zip", omniglot.ARCHIVES[1]
    original = omniglot._drawings(official, path, (omniglot_directory / path.name).read_bytes())
    names = random.Random(0).sample(list(original), len(original))
    pack(path, {name: original[name] for name in names}, zipfile.ZIP_STORED)
    assert omniglot._drawings(official, path, path.read_bytes()) == original


def test_damaged_real_archive_is_refused_or_unharmed(omniglot_directory: Path):
    path, official = omniglot_directory / "images_evaluation.zip", omniglot.ARCHIVES[1]
    content, source = path.read_bytes(), random.Random(1)
    original = omniglot._drawings(official, path, content)
    directory = content.index(b"PK\x01\x02")
    regions = [(0, directory), (directory, len(content)), (len(content) - 100, len(content))]
    for trial in range(24):
        damaged = damage(content, source, *regions[trial % len(regions)])
        try:
            assert omniglot._drawings(official, path, damaged) == original
        except InputError as error:
            assert path.name in str(error)


# What may differ between honest copies


def shuffled(tiny: Tiny) -> None:
    names = random.Random(3).sample(list(tiny.members[EVALUATION]), 40)
    tiny.members[EVALUATION] = {name: tiny.members[EVALUATION][name] for name in names}
    tiny.pack()


def with_folders(tiny: Tiny) -> None:
    for name in (f"{EVALUATION}/", f"{EVALUATION}/Gamma/", f"{EVALUATION}/Gamma/character01/"):
        folder = zipfile.ZipInfo(name)
        folder.external_attr = (stat.S_IFDIR | 0o755) << 16
        tiny.append(folder, b"")


def with_litter(tiny: Tiny) -> None:
    for name in (f"__MACOSX/{EVALUATION}/._Gamma", f"{EVALUATION}/.DS_Store", ".DS_Store", f"{EVALUATION}/Thumbs.db"):
        tiny.append(name)


def in_grey(tiny: Tiny) -> None:
    for name, content in tiny.members[EVALUATION].items():
        tiny.members[EVALUATION][name] = png(np.asarray(Image.open(io.BytesIO(content)).convert("L")), "L")
    tiny.pack()


def with_comment(tiny: Tiny) -> None:
    with zipfile.ZipFile(tiny.path(), "a") as archive:
        archive.comment = b"from a mirror"


HONEST: list[Callable[[Tiny], None]] = [
    shuffled,
    with_folders,
    with_litter,
    in_grey,
    with_comment,
    lambda tiny: tiny.pack(compression=zipfile.ZIP_STORED),
]


@pytest.mark.parametrize("copy", HONEST)
def test_copies_that_differ_in_the_container_alone_are_the_same_data(copy: Callable[[Tiny], None], tiny: Tiny):
    before, content = omniglot.load(tiny.directory), tiny.path().read_bytes()
    copy(tiny)
    assert tiny.path().read_bytes() != content
    assert omniglot.load(tiny.directory).fingerprint() == before.fingerprint()


def test_every_drawing_is_under_its_label(tiny: Tiny):
    data = omniglot.load(tiny.directory)
    assert len(data.train) == 3 and len(data.test) == 2
    members = tiny.members[BACKGROUND] | tiny.members[EVALUATION]
    for classes in (data.train, data.test):
        assert list(classes.labels) == sorted(classes.labels)
        for label, pixels in zip(classes.labels, classes.pixels, strict=True):
            names = sorted(name for name in members if f"/{label}/" in name)
            for name, shrunk in zip(names, pixels, strict=True):
                grey = Image.open(io.BytesIO(members[name])).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
                assert np.array_equal(shrunk[..., 0], 255 - np.asarray(grey))


def test_shrinking_is_pillows_bit_for_bit():
    images = np.random.default_rng(0).integers(0, 256, (50, 105, 105)).astype(np.uint8)
    images[::2] = np.where(images[::2] > 127, 255, 0)  # overshoots on both sides, so clipping is tried too
    expected = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.LANCZOS)) for image in images]
    assert np.array_equal(omniglot._shrink(images), np.stack(expected))


# The cache


def test_second_load_decodes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    first = omniglot.load(tiny.directory)
    monkeypatch.setattr(omniglot, "_decode", lambda *_: pytest.fail("decoded again"))
    assert omniglot.load(tiny.directory).fingerprint() == first.fingerprint()


def test_changed_archive_is_looked_at_anew(tiny: Tiny):
    omniglot.load(tiny.directory)
    tiny.replace(png(np.zeros((105, 105), np.uint8)))
    with pytest.raises(InputError, match="content hash"):
        omniglot.load(tiny.directory)


def test_damaged_cache_is_made_anew(tiny: Tiny, fresh_cache: Path):
    first = omniglot.load(tiny.directory)
    (entry,) = fresh_cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1000])
    assert omniglot.load(tiny.directory).fingerprint() == first.fingerprint()


def test_import_needs_no_pillow():
    code = "import sys, imaml.datasets.omniglot; sys.exit('PIL' in sys.modules)"
    paths = os.pathsep.join(path for path in sys.path if path)
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}).returncode == 0


# Faults of the folder and of the files


def test_missing_folder(tmp_path: Path, fresh_cache: Path):
    message = refused(tmp_path / "nowhere", fresh_cache)
    assert str(tmp_path / "nowhere") in message and "--data" in message
    assert "images_background.zip" in message and "images_evaluation.zip" in message


def test_file_instead_of_the_folder(tiny: Tiny, fresh_cache: Path):
    assert "no such folder" in refused(tiny.path(), fresh_cache)


@pytest.mark.parametrize("folder", LABELS)
def test_missing_archive(folder: str, tiny: Tiny, fresh_cache: Path):
    tiny.path(folder).unlink()
    assert f"does not hold the file {folder}.zip; name the one that holds" in refused(tiny.directory, fresh_cache)


def test_folder_instead_of_an_archive(tiny: Tiny, fresh_cache: Path):
    tiny.path().unlink()
    tiny.path().mkdir()
    assert "does not hold the file images_evaluation.zip" in refused(tiny.directory, fresh_cache)


def test_unreadable_archive(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, mode: str):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert "images_background.zip: cannot be read (Input/output error)" in refused(tiny.directory, fresh_cache)


def test_archive_too_large(tiny: Tiny, fresh_cache: Path):
    os.truncate(tiny.path(), 40_000_000)  # sparse
    assert "images_evaluation.zip: larger than" in refused(tiny.directory, fresh_cache)


def test_missing_pillow(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in refused(tiny.directory, fresh_cache)


@pytest.mark.parametrize("kept", [0, 1, 10, -1, -30, "half"])
def test_truncated_archive(kept: int | str, tiny: Tiny, fresh_cache: Path):
    content = tiny.path().read_bytes()
    tiny.path().write_bytes(content[: len(content) // 2 if kept == "half" else kept])  # type: ignore[misc]
    assert f"{tiny.path()}: truncated, damaged or not a zip" in refused(tiny.directory, fresh_cache)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><title>404</title>", b"PK\x05\x06" + bytes(17), bytes(1000)])
def test_not_a_zip(content: bytes, tiny: Tiny, fresh_cache: Path):
    tiny.path().write_bytes(content)
    assert f"{tiny.path()}: truncated, damaged or not a zip" in refused(tiny.directory, fresh_cache)


# Faults of the container


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up.png", f"{EVALUATION}/../../up.png", "..\\up.png", "\\up.png", "__MACOSX/../../up"]
)
def test_member_outside_of_the_folder(name: str, tiny: Tiny, fresh_cache: Path):
    tiny.append(name)
    message = refused(tiny.directory, fresh_cache)
    assert f"{tiny.path()}: member {name!r} points outside of its folder" in message


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
@pytest.mark.parametrize("name", ["Gamma/character01/0002_20.png", "__MACOSX/link", "Gamma/"])
def test_link_or_device(name: str, kind: int, tiny: Tiny, fresh_cache: Path):
    link = zipfile.ZipInfo(f"{EVALUATION}/{name}")
    link.external_attr = (kind | 0o777) << 16
    tiny.members[EVALUATION].pop(link.filename, None)
    tiny.pack()
    tiny.append(link, b"/etc/passwd")
    message = refused(tiny.directory, fresh_cache)
    assert f"{tiny.path()}: member {link.filename!r} is a symbolic link or device" in message


def test_declared_bomb(tiny: Tiny, fresh_cache: Path):
    tiny.replace(bytes(10_000_000))
    message = refused(tiny.directory, fresh_cache)
    assert str(tiny.path()) in message and repr(tiny.name()) in message and "declares 10,000,000 bytes" in message


def test_bomb_that_declares_less(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.replace(bytes(10_000_000))
    size = struct.pack("<I", 10_000_000)
    content = tiny.path().read_bytes()
    assert content.count(size) == 2  # local header and directory
    tiny.path().write_bytes(content.replace(size, struct.pack("<I", 500)))
    assert f"{tiny.path()}: member {tiny.name()!r} is damaged" in refused(tiny.directory, fresh_cache)


def test_total_size(tiny: Tiny, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(omniglot, "_MOST_TOTAL_BYTES", 4000)
    assert "its members declare" in refused(tiny.directory, fresh_cache)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression(method: int, tiny: Tiny, fresh_cache: Path):
    tiny.pack(compression=method)
    message = refused(tiny.directory, fresh_cache)
    assert str(tiny.path()) in message and "neither stored nor deflated" in message


def test_encrypted_member(tiny: Tiny, fresh_cache: Path):
    content = bytearray(tiny.path().read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    tiny.path().write_bytes(content)
    assert f"{tiny.path()}: member {tiny.name(0)!r} is damaged or encrypted" in refused(tiny.directory, fresh_cache)


@pytest.mark.parametrize(
    "name", ["readme.txt", f"{EVALUATION}/Gamma/notes.png", f"{BACKGROUND}/Alpha/character01/0001_01.png", "x" * 60_000]
)
def test_unexpected_member(name: str, tiny: Tiny, fresh_cache: Path):
    tiny.append(name)
    message = refused(tiny.directory, fresh_cache)
    assert f"{tiny.path()}: unexpected member '{name[:90]}" in message


def test_archives_that_changed_places(tiny: Tiny, fresh_cache: Path):
    one, other = (tiny.path(folder).read_bytes() for folder in LABELS)
    tiny.path(BACKGROUND).write_bytes(other)
    tiny.path(EVALUATION).write_bytes(one)
    assert f"{tiny.path(BACKGROUND)}: unexpected member" in refused(tiny.directory, fresh_cache)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(tiny: Tiny, fresh_cache: Path):
    tiny.append(tiny.name())
    assert f"{tiny.path()}: member {tiny.name()!r} is there twice" in refused(tiny.directory, fresh_cache)


@pytest.mark.parametrize("folder", LABELS)
def test_character_missing_or_too_many(folder: str, tiny: Tiny, fresh_cache: Path):
    label, count = LABELS[folder][-1], len(LABELS[folder])
    kept = {name: content for name, content in tiny.members[folder].items() if f"/{label}/" not in name}
    copied = {f"{folder}/Omega/character09/0009_{n:02d}.png": content for n, content in enumerate(kept.values())}
    for members, got in ((kept, count - 1), (tiny.members[folder] | copied, count + 1)):
        pack(tiny.path(folder), members)
        message = refused(tiny.directory, fresh_cache)
        assert f"{tiny.path(folder)}: {got} characters instead of {count}" in message


def test_drawing_missing_or_too_many(tiny: Tiny, fresh_cache: Path):
    content = tiny.members[EVALUATION].pop(tiny.name())
    tiny.pack()
    assert f"{tiny.path()}: 19 drawings of 'Alpha_b/character01' instead" in refused(tiny.directory, fresh_cache)
    for number in (30, 31):
        tiny.members[EVALUATION][f"{EVALUATION}/Alpha_b/character01/0001_{number}.png"] = content
    tiny.pack()
    assert f"{tiny.path()}: 21 drawings of 'Alpha_b/character01' instead" in refused(tiny.directory, fresh_cache)


# Faults of a drawing, in containers that are in order

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
    "other-ink": (START + BODY + END, "content hash"),
}


@pytest.mark.parametrize(("content", "expected"), FAULTY.values(), ids=FAULTY)
def test_faulty_drawing(content: bytes, expected: str, tiny: Tiny, fresh_cache: Path):
    tiny.replace(content)
    message = refused(tiny.directory, fresh_cache)
    assert str(tiny.path()) in message and expected in message
    assert repr(tiny.name()) in message or expected == "content hash"


def test_other_drawings_of_the_right_form(tiny: Tiny, fresh_cache: Path):
    members = tiny.members[EVALUATION]
    first, second = tiny.name(0), tiny.name(1)
    members[first], members[second] = members[second], members[first]
    tiny.pack()
    assert f"{tiny.path()}: its drawings are not Omniglot's" in refused(tiny.directory, fresh_cache)


def test_other_names_of_the_right_form(tiny: Tiny, fresh_cache: Path):
    members = tiny.members[EVALUATION]
    tiny.members[EVALUATION] = {name.replace("Gamma", "Delta"): content for name, content in members.items()}
    tiny.pack()
    assert f"{tiny.path()}: its drawings are not Omniglot's" in refused(tiny.directory, fresh_cache)


# Random damage


def refused_or_unharmed(tiny: Tiny, fresh_cache: Path, fingerprint: str) -> bool:
    """Whether it was refused; if so, nothing new was cached."""
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
    directory = content.index(b"PK\x01\x02")
    regions = [(0, directory), (directory, len(content)), (len(content) - 40, len(content))]
    outcomes = []
    for trial in range(150):
        tiny.path().write_bytes(damage(content, source, *regions[trial % len(regions)]))
        outcomes.append(refused_or_unharmed(tiny, fresh_cache, fingerprint))
    assert 75 < sum(outcomes) < 150  # a date, say, may be flipped without harm


def test_random_damage_to_a_drawing(tiny: Tiny, fresh_cache: Path):
    fingerprint, source = omniglot.load(tiny.directory).fingerprint(), random.Random(6)
    content = tiny.members[EVALUATION][tiny.name()]
    for _ in range(100):
        tiny.replace(damage(content, source, 0, len(content)))
        refused_or_unharmed(tiny, fresh_cache, fingerprint)
