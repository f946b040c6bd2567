"""Images of one's own, from folders or arrays: reading, the split by class, and tasks from classes of unequal size."""

import hashlib
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

import imaml
from imaml import ImageDataset, InputError, datasets
from imaml.datasets import ImageClasses, UnevenClasses
from imaml.datasets.uneven import UnevenSource
from imaml.learning.tasks import Episode

HALVES = {"train": ["a", "b"], "test": ["c", "d"]}


def save(path, pixels, mode=None):
    """Write an array as an image file; the folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def cards(tmp_path):
    """A folder of classes a, b, c and d with 3, 4, 5 and 6 images of 28×28 pixels, each in one grey of its own."""
    for index, label in enumerate("abcd"):
        for number in range(3 + index):
            save(tmp_path / "cards" / label / f"{number}.png", np.full((28, 28), 40 * index + number))
    return tmp_path / "cards"


def greys(classes):
    """Map each class to the list of the greys of its images. Every image has only one grey."""
    flat = classes.pixels[:, 0, 0, 0].tolist()
    ends = np.cumsum(classes.counts).tolist()
    starts = [0, *ends[:-1]]
    return {label: flat[a:b] for label, a, b in zip(classes.labels, starts, ends, strict=True)}


# --- Folders -------------------------------------------------------------------------------------------------------


def test_a_folder_of_uneven_classes_is_read_with_its_labels_and_order(cards):
    data = ImageDataset.from_folder(cards, split=HALVES)
    assert data.name == "cards" and data.validation is None
    assert greys(data.train) == {"a": [0, 1, 2], "b": [40, 41, 42, 43]}
    assert greys(data.test) == {"c": list(range(80, 85)), "d": list(range(120, 126))}
    assert data.train.image_shape == (28, 28, 1) and (data.train.samples, data.test.samples) == (3, 5)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("train", "validation", "test"), ("train", "test")])
def test_subfolders_with_the_names_of_the_parts_are_the_split(names, tmp_path):
    for part in names:
        for label in ("x", "y"):
            save(tmp_path / part / f"{part}-{label}" / "0.png", np.zeros((5, 9)))
    data = ImageDataset.from_folder(tmp_path)
    assert data.train.labels == ("train-x", "train-y") and data.test.labels == ("test-x", "test-y")
    assert (data.validation is None) == (len(names) == 2)
    if data.validation is not None:
        assert data.validation.labels == (f"{names[1]}-x", f"{names[1]}-y")
    with pytest.raises(InputError, match="its subfolders are the split"):
        ImageDataset.from_folder(tmp_path, split=(0.5, 0, 0.5))


def test_two_folders_for_one_part_are_refused_unless_they_are_classes(tmp_path):
    for part in ("train", "val", "validation", "test"):
        for label in ("x", "y"):
            save(tmp_path / part / label / "0.png", np.zeros((5, 9)))
            save(tmp_path / part / f"{label}.png", np.zeros((5, 9)))
    with pytest.raises(InputError, match="val and validation are the same part: keep one of the folders"):
        ImageDataset.from_folder(tmp_path)
    save(tmp_path / "plane" / "0.png", np.zeros((5, 9)))  # now these are five classes
    data = ImageDataset.from_folder(tmp_path, split=(0.4, 0, 0.6))
    assert {"val", "validation"} < {*data.train.labels, *data.test.labels}


def test_a_class_called_train_next_to_other_classes_is_a_class(tmp_path):
    for label in ("train", "test", "plane"):
        save(tmp_path / label / "0.png", np.zeros((5, 9)))
    data = ImageDataset.from_folder(tmp_path, split=(0.5, 0, 0.5))
    assert sorted(data.train.labels + data.test.labels) == ["plane", "test", "train"]


def one(folder, pixels, name="0.png", mode=None, **options):
    """Write the pixels to an image file of the first of two classes, and return the array that is read from it."""
    save(folder / "a" / name, pixels, mode)
    save(folder / "b" / "0.png", np.zeros((9, 9)))
    return ImageDataset.from_folder(folder, split={"train": ["a"], "test": ["b"]}, **options).train.pixels[0]


def test_images_that_are_not_square_are_cropped_padded_or_stretched(tmp_path):
    wide = np.zeros((8, 24), np.uint8)  # white in the middle third
    wide[:, 8:16] = 255
    assert (one(tmp_path, wide, size=8) == 255).all()
    padded = one(tmp_path, wide, size=24, fit="pad")[..., 0]
    assert padded[:8].max() == 0 and padded[16:].max() == 0 and (padded[8:16] == wide).all()
    stretched = one(tmp_path, wide, size=24, fit="stretch")[..., 0]
    assert (stretched[:, 10:14] > 250).all() and (stretched[:, :6] < 5).all() and (stretched[:, 18:] < 5).all()


def test_inverted_paper_and_its_margin_are_0(tmp_path):
    drawing = np.full((10, 20), 255, np.uint8)
    drawing[4:6, 9:11] = 0
    pixels = one(tmp_path, drawing, size=20, fit="pad", invert=True)[..., 0]
    assert pixels[:5].max() == 0 and pixels[9:11, 9:11].min() == 255 and pixels[15:].max() == 0


def test_grey_is_the_luma_of_colour_and_colour_keeps_its_channels(tmp_path):
    colour = np.broadcast_to(np.array([200, 100, 50], np.uint8), (6, 6, 3))
    assert one(tmp_path, colour, size=6, channels=3)[2, 3].tolist() == [200, 100, 50]
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)  # ITU-R 601
    assert abs(int(one(tmp_path, colour, size=6)[2, 3, 0]) - luma) <= 1
    assert one(tmp_path, np.full((6, 6), 70), size=6, channels=3)[0, 0].tolist() == [70, 70, 70]


def test_transparent_pixels_are_white_and_16_bits_are_scaled(tmp_path):
    rgba = np.zeros((6, 6, 4), np.uint8)
    rgba[:, :3, 3] = 255  # black on the left, transparent on the right
    pixels = one(tmp_path, rgba, size=6)[..., 0]
    assert pixels[:, :3].max() == 0 and pixels[:, 3:].min() == 255
    Image.fromarray(np.full((6, 6), 257 * 90, np.uint16)).save(tmp_path / "a" / "0.png")
    assert (ImageDataset.from_folder(tmp_path, 6, split={"train": ["a"], "test": ["b"]}).train.pixels[0] == 90).all()


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: turned clockwise by 90°, the picture is upright
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png", exif=exif)
    save(tmp_path / "b" / "0.png", pixels)
    turned = ImageDataset.from_folder(tmp_path, 8, split={"train": ["a"], "test": ["b"]}).train.pixels[0, ..., 0]
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


@pytest.mark.parametrize("name", ["0.jpg", "0.JPEG", "0.bmp", "0.gif", "0.webp"])
def test_other_formats_are_read_and_other_files_ignored(name, tmp_path):
    (tmp_path / "a").mkdir()
    for other in ("notes.txt", ".hidden.png", ".DS_Store"):
        (tmp_path / "a" / other).write_text("no image")
    (tmp_path / ".git").mkdir()
    assert abs(int(one(tmp_path, np.full((9, 9), 130), name, size=4)[1, 1, 0]) - 130) <= 2


# --- The split -----------------------------------------------------------------------------------------------------


def test_the_split_is_seeded_disjoint_and_complete():
    x, y = np.zeros((50, 4, 4), np.uint8), np.repeat(np.arange(25), 2)
    data = ImageDataset.from_arrays(x, y)
    parts = [set(part.labels) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [16, 4, 5]
    assert set.union(*parts) == {str(label) for label in range(25)}
    assert ImageDataset.from_arrays(x, y).test.labels == data.test.labels
    assert ImageDataset.from_arrays(x, y, seed=1).test.labels != data.test.labels


@pytest.mark.parametrize(
    "split, message",
    [
        ((0.5, 0.5), "three fractions"),
        ((0.5, 0.1, 0.5), "add up to 1"),
        ((0.8, 0.2, 0.0), "the last above 0"),
        ((1.5, -1.0, 0.5), "three fractions"),
        ("half", "three fractions"),
        ((0.1, 0.0, 0.9), "leaves none of 3 classes for training"),
        ({"train": ["0"], "tset": ["1"]}, "there is no part of a split 'tset': did you mean test?"),
        ({"train": ["0"], "test": ["zero"]}, "there is no class of arrays 'zero'"),
        ({"train": ["0"]}, "no class in the part 'test'"),
        ({"train": ["0"], "val": ["1"], "validation": ["2"], "test": ["2"]}, "val and validation are the same part"),
        ({"train": ["0", "1"], "test": ["1"]}, "1 classes, including 1, are in both train and test"),
        ({"train": ["0", "0"], "test": ["1"]}, "named twice in the part train"),
    ],
)
def test_a_split_that_cannot_be_used_is_refused(split, message):
    with pytest.raises(InputError) as caught:
        ImageDataset.from_arrays(np.zeros((3, 4, 4), np.uint8), [0, 1, 2], split=split)
    assert message in str(caught.value)


def test_two_classes_are_one_for_training_and_one_for_test():
    data = ImageDataset.from_arrays(np.zeros((2, 4, 4), np.uint8), ["a", "b"])
    assert (len(data.train), len(data.test), data.validation) == (1, 1, None)


# --- Arrays --------------------------------------------------------------------------------------------------------


def test_arrays_are_grouped_by_label_in_their_order():
    x = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    data = ImageDataset.from_arrays(x, list("bacabcb"), split={"train": ["b", "a"], "test": ["c"]}, name="letters")
    assert greys(data.train) == {"a": [1, 3], "b": [0, 4, 6]} and greys(data.test) == {"c": [2, 5]}
    assert data.name == "letters" and data.recipe is None


@pytest.mark.parametrize(
    "x", [np.full((2, 3, 3), 51 / 255), np.full((2, 3, 3, 1), 51), np.full((2, 3, 3), 51, np.uint8)]
)
def test_floats_and_integers_give_the_same_pixels(x):
    assert (ImageDataset.from_arrays(x, [0, 1]).train.pixels == 51).all()


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.full((2, 3, 3), 1.5), [0, 1], "floats in [0, 1], got values from 1.5 to 1.5; rescale"),
        (np.full((2, 3, 3), np.nan), [0, 1], "floats in [0, 1]"),
        (np.full((2, 3, 3), 256), [0, 1], "integers in [0, 255]"),
        (np.full((2, 3, 3), -1), [0, 1], "integers in [0, 255]"),
        (np.zeros((2, 9)), [0, 1], "[images, height, width]"),
        (np.zeros((0, 3, 3)), [], "[images, height, width]"),
        (np.array([["a"]]), [0], "x should be numbers"),
        (np.zeros((2, 3, 3)), [0, 1, 2], "one integer or string for each of the 2 images"),
        (np.zeros((2, 3, 3)), [0.0, 1.0], "one integer or string"),
        (np.zeros((2, 3, 3)), [7, 7], "at least 2 classes are needed"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(x, y, message):
    with pytest.raises(InputError) as caught:
        ImageDataset.from_arrays(x, y)
    assert message in str(caught.value)


# --- Faults of a folder --------------------------------------------------------------------------------------------


def test_faults_of_a_folder_are_named(cards):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        ImageDataset.from_folder(cards / "nowhere")
    with pytest.raises(InputError, match=r"a: it should hold a folder of images for each class"):
        ImageDataset.from_folder(cards / "a")
    for options, message in (
        ({"size": 0}, "size must be an integer above 0, got 0"),
        ({"channels": 4}, "channels must be 1 for grey or 3 for colour, got 4"),
        ({"fit": "crp"}, "there is no fit 'crp': did you mean crop?"),
    ):
        with pytest.raises(InputError) as caught:
            ImageDataset.from_folder(cards, **options)
        assert message in str(caught.value)
    (cards / "b" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(InputError, match=r"b/1\.png: cannot be decoded as an image .*replace it by an undamaged file"):
        ImageDataset.from_folder(cards)
    shutil.rmtree(cards / "b")
    (cards / "b" / "inner").mkdir(parents=True)
    with pytest.raises(InputError, match=r"b: this folder has no image .*the images should lie directly in it"):
        ImageDataset.from_folder(cards)


# --- The fingerprint -----------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_everything_that_decides_tasks(cards):
    def fingerprint(**options):
        return ImageDataset.from_folder(cards, **{"split": HALVES, **options}).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    others = [
        fingerprint(size=14), fingerprint(channels=3), fingerprint(invert=True), fingerprint(fit="pad"),
        fingerprint(split={"train": ["a", "c"], "test": ["b", "d"]}),
        fingerprint(split=HALVES | {"train": ["a"], "validation": ["b"]}),
    ]  # fmt: skip
    (cards / "c" / "4.png").rename(cards / "d" / "9.png")  # the same images, in other classes
    others.append(fingerprint())
    (cards / "d" / "9.png").rename(cards / "c" / "4.png")
    assert fingerprint() == first
    save(cards / "a" / "2.png", np.full((28, 28), 3))
    others.append(fingerprint())
    assert len({first, *others}) == len(others) + 1


def test_the_fingerprint_of_a_folder_does_not_depend_on_its_place_or_its_decoder(cards, tmp_path, monkeypatch):
    first = ImageDataset.from_folder(cards).fingerprint()
    moved = cards.rename(tmp_path / "moved")
    again = ImageDataset.from_folder(moved)
    assert again.fingerprint() == first
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: Image.new(mode, self.size, 77))
    other = ImageDataset.from_folder(moved)
    assert (other.train.pixels == 77).all() and other.fingerprint() == first


def test_the_fingerprint_of_arrays_depends_on_shape_labels_and_pixels():
    x, y = np.arange(128, dtype=np.uint8).reshape(4, 4, 8), np.array(["a", "a", "b", "b"])
    halves = {"train": ["a"], "test": ["b"]}
    variants = [(x, y), (x.reshape(4, 8, 4), y), (x, np.array(["a", "b", "b", "b"])), (x[::-1], y)]
    assert len({ImageDataset.from_arrays(*each, split=halves).fingerprint() for each in variants}) == len(variants)


def test_the_fingerprint_of_classes_of_equal_size_is_that_of_earlier_versions(tiny_pixels):
    train, test = (ImageClasses(tiny_pixels[part], tuple("abcdef" if part.start else "ghijkl")) for part in (
        slice(6, 12), slice(0, 6)
    ))  # fmt: skip
    digest = hashlib.sha256()
    for classes in (train, test):
        digest.update("\n".join(classes.labels).encode() + classes.pixels.tobytes())
    assert ImageDataset("tiny", train, test).fingerprint() == digest.hexdigest()


def test_a_recipe_reads_the_same_dataset_from_its_place_or_another(cards, tmp_path):
    options = {"size": 14, "fit": "pad", "invert": True, "split": (0.5, 0.25, 0.25), "seed": 3, "name": "mine"}
    data = ImageDataset.from_folder(cards, **options)
    again = ImageDataset.from_recipe(data.recipe)
    moved = ImageDataset.from_recipe(data.recipe, cards.rename(tmp_path / "moved"))
    for other in (again, moved):
        assert other.name == "mine" and other.fingerprint() == data.fingerprint()
        np.testing.assert_array_equal(other.train.pixels, data.train.pixels)


# --- Tasks ---------------------------------------------------------------------------------------------------------

COUNTS = (3, 5, 4)


@pytest.fixture
def uneven():
    """Three classes with 3, 5 and 4 images of one pixel. Image i of class c has the value 10c + i."""
    values = [10 * c + i for c, count in enumerate(COUNTS) for i in range(count)]
    return UnevenClasses(np.array(values, np.uint8).reshape(-1, 1, 1, 1), COUNTS, ("a", "b", "c"))


@pytest.mark.slow("draws a thousand tasks")
def test_a_task_of_uneven_classes_has_different_images_of_different_classes(uneven):
    episode = Episode(ways=2, shots=2, queries=1)
    keys = jax.random.split(jax.random.key(0), 200)
    tasks = jax.jit(episode.batch)(uneven.source, keys)
    support = np.rint(255 * np.asarray(tasks.support_x)).astype(int).reshape(200, 2, 2)
    query = np.rint(255 * np.asarray(tasks.query_x)).astype(int).reshape(200, 2, 1)
    images = np.concatenate([support, query], 2)
    classes = images // 10
    assert (classes == classes[..., :1]).all(), "a way holds images of two classes"
    assert (classes[:, 0, 0] != classes[:, 1, 0]).all(), "a class occurs twice in a task"
    numbers = images % 10
    assert (numbers < np.array(COUNTS)[classes]).all(), "an image beyond the end of its class was drawn"
    assert all(len(set(way)) == 3 for task in numbers.tolist() for way in task), "an image occurs twice in a task"
    one = episode.sample(uneven.source, keys[0])  # outside of jit, from NumPy arrays
    np.testing.assert_array_equal(one.support_x, tasks.support_x[0])


def test_each_image_of_a_class_is_drawn_equally_often_in_each_place(uneven):
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.vmap(lambda key: uneven.source.draw(1, key, 3))(keys)).reshape(4000, 3)
    for place in range(3):
        counts = Counter(drawn[:, place].tolist())
        assert set(counts) == {10, 11, 12, 13, 14}
        assert all(abs(count - 800) < 5 * np.sqrt(4000 * 0.2 * 0.8) for count in counts.values())


def test_classes_with_too_few_images_are_left_out_and_named(uneven):
    kept, small = uneven.with_at_least(4)
    assert small == {"a": 3} and greys(kept) == {"b": [10, 11, 12, 13, 14], "c": [20, 21, 22, 23]}
    assert uneven.with_at_least(3) == (uneven, {})
    with pytest.raises(InputError, match="2 shots and 2 queries are more than the 3 images"):
        Episode(ways=2, shots=2, queries=2).check(uneven, "uneven")


@pytest.mark.parametrize(
    "pixels, counts, labels, message",
    [
        (np.zeros((3, 2, 2, 1)), (1, 2), ("a", "b"), "pixels must be uint8"),
        (np.zeros((3, 2, 2, 1), np.uint8), (1, 1), ("a", "b"), "add up to 3 images"),
        (np.zeros((3, 2, 2, 1), np.uint8), (3, 0), ("a", "b"), "at least 1"),
        (np.zeros((3, 2, 2, 1), np.uint8), (1, 2), ("a", "a"), "as many distinct labels"),
    ],
)
def test_uneven_classes_that_do_not_fit_are_refused(pixels, counts, labels, message):
    with pytest.raises(InputError, match=message):
        UnevenClasses(pixels, counts, labels)


def test_a_source_is_a_pytree_whose_size_is_static(uneven):
    leaves, structure = jax.tree.flatten(uneven.source)
    assert len(leaves) == 3 and isinstance(jax.tree.unflatten(structure, leaves), UnevenSource)


# --- The registry --------------------------------------------------------------------------------------------------


def test_a_registered_dataset_is_read_by_its_name(cards):
    seen = []

    def read(folder):
        seen.append(folder)
        return ImageDataset.from_folder(folder or cards, split=HALVES)

    imaml.register_dataset("cards", read)
    assert datasets.load("cards").train.labels == ("a", "b")
    assert datasets.load("cards", str(cards)).fingerprint() == datasets.load("cards").fingerprint()
    assert seen == [None, cards, None]
    imaml.register_dataset("cards", lambda folder: ImageDataset.from_folder(cards, split=HALVES, size=14))
    assert datasets.load("cards").train.image_shape == (14, 14, 1)


def test_names_and_results_that_cannot_be_used_are_refused():
    for name in ("glyphs", "folder"):
        with pytest.raises(InputError, match=f"the name '{name}' is taken by a dataset of this package"):
            imaml.register_dataset(name, lambda folder: None)
    with pytest.raises(InputError, match="read should be a function"):
        imaml.register_dataset("cards", "cards")
    with pytest.raises(InputError, match=r"there is no dataset 'cards': known: glyphs, .*, folder"):
        datasets.load("cards")
    imaml.register_dataset("cards", lambda folder: [1, 2])
    with pytest.raises(InputError, match=r"the dataset that 'cards' reads should be an imaml\.ImageDataset"):
        datasets.load("cards")


def install(folder, text, module, monkeypatch):
    """Put a package with these entry points and this module on the import path."""
    metadata = folder / "own_cards-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-cards\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(text)
    (folder / "own_cards.py").write_text(module)
    monkeypatch.syspath_prepend(folder)


READ = """
import dataclasses
import numpy as np
import imaml

def read(folder):
    return imaml.ImageDataset.from_arrays(np.zeros((6, 4, 4)), [0, 1, 2, 3, 4, 5], name="own")

PRESET = dataclasses.replace(imaml.preset("sinusoid-5shot-gd"), name="own-preset")

def preset():
    return dataclasses.replace(PRESET, name="own-function")
"""
ENTRY_POINTS = """
[imaml.datasets]
own = own_cards:read
own-broken = own_missing:read

[imaml.presets]
own-preset = own_cards:PRESET
own-function = own_cards:preset
own-other = own_cards:PRESET
"""


def test_an_installed_package_offers_datasets_and_presets_by_entry_points(tmp_path, monkeypatch):
    install(tmp_path, ENTRY_POINTS, READ, monkeypatch)
    assert datasets.load("own").name == "own"
    with pytest.raises(InputError, match=r"own_missing:read.*cannot be imported \(ModuleNotFoundError"):
        datasets.load("own-broken")
    assert {"own-preset", "own-function"} <= set(imaml.presets())
    assert imaml.presets()[0] == "glyphs-5way-1shot-gd"
    for name in ("own-preset", "own-function"):
        assert imaml.preset(name).name == name
    with pytest.raises(InputError, match=r"should be an imaml\.Preset of that name"):
        imaml.preset("own-other")
