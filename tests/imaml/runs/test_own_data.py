"""Runs on data of one's own are trained, resumed and evaluated, and refused if the data have changed."""

import json
import shutil
import signal
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from PIL import Image
from tiny_preset import TinyMLP, tiny_preset

import imaml
from imaml import ImageDataset, InputError, cli
from imaml.datasets import ImageClasses
from imaml.learning import networks
from imaml.learning.tasks import Task
from imaml.reproduction import records
from imaml.runs import checkpoints
from imaml.runs import log as runlog
from imaml.runs.meta_step import initial_state
from imaml.settings.parts import Conv4

pytestmark = pytest.mark.usefixtures("quick_compilation", "cached_programs")

STEPS = 3
OPTIONS = {"evaluation_tasks": 4, "checkpoint_seconds": float("inf")}
PRESET = tiny_preset(STEPS)
SPLIT = {"train": ["c0", "c1", "c2", "c3"], "validation": ["c4", "c5"], "test": ["c6", "c7"]}


@pytest.fixture(scope="module")
def cached_programs():
    """Let equal presets share the functions that JAX traces."""
    with tiny_run.programs(tiny_run.shared_meta_step):
        yield


def write_cards(directory, pixels):
    """Write a folder of eight classes with four to six images each, and return it."""
    for label, images in enumerate(pixels[:8, ..., 0]):
        folder = directory / "cards" / f"c{label}"
        folder.mkdir(parents=True)
        for number, image in enumerate(images[: 4 + label % 3]):
            Image.fromarray(image).save(folder / f"{number}.png")
    return directory / "cards"


@pytest.fixture
def cards(tmp_path, tiny_pixels):
    """A folder of eight classes of cards, which the test may change."""
    return write_cards(tmp_path, tiny_pixels)


def train(preset, directory, **options):
    return imaml.train(preset, directory, **(OPTIONS | options))


def stop_after(step):
    return lambda progress: signal.raise_signal(signal.SIGTERM) if progress.step == step else None


def log(directory):
    return [replace(entry, seconds=0.0) for entry in runlog.read_log(directory)]


@pytest.mark.slow("trains a run in two parts")
def test_a_run_on_a_folder_records_the_folder_and_is_resumed_and_evaluated(whole, cards, tmp_path, capsys, monkeypatch):
    data = ImageDataset.from_folder(cards, split=SPLIT)
    assert whole.preset.dataset == "cards" and whole.preset == replace(PRESET, dataset="cards")
    stopped = train(PRESET, tmp_path / "run", dataset=data, on_progress=stop_after(1))
    assert (stopped.step, stopped.finished) == (1, False)
    # `stopped.preset` names the dataset, and the checkpoint in the run's folder says where the images are.
    run = train(stopped.preset, tmp_path / "run")
    assert run.evaluation == whole.evaluation and log(tmp_path / "run") == log(whole.directory)
    for key, value in run.theta["layer0"].items():
        np.testing.assert_array_equal(value, whole.theta["layer0"][key])
    for what in (run, tmp_path / "run", run.theta):
        extra = {"dataset": data} if what is run.theta else {}
        # PRESET names the dataset glyphs, which is not used: a run records its data, and θ comes with `dataset`.
        assert imaml.evaluate(what, PRESET, 4, **extra) == whole.evaluation
    imaml.register_preset(PRESET)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--tasks", "4"]) == 0
    assert capsys.readouterr().out == f"{whole.evaluation}\n"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["config"]["dataset"] == "cards" and result["source"]["directory"] == str(cards)
    with pytest.raises(InputError, match="holds a run on cards, which is no dataset of this package"):
        records.of_run(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_pixels, cached_programs, quick_compilation):
    """A finished run on a folder of cards. Tests change neither the folder of the run nor that of the cards."""
    folder = tmp_path_factory.mktemp("whole")
    data = ImageDataset.from_folder(write_cards(folder, tiny_pixels), split=SPLIT)
    return train(PRESET, folder / "run", dataset=data)


@pytest.fixture
def finished(whole):
    """The folder of the finished run."""
    return whole.directory


@pytest.mark.slow("trains and evaluates runs on several folders")
def test_a_changed_missing_or_moved_folder_is_refused_or_found(whole, cards, tmp_path):
    # Copy the finished run as a run on `cards`, a folder with equal images.
    finished = tmp_path / "run"
    finished.mkdir()
    found, before = checkpoints.newest(whole.directory), whole.evaluation
    facts = {key: found.description[key] for key in ("preset", "config", "types", "data", "versions", "source")}
    facts["source"] = facts["source"] | {"directory": str(cards)}
    checkpoints.save(finished, STEPS, found.restore(initial_state(PRESET)), facts)
    assert imaml.evaluate(finished, PRESET, 4) == before
    image = cards / "c0" / "0.png"
    original = image.read_bytes()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(image)
    with pytest.raises(InputError, match=r"trained on other data than the present cards data.*Restore the files in .*"):
        imaml.evaluate(finished, PRESET, 4)
    with pytest.raises(InputError, match=rf"the present ones \(the run's data were read from {cards}\)"):
        train(replace(PRESET, dataset="cards"), finished)
    image.write_bytes(original)
    assert imaml.evaluate(finished, PRESET, 4) == before
    moved = cards.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"images in {cards}, which is no folder now: .*--data DIR"):
        imaml.evaluate(finished, PRESET, 4)
    assert imaml.evaluate(finished, PRESET, 4, data=moved) == before
    assert train(replace(PRESET, dataset="cards"), finished, data=moved).evaluation == before
    shutil.rmtree(moved / "c0")
    with pytest.raises(InputError, match="there is no class of cards 'c0'"):
        imaml.evaluate(finished, PRESET, 4, data=moved)


@pytest.mark.slow("trains a run")
def test_another_dataset_in_the_folder_of_a_run_is_refused_and_changes_nothing(finished, tiny_pixels):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.name != "lock"}
    other = ImageDataset.from_arrays(tiny_pixels.reshape(72, 28, 28), np.repeat(np.arange(12), 6), name="cards")
    with pytest.raises(InputError, match="holds a run on other data"):
        train(PRESET, finished, dataset=other)
    with pytest.raises(InputError, match=r"dataset: cards → arrays\): pass the same dataset as before"):
        train(PRESET, finished, dataset=replace(other, name="arrays"))
    with pytest.raises(InputError, match="trained on other data than the present cards data"):
        imaml.evaluate(finished, PRESET, 4, dataset=other)
    # A dataset of another name is accepted: only data of the same name are compared with those of the training.
    assert imaml.evaluate(finished, PRESET, 4, dataset=replace(other, name="arrays")).tasks == 4
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.name != "lock"} == before


@pytest.mark.slow("trains a run")
def test_the_validation_classes_are_evaluated_on_request(finished, whole):
    data = whole.dataset
    swapped = replace(data, test=data.validation, validation=data.test, name="swapped")
    validation = imaml.evaluate(finished, PRESET, 4, part="validation")
    assert validation == replace(imaml.evaluate(finished, PRESET, 4, dataset=swapped), part="validation")
    assert str(validation).startswith("validation accuracy ")
    assert imaml.diagnose(finished, PRESET, 4, part="validation").adapted.part == "validation"
    with pytest.raises(InputError, match="there is no part of a dataset 'train'"):
        imaml.evaluate(finished, PRESET, 4, part="train")
    with pytest.raises(InputError, match="the dataset swapped has no validation classes"):
        imaml.evaluate(finished, PRESET, 4, part="validation", dataset=replace(swapped, validation=None))


@pytest.mark.slow("compiles the meta-step for arrays of another shape")
def test_a_run_on_arrays_says_at_evaluation_what_to_pass(tmp_path, tiny_pixels):
    arrays = tiny_pixels.reshape(72, 28, 28), np.repeat(np.arange(12), 6)
    run = train(PRESET, tmp_path, dataset=ImageDataset.from_arrays(*arrays))
    assert run.preset.dataset == "arrays" and imaml.evaluate(run, tasks=4) == run.evaluation
    with pytest.raises(InputError, match=r"passed as an object \(imaml\.ImageDataset\).*evaluate\(run, dataset=data\)"):
        imaml.evaluate(tmp_path, PRESET, 4)
    with pytest.raises(InputError, match=r"passed as an object .*imaml\.train\(…, dataset=data\)"):
        train(run.preset, tmp_path)
    again = ImageDataset.from_arrays(*arrays)
    assert imaml.evaluate(tmp_path, PRESET, 4, dataset=again) == run.evaluation
    assert train(PRESET, tmp_path, dataset=again).evaluation == run.evaluation
    with pytest.raises(InputError, match="is chosen by its name, but the dataset was passed as an object: omit data"):
        train(PRESET, tmp_path, data=tmp_path, dataset=again)


@pytest.mark.slow("trains a run")
def test_a_registered_dataset_is_found_by_its_name_and_its_files(cards, tmp_path):
    folders = []

    def read(folder):
        folders.append(folder)
        return ImageDataset.from_folder(folder, split=SPLIT, name="playing cards")

    imaml.register_dataset("cards", read)
    run = train(PRESET, tmp_path / "run", dataset="cards", data=cards)
    assert run.preset.dataset == "playing cards"
    assert imaml.evaluate(tmp_path / "run", PRESET, 4) == run.evaluation
    assert train(run.preset, tmp_path / "run").evaluation == run.evaluation
    assert folders == [cards] * 3
    assert train(replace(PRESET, dataset="cards"), tmp_path / "other", data=cards).evaluation == run.evaluation


@pytest.mark.slow("compiles the meta-step for uneven classes")
def test_small_classes_are_left_out_with_a_warning_that_names_them(cards, tmp_path):
    for number in range(1, 6):
        (cards / "c2" / f"{number}.png").unlink(missing_ok=True)
    warnings = []
    split = SPLIT | {"test": ["c5", "c6", "c7"], "validation": []}
    (cards / "c7" / "0.png").rename(cards / "c6" / "9.png")
    for number in range(1, 4):
        (cards / "c7" / f"{number}.png").unlink()
    data = ImageDataset.from_folder(cards, split=split)
    train(PRESET, tmp_path / "run", dataset=data, on_warning=warnings.append)
    left_out = "classes are left out, because they have fewer images than 1 shots and 1 queries need"
    assert warnings == [
        f"cards's training set: 1 of 4 {left_out}: c2 (1)",
        f"cards's test set: 1 of 3 {left_out}: c7 (1)",
    ]
    imaml.evaluate(tmp_path / "run", PRESET, 4, on_event=(said := []).append)
    assert said == warnings[1:]
    wide = replace(PRESET, episode=replace(PRESET.episode, ways=4))
    with pytest.raises(InputError, match="4 ways are more than the 3 classes of cards's training set"):
        train(wide, tmp_path / "wide", dataset=data)


def test_images_of_another_shape_than_the_networks_are_refused_with_a_remedy(cards, tmp_path):
    preset = replace(PRESET, network=Conv4(filters=2))
    with pytest.raises(InputError) as caught:
        train(preset, tmp_path / "run", dataset=ImageDataset.from_folder(cards, 20, channels=3))
    assert "takes images of 28×28×1, but those of cards's training set have 20×20×3" in str(caught.value)
    assert "read them with size=28 and channels=1, or replace network.image_shape" in str(caught.value)
    oblong = ImageDataset.from_arrays(np.zeros((24, 4, 5)), np.repeat(np.arange(6), 4))
    turning = replace(PRESET, rotations=replace(PRESET.rotations, test=True))
    with pytest.raises(InputError, match=r"rotates images by multiples of 90°.*4×5×1"):
        train(turning, tmp_path / "run", dataset=oblong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--data", "cards"], ["--data", "cards", "--out", "run"]])
def test_the_command_line_reads_a_folder_in_the_shape_of_the_network(words, cards, tmp_path, monkeypatch, capsys):
    calls = []

    def step(preset, directory, data=None, **options):
        calls.append((directory, data, options["dataset"]))
        raise InputError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    monkeypatch.setattr("imaml.runs.training.train", step)
    assert cli.main(["train", "--dataset", "folder", *words]) == 2
    expected = "run" if "--out" in words else "runs/glyphs-5way-1shot-gd-cards"
    assert [(str(directory), *rest) for directory, *rest in calls] == [(expected, "cards", "folder")]
    assert f"implicit MAML on cards, in {expected}" in capsys.readouterr().out


@pytest.mark.slow("compiles the meta-step for images of another shape")
def test_a_folder_by_name_has_the_shape_of_the_network_and_is_found_again(cards, tmp_path, monkeypatch):
    preset = replace(PRESET, network=Shaped(image_shape=(12, 12, 3)))
    run = train(preset, tmp_path / "run", data=cards, dataset="folder")
    assert run.dataset.train.image_shape == (12, 12, 3)
    assert train(preset, tmp_path / "run", dataset="folder").evaluation == run.evaluation
    with pytest.raises(InputError, match="use --data DIR to name a folder that holds one folder of images"):
        train(preset, tmp_path / "other", dataset="folder")


@dataclass(frozen=True)
class Shaped(TinyMLP):
    """A tiny network that states the shape of the images that it takes."""

    image_shape: tuple[int, int, int] = (28, 28, 1)

    def build(self, ways):
        network = networks.mlp((int(np.prod(self.image_shape)), self.hidden, ways))
        return networks.Network(network.init, lambda p, x: network.apply(p, x.reshape(len(x), -1)))


@pytest.mark.slow("compiles the meta-step for another dataset")
def test_a_dataset_of_this_package_by_name_is_a_setting_of_the_run(tmp_path, tiny_pixels, monkeypatch):
    labels = [f"{number:02}" for number in range(12)]
    tiny = ImageDataset("omniglot", *(ImageClasses(tiny_pixels, tuple(part + x for x in labels)) for part in "ab"))
    monkeypatch.setattr("imaml.datasets.omniglot.load", lambda folder, meanwhile: tiny)
    run = train(PRESET, tmp_path, data=tmp_path, dataset="omniglot")
    assert (run.preset.dataset, run.dataset) == ("omniglot", None)
    assert checkpoints.newest(tmp_path).description["config"]["dataset"] == "omniglot"


def test_data_that_the_tasks_cannot_be_drawn_from_are_refused(cards, tmp_path):
    sinusoids = imaml.preset("sinusoid-5shot-gd")
    with pytest.raises(InputError, match="sinusoid-5shot-gd draws sinusoids and would not read another dataset"):
        train(sinusoids, tmp_path / "run", data=cards, dataset="folder")
    with pytest.raises(InputError, match="tiny draws tasks from images, but sinusoid's training set has none"):
        train(PRESET, tmp_path / "run", dataset="sinusoid")
    assert not (tmp_path / "run").exists()


# --- One's own tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """Regression tasks: points on a line whose slope is drawn from the slopes of a dataset."""

    shots: int
    queries: int

    metric, kind, outputs, chance = "mean squared error", "lines", 1, None

    def check(self, classes, name):
        pass

    def sample(self, source, key, rotate=False):
        slope, x = jax.random.choice(key, source), jax.random.uniform(key, (self.shots + self.queries, 1))
        return Task(x[: self.shots], slope * x[: self.shots], x[self.shots :], slope * x[self.shots :])

    def batch(self, source, keys, rotate=False):
        return jax.vmap(lambda key: self.sample(source, key))(keys)


@dataclass(frozen=True, eq=False)
class Slopes:
    """The slopes of training or test lines."""

    source: jnp.ndarray


@dataclass(frozen=True, eq=False)
class LineData:
    """A dataset that is no image dataset."""

    name: str
    train: Slopes
    test: Slopes

    def fingerprint(self):
        return f"{self.train.source.tolist()} {self.test.source.tolist()}"


@pytest.mark.slow("trains and evaluates a regression")
def test_tasks_and_data_of_ones_own_are_trained_and_evaluated(tmp_path):
    sinusoids = imaml.preset("sinusoid-5shot-gd")
    outer = replace(sinusoids.outer, steps=2, tasks=2, queries=3, at_once=1)
    preset = replace(sinusoids, name="lines", episode=Lines(shots=3, queries=3), outer=outer)
    data = LineData("lines", Slopes(jnp.array([1.0, 2.0])), Slopes(jnp.array([3.0])))
    run = train(preset, tmp_path, dataset=data)
    assert run.evaluation.metric == "mean squared error" and run.preset.dataset == "lines"
    with pytest.raises(InputError, match=r"passed as an object \(.*LineData\)"):
        imaml.evaluate(tmp_path, preset, 4)
    assert imaml.evaluate(tmp_path, preset, 4, dataset=data) == run.evaluation
    with pytest.raises(InputError, match=r"has a type that imaml does not define \(episode is .*Lines\)"):
        imaml.evaluate(tmp_path, tasks=4, dataset=data)
    imaml.register_preset(preset)  # now the preset is found by its name
    assert imaml.evaluate(tmp_path, tasks=4, dataset=data) == run.evaluation
    with pytest.raises(InputError, match="on other data"):
        train(preset, tmp_path, dataset=replace(data, test=Slopes(jnp.array([4.0]))))
    with pytest.raises(InputError, match=r"dataset should be an imaml\.ImageDataset, or a record with a name"):
        train(preset, tmp_path, dataset=[1, 2])
