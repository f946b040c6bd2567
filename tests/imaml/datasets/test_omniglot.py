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
from archives import BACKGROUND, EVALUATION, LABELS, Tiny, damage, pack, png
from PIL import Image

import imaml
from imaml import cli, datasets
from imaml.datasets import omniglot, omniglot_alphabets
from imaml.errors import InputError
from imaml.reproduction import records

# Fingerprints of both splits, recorded when the official archives were first read. Every checkpoint stores the
# fingerprint, so a change would make all existing checkpoints unusable.
REAL_FINGERPRINT = "9f484b36f34d756483889625cdd4b58c397a838c3c6b0a676449fc4b56636daa"
ALPHABETS_FINGERPRINT = "682c676522fcb2503c07d0cd1d82d93f2df6b28af45d1bc1c3ba6040d163c957"


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


# --- The split by whole alphabets ----------------------------------------------------------------------------------


def alphabets(labels: tuple[str, ...]) -> set[str]:
    return {label.split("/")[0] for label in labels}


@pytest.mark.slow("decodes the real archives")
def test_the_official_archives_are_the_parts_of_the_split_by_alphabets(
    real, omniglot_directory: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(omniglot, "_decode", lambda *_: pytest.fail("decoded again"))
    data = datasets.load("omniglot-alphabets", omniglot_directory)
    assert data.name == "omniglot-alphabets" and isinstance(data, imaml.ImageDataset)
    assert data.train.pixels.shape == (964, 20, 28, 28, 1) and data.train.pixels.dtype == np.uint8
    assert data.test.pixels.shape == (659, 20, 28, 28, 1) and data.test.pixels.dtype == np.uint8
    assert (len(alphabets(data.train.labels)), len(alphabets(data.test.labels))) == (30, 20)
    assert not alphabets(data.train.labels) & alphabets(data.test.labels)
    assert {*data.train.labels, *data.test.labels} == {*real.train.labels, *real.test.labels}
    assert data.fingerprint() == ALPHABETS_FINGERPRINT
    # docs/reproducing.md states these numbers.
    assert len({*data.test.labels} & {*real.train.labels}) == 493
    assert len({*data.train.labels} & {*real.test.labels}) == 257


def test_the_listed_evaluation_alphabets_are_those_of_the_official_archive(omniglot_directory: Path):
    found = {}
    for folder in (BACKGROUND, EVALUATION):
        with zipfile.ZipFile(omniglot_directory / f"{folder}.zip") as archive:
            names = [name for name in archive.namelist() if name.endswith(".png")]
        found[folder] = {name.split("/")[1] for name in names}
    assert found[EVALUATION] == omniglot_alphabets.EVALUATION_ALPHABETS
    assert len(found[BACKGROUND]) == 30 and not found[BACKGROUND] & found[EVALUATION]


def test_each_archive_is_a_part_of_the_split_by_alphabets(tiny: Tiny):
    data, pooled = omniglot_alphabets.load(tiny.directory), omniglot.load(tiny.directory)
    assert list(data.train.labels) == sorted(LABELS[BACKGROUND])
    assert list(data.test.labels) == sorted(LABELS[EVALUATION])
    drawn = {}
    for classes in (pooled.train, pooled.test):
        drawn.update(zip(classes.labels, classes.pixels, strict=True))
    for classes in (data.train, data.test):
        assert all(np.array_equal(drawn[label], x) for label, x in zip(classes.labels, classes.pixels, strict=True))
    assert data.fingerprint() != pooled.fingerprint()


@pytest.mark.parametrize("first, second", [(omniglot, omniglot_alphabets), (omniglot_alphabets, omniglot)])
def test_both_splits_share_one_cache_entry(first, second, tiny: Tiny, fresh_cache: Path, monkeypatch):
    expected = second.load(tiny.directory).fingerprint()
    for entry in fresh_cache.iterdir():
        entry.unlink()
    first.load(tiny.directory)
    monkeypatch.setattr(omniglot, "_decode", lambda *_: pytest.fail("decoded again"))
    assert second.load(tiny.directory).fingerprint() == expected
    assert len(list(fresh_cache.iterdir())) == 1


def test_the_blank_classes_are_as_many_as_the_characters_of_the_background_alphabets(tiny: Tiny, monkeypatch):
    monkeypatch.setattr(omniglot, "TRAIN_CHARACTERS", 4)  # not the number in the first archive, which is 3
    announced: list[omniglot.ImageClasses] = []
    loaded = datasets.load("omniglot-alphabets", tiny.directory, announced.append)
    assert [classes.pixels.shape for classes in announced] == [loaded.train.pixels.shape] == [(3, 20, 28, 28, 1)]


def test_both_splits_read_the_folder_of_the_downloaded_archives(tiny: Tiny, fresh_cache: Path):
    with pytest.raises(InputError, match="omniglot-alphabets needs Omniglot's two official archives"):
        datasets.load("omniglot-alphabets")
    fresh_cache.mkdir(exist_ok=True)
    tiny.directory.rename(omniglot.default_directory())
    assert datasets.load("omniglot-alphabets").name == "omniglot-alphabets"
    assert datasets.load("omniglot").name == "omniglot"


TINY_RUN = (
    "--episode.ways 2 --network.filters 2 --inner.max_steps 1 --linear.max_steps 1 --outer.tasks 2 --outer.queries 1 "
    "--meta-steps 1"
)


@pytest.mark.slow("trains and evaluates a convolutional network")
def test_the_command_line_trains_evaluates_reports_and_records_on_the_split_by_alphabets(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    monkeypatch.chdir(tmp_path)
    data, preset = ["--data", str(tiny.directory)], "omniglot-5way-1shot-gd"
    assert cli.main(["train", preset, "--dataset", "omniglot-alphabets", *data, *TINY_RUN.split()]) == 0
    run = Path("runs") / f"{preset}-omniglot-alphabets"
    assert f"on omniglot-alphabets, in {run}" in capsys.readouterr().out
    assert imaml.load(run).preset.dataset == "omniglot-alphabets"
    for command in (["evaluate", "--tasks", "4"], ["diagnose", "--tasks", "4"], ["report", "--tasks", "4"]):
        assert cli.main([command[0], str(run), *command[1:], *data]) == 0
    assert "on omniglot-alphabets" in (run / "report.html").read_text()
    assert cli.main(["record", str(run)]) == 0
    assert "for the table of omniglot-alphabets that 'imaml reproduce table2' prints" in capsys.readouterr().out
    (record,) = records.read(Path("records"))
    assert record.cell is None
    assert record.split == omniglot_alphabets.load(tiny.directory).fingerprint()
    capsys.readouterr()
    # The run is neither resumed nor evaluated on the other split.
    assert cli.main(["train", preset, *data, *TINY_RUN.split(), "--out", str(run)]) == 2
    assert "dataset: omniglot-alphabets → omniglot" in capsys.readouterr().err
    with pytest.raises(InputError, match="was trained on omniglot-alphabets, and omniglot splits the same characters"):
        imaml.evaluate(run, data=tiny.directory, dataset="omniglot", tasks=4)


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
