"""Loading Omniglot from the official archives, and from small archives in the same layout (tests/archives.py)."""

import io
import os
import random
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives import BACKGROUND, EVALUATION, Tiny, damage, pack, png
from PIL import Image

from imaml.datasets import omniglot
from imaml.errors import InputError

# Fingerprint of the split, recorded when the official archives were first read. Every checkpoint stores the
# fingerprint, so a change would make all existing checkpoints unusable.
REAL_FINGERPRINT = "9f484b36f34d756483889625cdd4b58c397a838c3c6b0a676449fc4b56636daa"


# --- The official archives -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture
def real(omniglot_directory: Path, real_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMAML_CACHE", str(real_cache))
    return omniglot.load(omniglot_directory)


@pytest.mark.slow("decodes the real archives")
def test_official_archives_give_the_published_counts_and_the_recorded_split(real):
    assert real.name == "omniglot"
    assert real.train.pixels.shape == (1200, 20, 28, 28, 1) and real.train.pixels.dtype == np.uint8
    assert real.test.pixels.shape == (423, 20, 28, 28, 1) and real.test.pixels.dtype == np.uint8
    assert len({*real.train.labels, *real.test.labels}) == 1623
    assert len({label.split("/")[0] for label in (*real.train.labels, *real.test.labels)}) == 50
    assert real.fingerprint() == REAL_FINGERPRINT


def test_the_shape_of_the_training_classes_is_known_before_they_are_decoded(tiny: Tiny, fresh_cache: Path):
    announced: list[omniglot.ImageClasses] = []
    loaded = omniglot.load(tiny.directory, announced.append)
    assert [classes.pixels.shape for classes in announced] == [loaded.train.pixels.shape]
    omniglot.load(tiny.directory, announced.append)
    assert len(announced) == 1  # a load from the cache does not call `meanwhile`


@pytest.mark.slow("decodes the real archives")
def test_official_drawings_have_bright_ink_on_black(real):
    assert 10 < real.train.pixels.mean() < 40  # about 8 % of a drawing is ink
    assert np.median(real.test.pixels) == 0 and real.test.pixels.max() == 255


def test_a_second_load_takes_less_than_a_second_and_gives_the_same_data(real, omniglot_directory: Path):
    start = time.process_time()
    again = omniglot.load(omniglot_directory)
    assert time.process_time() - start < 1
    assert np.array_equal(again.train.pixels, real.train.pixels) and again.test.labels == real.test.labels


@pytest.mark.slow("decodes the real archives")
@pytest.mark.parametrize("part", ["train", "test"])
def test_official_pixels_equal_the_inverse_of_those_that_pillow_resizes(real, part: str, omniglot_directory: Path):
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


def test_an_official_archive_zipped_again_in_another_order_has_the_same_drawings(
    omniglot_directory: Path, tmp_path: Path
):
    path, official = tmp_path / "images_evaluation.zip", omniglot.ARCHIVES[1]
    original = omniglot._drawings(official, path, (omniglot_directory / path.name).read_bytes())
    names = random.Random(0).sample(list(original), len(original))
    pack(path, {name: original[name] for name in names}, zipfile.ZIP_STORED)
    assert omniglot._drawings(official, path, path.read_bytes()) == original


@pytest.mark.slow("damages copies of the real archives")
def test_a_damaged_official_archive_is_refused_or_has_the_same_drawings(omniglot_directory: Path):
    path, official = omniglot_directory / "images_evaluation.zip", omniglot.ARCHIVES[1]
    content, source = path.read_bytes(), random.Random(1)
    original = omniglot._drawings(official, path, content)
    central_directory = content.index(b"PK\x01\x02")
    regions = [(0, central_directory), (central_directory, len(content)), (len(content) - 100, len(content))]
    for trial in range(24):
        damaged = damage(content, source, *regions[trial % len(regions)])
        try:
            assert omniglot._drawings(official, path, damaged) == original
        except InputError as error:
            assert path.name in str(error)


# --- Differences that are accepted ---------------------------------------------------------------------------------


def shuffled(tiny: Tiny) -> None:
    names = random.Random(3).sample(list(tiny.members[EVALUATION]), 40)
    tiny.members[EVALUATION] = {name: tiny.members[EVALUATION][name] for name in names}
    tiny.pack()


def with_folders(tiny: Tiny) -> None:
    for name in (f"{EVALUATION}/", f"{EVALUATION}/Gamma/", f"{EVALUATION}/Gamma/character01/"):
        folder = zipfile.ZipInfo(name)
        folder.external_attr = (stat.S_IFDIR | 0o755) << 16
        tiny.append(folder, b"")


def with_files_of_file_managers(tiny: Tiny) -> None:
    for name in (f"__MACOSX/{EVALUATION}/._Gamma", f"{EVALUATION}/.DS_Store", ".DS_Store", f"{EVALUATION}/Thumbs.db"):
        tiny.append(name)


def in_grey(tiny: Tiny) -> None:
    for name, content in tiny.members[EVALUATION].items():
        tiny.members[EVALUATION][name] = png(np.asarray(Image.open(io.BytesIO(content)).convert("L")), "L")
    tiny.pack()


def with_comment(tiny: Tiny) -> None:
    with zipfile.ZipFile(tiny.path(), "a") as archive:
        archive.comment = b"from a mirror"


ACCEPTED: list[Callable[[Tiny], None]] = [
    shuffled,
    with_folders,
    with_files_of_file_managers,
    in_grey,
    with_comment,
    lambda tiny: tiny.pack(compression=zipfile.ZIP_STORED),
]


@pytest.mark.parametrize("copy", ACCEPTED)
def test_copies_that_differ_only_in_the_container_give_the_same_data(copy: Callable[[Tiny], None], tiny: Tiny):
    before, content = omniglot.load(tiny.directory), tiny.path().read_bytes()
    copy(tiny)
    assert tiny.path().read_bytes() != content
    assert omniglot.load(tiny.directory).fingerprint() == before.fingerprint()


def test_every_drawing_has_the_label_of_its_folder(tiny: Tiny):
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


def test_resizing_equals_pillows_bit_for_bit():
    images = np.random.default_rng(0).integers(0, 256, (50, 105, 105)).astype(np.uint8)
    images[::2] = np.where(images[::2] > 127, 255, 0)  # Lanczos overshoots 0 and 255 here, so clipping is tested
    expected = [np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.LANCZOS)) for image in images]
    assert np.array_equal(omniglot._shrink(images), np.stack(expected))


# --- The cache -----------------------------------------------------------------------------------------------------


def test_a_second_load_decodes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    first = omniglot.load(tiny.directory)
    monkeypatch.setattr(omniglot, "_decode", lambda *_: pytest.fail("decoded again"))
    assert omniglot.load(tiny.directory).fingerprint() == first.fingerprint()


def test_a_changed_archive_is_verified_again(tiny: Tiny):
    omniglot.load(tiny.directory)
    tiny.replace(png(np.zeros((105, 105), np.uint8)))
    with pytest.raises(InputError, match="content hash"):
        omniglot.load(tiny.directory)


def test_a_damaged_cache_is_decoded_again(tiny: Tiny, fresh_cache: Path):
    first = omniglot.load(tiny.directory)
    (entry,) = fresh_cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1000])
    assert omniglot.load(tiny.directory).fingerprint() == first.fingerprint()


def test_the_import_does_not_load_pillow():
    code = "import sys, imaml.datasets.omniglot; sys.exit('PIL' in sys.modules)"
    paths = os.pathsep.join(path for path in sys.path if path)
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}).returncode == 0
