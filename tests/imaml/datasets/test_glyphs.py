"""The glyphs dataset is legible, split without overlap, about as hard as Omniglot, and reproducible bit for bit."""

import subprocess
import sys
import time
import unicodedata
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest

from imaml import InputError
from imaml.datasets import glyph_fonts, glyphs
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.storage import arrays

EPISODES, QUERIES = 600, 5
# Accuracy of nearest neighbours on Omniglot's pixels by (ways, shots), measured once. The accuracy on Glyphs may differ
# from the one on Omniglot by up to TOLERANCE.
OMNIGLOT_ACCURACY = {(5, 1): 0.43, (5, 5): 0.65, (20, 1): 0.24}
TOLERANCE = 0.04


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A dataset that was drawn and one that was read from the cache, the seconds for each, and the cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAML_CACHE", str(folder))
        start = time.perf_counter()
        dataset = glyphs.load()
        drawing = time.perf_counter() - start
        start = time.perf_counter()
        again = glyphs.load()
        reading = time.perf_counter() - start
    return SimpleNamespace(dataset=dataset, again=again, drawing=drawing, reading=reading, folder=folder)


@pytest.fixture(scope="module")
def dataset(loaded):
    return loaded.dataset


@pytest.fixture(scope="module")
def fonts():
    return glyph_fonts._fonts()


def characters_of(labels, fonts):
    by_label = {character.label: character for character in glyph_fonts._characters(fonts)}
    return [by_label[label] for label in labels]


def scripts(classes):
    return {label.split("/")[0] for label in classes.labels}


def neighbour_accuracy(classes: ImageClasses, ways: int, shots: int) -> float:
    """Return the accuracy of labelling each query image as its nearest support image, by Euclidean pixel distance."""
    random = np.random.default_rng(0)
    pixels = classes.pixels.reshape(len(classes), classes.samples, -1).astype(np.float32) / 255
    hits = 0.0
    for _ in range(EPISODES):
        chosen = random.choice(len(classes), ways, replace=False)[:, None]
        samples = np.stack([random.choice(classes.samples, shots + QUERIES, replace=False) for _ in range(ways)])
        episode = pixels[chosen, samples]
        support = episode[:, :shots].reshape(ways * shots, -1)
        query = episode[:, shots:].reshape(ways * QUERIES, -1)
        distance = (support**2).sum(1) - 2 * query @ support.T
        hits += np.mean(distance.argmin(1) // shots == np.repeat(np.arange(ways), QUERIES))
    return hits / EPISODES


def test_there_are_at_least_1800_classes_and_20_to_30_percent_are_test_classes(dataset):
    train, test = len(dataset.train), len(dataset.test)
    assert train + test >= 1800
    assert 0.2 <= test / (train + test) <= 0.3


@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_are_grey_bytes_and_labels_are_sorted(dataset, split):
    classes = getattr(dataset, split)
    assert classes.pixels.shape == (len(classes), 20, 28, 28, 1)
    assert classes.pixels.dtype == np.uint8
    assert list(classes.labels) == sorted(classes.labels)
    assert dataset.name == "glyphs"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_picture_shows_ink_and_none_is_cut_off(dataset, split):
    pixels = getattr(dataset, split).pixels[..., 0]
    ink = np.count_nonzero(pixels > 127, axis=(2, 3))
    assert ink.min() >= 12  # as many as a stroke six pixels long and two wide
    assert ink.max() < 28 * 28 / 2
    assert not pixels[:, :, [0, -1]].any() and not pixels[:, :, :, [0, -1]].any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_strokes_are_about_two_pixels_wide(dataset, split):
    pixels = getattr(dataset, split).pixels[:, :5, ..., 0].astype(float) / 255
    edges = np.abs(np.diff(pixels, axis=2)).sum((2, 3)) + np.abs(np.diff(pixels, axis=3)).sum((2, 3))
    # A stroke of length L, width b and angle t has area L b. The differences at its two edges sum to
    # 2 L (|cos t| + |sin t|). The mean of |cos t| + |sin t| over t is 4/pi.
    width = pixels.sum((2, 3)) / (edges / (2 * 4 / np.pi))
    assert 1.5 < np.median(width) < 2.5


def test_samples_of_a_class_differ(dataset):
    assert all(len({sample.tobytes() for sample in samples}) == len(samples) for samples in dataset.test.pixels)


def test_no_script_is_in_both_splits_and_no_script_dominates_the_test_split(dataset):
    assert not scripts(dataset.train) & scripts(dataset.test)
    assert not set(dataset.train.labels) & set(dataset.test.labels)
    assert scripts(dataset.test) == set(glyph_fonts.TEST_SCRIPTS)
    largest = max(sum(label.startswith(script) for label in dataset.test.labels) for script in scripts(dataset.test))
    assert largest < len(dataset.test) / 2


@pytest.mark.slow("compares all pairs of classes")
def test_no_two_classes_look_alike_even_across_the_split(dataset, fonts):
    characters = characters_of(dataset.train.labels + dataset.test.labels, fonts)
    fields = glyph_fonts.fields_of(glyph_fonts.skeletons_of(fonts, characters))
    alike = glyph_fonts._alike(glyph_fonts._views(fields, characters), glyph_fonts._held_out(characters))
    np.testing.assert_array_equal(alike, np.eye(len(characters), dtype=bool))


@pytest.mark.parametrize(
    "pair",
    [
        ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA"),
        ("LATIN CAPITAL LETTER A", "CYRILLIC CAPITAL LETTER A"),
        ("LATIN CAPITAL LETTER H", "CYRILLIC CAPITAL LETTER EN"),
        ("LATIN SMALL LETTER O", "DIGIT ZERO"),
        ("LATIN CAPITAL LETTER I", "LATIN SMALL LETTER L"),
        ("LATIN SMALL LETTER O WITH MACRON", "LATIN SMALL LETTER O WITH TILDE"),
    ],
)
def test_of_two_characters_that_look_alike_at_most_one_is_a_class(dataset, pair):
    codes = {int(label.split("U+")[1], 16) for label in dataset.train.labels + dataset.test.labels}
    assert len({ord(unicodedata.lookup(name)) for name in pair} & codes) <= 1


@pytest.mark.slow("draws the whole dataset and classifies 600 episodes")
@pytest.mark.parametrize("ways, shots", OMNIGLOT_ACCURACY)
def test_pixel_nearest_neighbours_are_as_accurate_as_on_omniglot(dataset, ways, shots):
    accuracy = neighbour_accuracy(dataset.test, ways, shots)
    assert accuracy == pytest.approx(OMNIGLOT_ACCURACY[ways, shots], abs=TOLERANCE)


same_matplotlib = pytest.mark.skipif(
    version("matplotlib") != glyph_fonts.MATPLOTLIB,
    reason=f"the glyphs were rendered with matplotlib {glyph_fonts.MATPLOTLIB}",
)


def test_the_dataset_is_the_one_that_existing_checkpoints_were_trained_on(dataset):
    assert dataset.fingerprint() == glyphs.FINGERPRINT
    assert len(dataset.train) == glyphs.TRAIN_CLASSES and glyphs.FILE.stat().st_size < 600_000


@same_matplotlib
def test_a_subset_of_the_classes_has_the_pixels_that_matplotlib_renders(dataset, fonts):
    chosen = slice(0, None, 40)
    characters = characters_of(dataset.test.labels[chosen], fonts)
    fields = glyph_fonts.fields_of(glyph_fonts.skeletons_of(fonts, characters))
    codes = [character.code for character in characters]
    pictures = glyphs._pictures(fields, glyph_fonts.faces_of(characters), codes)
    np.testing.assert_array_equal(pictures, dataset.test.pixels[chosen])


@same_matplotlib
@pytest.mark.slow("renders all characters in all fonts")
def test_the_file_holds_what_matplotlib_renders():
    rendered, kept = glyph_fonts.render(), arrays.read(glyphs.FILE)
    assert set(rendered) == set(kept)
    for name, array in rendered.items():
        np.testing.assert_array_equal(array, kept[name])


def test_a_damaged_file_is_refused_and_other_pixels_are_reported(dataset, tmp_path, monkeypatch, fresh_cache):
    content = bytearray(glyphs.FILE.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged = tmp_path / "glyphs.npz"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=r"a file of this package, cannot be read .*: reinstall the package"):
        glyphs.draw_file(damaged)
    drawn = dataset.dictionary()
    drawn["train_pixels"] = drawn["train_pixels"].copy()
    drawn["train_pixels"][0, 0, 14, 14] ^= 1
    monkeypatch.setattr(glyphs, "draw_file", lambda: drawn)
    with pytest.warns(UserWarning, match="are not those of other machines"):
        glyphs.load()


def test_second_load_is_the_same_and_at_least_five_times_faster(loaded):
    assert loaded.again.fingerprint() == loaded.dataset.fingerprint()
    assert loaded.reading < loaded.drawing / 5


def test_the_shape_of_the_training_classes_is_known_before_they_are_drawn(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAML_CACHE", str(tmp_path))
    monkeypatch.setattr(glyphs, "draw_file", lambda: pytest.fail("the glyphs were drawn"))

    def meanwhile(expected):
        assert expected.pixels.shape == dataset.train.pixels.shape and not expected.pixels.any()
        raise Reached

    with pytest.raises(Reached):
        glyphs.load(meanwhile)


class Reached(Exception):
    """Raised to end `load` when it calls ``meanwhile``, before drawing."""


def test_a_damaged_cache_is_drawn_again(dataset, tmp_path, monkeypatch):
    rendered, announced = [], []

    def draw_few():
        rendered.append(True)
        splits = {"train": dataset.train, "test": dataset.test}
        pixels = {f"{name}_pixels": classes.pixels[:3] for name, classes in splits.items()}
        return pixels | {f"{name}_labels": np.array(classes.labels[:3]) for name, classes in splits.items()}

    monkeypatch.setenv("IMAML_CACHE", str(tmp_path))
    monkeypatch.setattr(glyphs, "draw_file", draw_few)
    monkeypatch.setattr(glyphs, "FINGERPRINT", ImageDataset.from_dictionary("glyphs", draw_few()).fingerprint())
    rendered.clear()
    undamaged = glyphs.load().fingerprint()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert [glyphs.load(announced.append).fingerprint() for _ in range(2)] == [undamaged, undamaged]
    assert len(rendered) == 2  # by the first load and after the damage; the third load reads the repaired cache
    assert len(announced) == 1  # by the second load; a load from the cache does not call `meanwhile`


def test_import_does_not_load_matplotlib():
    code = "import sys, imaml.datasets.glyphs; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
