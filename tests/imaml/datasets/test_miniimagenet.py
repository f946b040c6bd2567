"""Reading of Mini-ImageNet and its error messages, on a small generated folder in the same layout."""

import csv

import numpy as np
import pytest
from PIL import Image

from imaml import datasets
from imaml.datasets import miniimagenet
from imaml.errors import InputError

CLASSES = {"train": ["n02", "n01", "n03"], "val": ["n04"], "test": ["n06", "n05"]}
IMAGES = 4


def colour(label, number):
    return int(label[1:]) * 30, number * 40, 255 - number


def write_csv(folder, part, rows, header=("filename", "label")):
    with (folder / f"{part}.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for part, labels in CLASSES.items():
        rows = [(f"{label}-{number}.png", label) for label in labels for number in range(IMAGES)]
        for name, label in rows:
            pixels = np.full((84, 84, 3), colour(label, int(name[-5])), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name)
        write_csv(tmp_path, part, rows)
    return tmp_path


def test_classes_and_pixels_equal_those_of_the_files(folder):
    dataset = datasets.load("miniimagenet", folder)
    assert (dataset.train.labels, dataset.test.labels) == (("n01", "n02", "n03"), ("n05", "n06"))
    assert dataset.train.pixels.shape == (3, IMAGES, 84, 84, 3) and dataset.train.pixels.dtype == np.uint8
    for part in (dataset.train, dataset.test):
        for label, images in zip(part.labels, part.pixels, strict=True):
            for number, image in enumerate(images):
                assert (image == colour(label, number)).all()


def test_a_grey_jpeg_is_read_as_rgb(folder):
    noise = np.random.default_rng(0).integers(0, 255, (84, 84)).astype(np.uint8)
    Image.fromarray(noise).resize((84, 84)).save(folder / "images" / "n01-0.png", format="JPEG", quality=95)
    image = datasets.load("miniimagenet", folder).train.pixels[0, 0]
    assert (image[..., 0] == image[..., 1]).all() and np.abs(image[..., 0].astype(int) - noise).mean() < 20


@pytest.mark.parametrize("missing", ["images", "val.csv"])
def test_a_missing_file_or_folder_of_the_layout_is_named(missing, folder):
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(InputError, match=f"does not hold {missing}; it should hold images/ and train.csv"):
        miniimagenet.load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder; name the one that holds images/"):
        miniimagenet.load(tmp_path / "nowhere")


def test_missing_images_are_named_and_counted(folder):
    for number in (1, 2):
        (folder / "images" / f"n06-{number}.png").unlink()
    with pytest.raises(
        InputError, match=r"n06-1\.png: no such file, although test\.csv names it; 2 of the 8 files in test\.csv are"
    ):
        miniimagenet.load(folder)


def test_a_class_in_two_parts_is_named(folder):
    rows = [(f"n01-{number}.png", "n01") for number in range(IMAGES)]
    write_csv(folder, "val", rows)
    with pytest.raises(InputError, match=r"class n01 is named more than once, in train\.csv and val\.csv"):
        miniimagenet.load(folder)


def test_an_image_in_two_classes_is_named(folder):
    rows = [(f"n04-{number}.png", "n04") for number in range(IMAGES - 1)]
    write_csv(folder, "val", [*rows, ("n01-0.png", "n04")])
    with pytest.raises(InputError, match=r"file n01-0\.png is named more than once, in train\.csv and val\.csv"):
        miniimagenet.load(folder)


def test_a_class_of_another_size_is_named(folder):
    rows = [(f"n0{c}-{number}.png", f"n0{c}") for c in (1, 2, 3) for number in range(IMAGES - (c == 3))]
    write_csv(folder, "train", rows)
    with pytest.raises(InputError, match=r"train\.csv: class n03 has 3 images, but other classes have 4"):
        miniimagenet.load(folder)


@pytest.mark.parametrize(
    "rows, header, expected",
    [
        ([("a", "b")], ("file", "class"), "its first line should be filename,label"),
        ([], ("filename", "label"), "it names no image"),
        ([("n04-0.png", "")], ("filename", "label"), "line 2: a file name or label is missing"),
        ([("../n04-0.png", "n04")], ("filename", "label"), "line 2: '../n04-0.png' should be a file's name in images/"),
    ],
)
def test_a_malformed_csv_file_is_named_with_the_fault(rows, header, expected, folder):
    write_csv(folder, "val", rows, header)
    with pytest.raises(InputError) as error:
        miniimagenet.load(folder)
    assert expected in str(error.value) and "val.csv" in str(error.value)


def test_an_image_of_another_size_is_named(folder):
    Image.new("RGB", (100, 84)).save(folder / "images" / "n05-3.png")
    with pytest.raises(InputError, match=r"n05-3\.png: 100×84 pixels instead of 84×84; resize the images first"):
        miniimagenet.load(folder)


@pytest.mark.parametrize("content", [b"", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_damaged_image_is_named(content, folder):
    (folder / "images" / "n05-3.png").write_bytes(content)
    with pytest.raises(InputError, match=r"n05-3\.png: cannot be decoded as a JPEG or PNG"):
        miniimagenet.load(folder)
