"""``imaml predict`` and ``imaml export``: the labels equal those of the Python API, and errors name the mistake."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import imaml
from imaml import InputError, cli
from imaml.datasets import folders, omniglot
from imaml.learning.tasks import Episode
from imaml.runs import checkpoints, prediction
from imaml.runs.meta_step import initial_state
from imaml.settings.parts import Conv4

pytestmark = pytest.mark.usefixtures("quick_compilation")

PRESET = replace(
    imaml.preset("glyphs-5way-1shot-gd"), network=Conv4(filters=2), episode=Episode(ways=3, shots=1, queries=1)
)


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_pixels):
    """A folder with a run, dark ink on white paper in ``support/CLASS/*.png``, and other images in ``query``."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    monkeypatch.chdir(tmp_path)
    facts = {"preset": PRESET.name, "config": PRESET.config(), "types": PRESET.types(), "data": "", "versions": {}}
    (tmp_path / "run").mkdir()
    checkpoints.save(tmp_path / "run", 1, initial_state(PRESET), facts)
    for index, label in enumerate(("ant", "bee", "cat")):
        write(tmp_path / "support" / label / "0.png", 255 - tiny_pixels[index, 0, ..., 0])
        write(tmp_path / "query" / f"{label}.PNG", 255 - tiny_pixels[index, 1, ..., 0])
    write(tmp_path / "support" / "cat" / "1.png", 255 - tiny_pixels[2, 2, ..., 0])
    write(tmp_path / "query" / "large.jpg", np.kron(255 - tiny_pixels[0, 2, ..., 0], np.ones((4, 4), np.uint8)))
    (tmp_path / "query" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "query" / "notes.txt").write_text("no image")
    return tmp_path


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


COMMAND = ["predict", "run", "--support", "support", "--query", "query"]


@pytest.mark.slow("compiles the adaptation for each command")
def test_the_table_and_the_json_have_the_labels_and_probabilities_of_the_library(here, tiny_pixels, capsys):
    assert cli.main([*COMMAND, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["query/ant.PNG", "query/bee.PNG", "query/cat.PNG", "query/large.jpg"]
    assert [row["file"] for row in found["predictions"]] == names
    assert (found["preset"], found["normalisation"]) == (PRESET.name, "support set")
    support = np.stack([tiny_pixels[0, 0], tiny_pixels[1, 0], tiny_pixels[2, 0], tiny_pixels[2, 2]])
    adapted = imaml.load("run").adapt(support, ["ant", "bee", "cat", "cat"])
    images = np.stack([tiny_pixels[index, 1] for index in range(3)])
    shares = [[row["probabilities"][label] for label in ("ant", "bee", "cat")] for row in found["predictions"]]
    np.testing.assert_allclose(shares[:3], adapted.probabilities(images), rtol=1e-6)
    labels = [row["label"] for row in found["predictions"]]
    assert labels[:3] == adapted.predict(images)
    assert [row["probability"] for row in found["predictions"]] == [max(each) for each in shares]
    assert cli.main(COMMAND) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "label", "probability"]
    assert [row.split() for row in rows] == [
        [name, label, f"{max(each):.1%}"] for name, label, each in zip(names, labels, shares, strict=True)
    ]
    # An image alone gets the probabilities that it has among the others.
    assert cli.main([*COMMAND[:-1], names[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == found["predictions"][1:2]


@pytest.mark.slow("compiles the adaptation for each command")
def test_the_options_choose_the_statistics_and_the_ink(here, tiny_pixels, capsys):
    def shares(*options):
        assert cli.main([*COMMAND, "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["normalisation"], np.array([list(row["probabilities"].values()) for row in found["predictions"]])

    by_support, by_query, bright = shares(), shares("--transductive"), shares("--ink", "bright")
    assert (by_support[0], by_query[0]) == ("support set", "query batch")
    assert abs(by_support[1] - by_query[1]).max() > 1e-3 and abs(by_support[1] - bright[1]).max() > 1e-3
    np.testing.assert_array_equal(shares("--ink", "dark")[1], by_support[1])


@pytest.mark.slow("compiles the adaptation for each command")
@pytest.mark.parametrize("name", ["theta.safetensors", "theta.npz"])
def test_exported_parameters_are_loaded_and_predict_the_same(name, here, capsys):
    assert cli.main(["export", "run", "--out", name]) == 0
    assert f"imaml.load('{name}')" in capsys.readouterr().out
    assert cli.main([*COMMAND, "--json"]) == 0
    expected = capsys.readouterr().out
    assert cli.main(["predict", name, *COMMAND[2:], "--json"]) == 0
    assert capsys.readouterr().out == expected
    leaves = zip(*(jax.tree.leaves(imaml.load(what).theta) for what in ("run", name)), strict=True)
    assert all(np.array_equal(one, other) for one, other in leaves)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("predict run --support support", "required: --query"),
        ("predict nowhere --support support --query query", "there is no run in nowhere"),
        ("predict run --support nowhere --query query", "nowhere: no such folder"),
        ("predict run --support query --query query", "it should hold a folder of images for each class"),
        ("predict run --support support --query support", "this folder has no image (a file .png, .jpg"),
        ("predict run --support support --query nothing.png", "nothing.png: no such folder"),
        (
            "predict run --support support --query query/notes.txt",
            "notes.txt: cannot be decoded as an image (no BMP, GIF, JPEG, PNG, WEBP)",
        ),
        ("predict run --support support --query query --transductiv", "did you mean --transductive?"),
        ("predict run --support support --query query --ink grey", "invalid choice: 'grey'"),
        ("export run", "required: --out"),
        ("export run --out theta.pt", "theta.pt: a file of parameters is called NAME.safetensors or NAME.npz"),
        ("export nowhere --out theta.npz", "there is no run in nowhere"),
    ],
)
def test_a_mistake_is_named(arguments, message, here, capsys):
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_another_number_of_classes_names_the_remedy(here, capsys):
    write(here / "support" / "dog" / "0.png", np.zeros((9, 9), np.uint8))
    assert cli.main(COMMAND) == 2
    assert "has 4 classes ('ant', 'bee', 'cat', 'dog'), but glyphs-5way-1shot-gd was trained to tell 3 apart" in (
        capsys.readouterr().err
    )


def test_a_regression_has_no_images_to_label(here, capsys):
    preset = imaml.preset("sinusoid-5shot-gd")
    imaml.TrainedLearner(preset.functions.init(jax.random.key(0)), preset).save("theta.npz")
    assert cli.main(["predict", "theta.npz", *COMMAND[2:]]) == 2
    assert "sinusoid-5shot-gd does not classify images of a known size" in capsys.readouterr().err


# --- Image files ---------------------------------------------------------------------------------------------------


def test_a_drawing_is_resized_to_the_pixels_of_omniglot(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 2, (105, 105), np.uint8) * 255
    write(tmp_path / "drawing.png", drawn)
    found = folders.read_image(tmp_path / "drawing.png", folders.Reading(28, 1, "stretch", True))
    np.testing.assert_array_equal(found[..., 0], 255 - omniglot._shrink(drawn[None])[0])


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_a_file_that_is_no_image_is_refused_by_name(content, tmp_path):
    reading = folders.Reading(28, 1, "stretch", False)
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.png: cannot be decoded"):
        folders.read_image(tmp_path / "bad.png", reading)
    with pytest.raises(InputError, match=r"none\.png: cannot be read \(No such file"):
        folders.read_image(tmp_path / "none.png", reading)


def test_a_learner_of_ones_own_images_reads_files_as_in_its_training(here, monkeypatch):
    seen = []
    monkeypatch.setattr(folders, "read_image", lambda path, reading: seen.append(reading) or np.zeros((28, 28, 1)))
    learner = imaml.load("run")
    recipe = {"kind": "folder", "directory": "cards", "size": 28, "channels": 1, "fit": "pad", "invert": True}
    own = imaml.TrainedLearner(learner.theta, learner.preset, learner.facts | {"source": recipe})
    own.save("own.npz")
    prediction.predict_files(imaml.load("own.npz"), here / "support", here / "query")
    assert set(seen) == {folders.Reading(28, 1, "pad", True)}
