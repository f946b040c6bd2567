"""The folder of a run refuses another run and a second process, and keeps its checkpoints on a full disk."""

import errno
import json
import os
import re
from dataclasses import replace

import pytest
from tiny_preset import PermutedEpisode, TinyMLP
from tiny_run import (
    EVALUATION_TASKS,
    PRESET,
    STEPS,
    STOP_AT,
    assert_same_run,
    contents,
    dataset,
    stop_at,
    stop_halfway,
    train,
)

import bilevel as bl
import imaml
from imaml import InputError, cli, datasets
from imaml.datasets import sinusoid
from imaml.runs import checkpoints, training
from imaml.runs import log as runlog
from imaml.runs.meta_step import initial_state
from imaml.settings.parts import MLP

pytestmark = pytest.mark.usefixtures("traces")


@pytest.mark.slow("starts a run that is refused, for each setting", fast="other0-*")
@pytest.mark.parametrize(
    "other, difference",
    [
        (replace(PRESET, strength=0.7), "strength: 0.1 → 0.7"),
        (replace(PRESET, outer=replace(PRESET.outer, steps=5)), "outer.steps: 6 → 5"),
        (replace(PRESET, network=TinyMLP(hidden=5)), "network.hidden: 4 → 5"),
        (replace(PRESET, seed=3), "seed: 0 → 3"),
    ],
)
def test_other_settings_are_refused_and_named(other, difference, uninterrupted):
    before = contents(uninterrupted.run.directory)
    with pytest.raises(InputError, match=re.escape(f"a run with other settings ({difference})")):
        train(uninterrupted.run.directory, other)
    assert contents(uninterrupted.run.directory) == before


OTHER_TYPES = replace(PRESET, episode=PermutedEpisode(ways=2, shots=1, queries=1))
"""The tiny preset with a subclass of ``Episode``. Its name and its config are those of ``PRESET``."""


@pytest.mark.slow("compiles an evaluation for another type")
def test_a_preset_that_differs_only_in_the_type_of_a_part_is_another_run(uninterrupted):
    assert OTHER_TYPES.config() == PRESET.config() and OTHER_TYPES.types() != PRESET.types()
    directory = uninterrupted.run.directory
    before = contents(directory)
    difference = re.escape("(episode: imaml.Episode → tiny_preset.PermutedEpisode)")
    with pytest.raises(InputError, match=f"whose preset, or a component of it, has another type {difference}"):
        train(directory, OTHER_TYPES)
    for run in (directory, uninterrupted.run):
        with pytest.raises(InputError, match=f"other types than the given preset and its components have {difference}"):
            imaml.evaluate(run, OTHER_TYPES, EVALUATION_TASKS)
    assert contents(directory) == before
    # Parameters belong to no run, so they can be evaluated on tasks of any type.
    assert imaml.evaluate(uninterrupted.run.theta, OTHER_TYPES, EVALUATION_TASKS).tasks == EVALUATION_TASKS


def without_types(directory, target, name=PRESET.name):
    """Copy the newest checkpoint to another folder, in the form of earlier versions, which did not save types."""
    found = checkpoints.newest(directory)
    facts = {key: found.description[key] for key in ("config", "data", "versions")} | {"preset": name}
    checkpoints.save(target, found.step, found.restore(initial_state(PRESET)), facts)


@pytest.mark.slow("evaluates a run twice")
def test_a_run_saved_without_types_is_resumed_and_evaluated(uninterrupted, tmp_path):
    without_types(uninterrupted.run.directory, tmp_path)
    assert imaml.evaluate(tmp_path, PRESET, EVALUATION_TASKS) == uninterrupted.run.evaluation
    assert train(tmp_path).evaluation == uninterrupted.run.evaluation


@pytest.mark.slow("evaluates a run for each name of the preset", fast="other0")
@pytest.mark.parametrize("other", [PRESET, replace(PRESET, name="glyphs-5way-1shot-gd")])
def test_the_message_about_a_part_of_an_unknown_type_names_it_and_says_what_to_pass(other, tmp_path, uninterrupted):
    found = checkpoints.newest(uninterrupted.run.directory)
    facts = found.description | {"preset": other.name, "config": other.config()}
    checkpoints.save(tmp_path, found.step, found.restore(initial_state(PRESET)), facts)
    with pytest.raises(InputError) as caught:
        imaml.evaluate(tmp_path, tasks=EVALUATION_TASKS)
    message = str(caught.value)
    assert "has a type that imaml does not define (network is tiny_preset.TinyMLP)" in message
    assert message.endswith("pass the preset that it was trained with: imaml.evaluate(run, preset)")
    assert imaml.evaluate(tmp_path, other, EVALUATION_TASKS).value == uninterrupted.run.evaluation.value


def test_the_message_about_an_unknown_preset_of_a_run_saved_without_types_says_what_to_pass(uninterrupted, tmp_path):
    without_types(uninterrupted.run.directory, tmp_path, "mine")
    with pytest.raises(InputError, match=r"there is no preset 'mine'.*imaml\.evaluate\(run, preset\)"):
        imaml.evaluate(tmp_path)


@pytest.mark.slow("trains and evaluates a regression")
def test_a_preset_with_a_name_of_its_own_is_trained_and_evaluated(tmp_path, capsys, monkeypatch):
    # The components of this preset have types that imaml defines, so the folder alone can be evaluated.
    sinusoids = imaml.preset("sinusoid-5shot-gd")
    outer = replace(sinusoids.outer, steps=1, tasks=2, at_once=1)
    own = replace(sinusoids, name="mine", network=MLP(hidden=3), inner=bl.GradientDescent(0.01, 1), outer=outer)
    monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: sinusoid.load(data))
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    run = train(tmp_path, own)
    for what in (tmp_path, run):
        assert imaml.evaluate(what, tasks=EVALUATION_TASKS) == run.evaluation
    assert cli.main(["evaluate", str(tmp_path), "--tasks", str(EVALUATION_TASKS)]) == 0
    assert capsys.readouterr().out == f"{run.evaluation}\n"


@pytest.mark.slow("trains a run in two parts")
def test_a_run_saved_before_a_setting_existed_is_resumed(uninterrupted, tmp_path):
    stop_halfway(tmp_path)
    found = checkpoints.newest(tmp_path)
    config = found.description["config"]
    for section, name in (
        (config, "algorithm"),
        (config, "fidelity"),
        (config, "test_steps"),
        (config["outer"], "at_once"),
    ):
        del section[name]
    facts = {name: found.description[name] for name in ("preset", "data", "versions")} | {"config": config}
    checkpoints.save(tmp_path, STOP_AT, found.restore(initial_state(PRESET)), facts)
    train(tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    assert checkpoints.newest(tmp_path).description["config"] == PRESET.config()


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile"])
def test_another_algorithm_is_refused(name, uninterrupted):
    with pytest.raises(InputError, match=rf"other settings \(algorithm: imaml → {name}"):
        train(uninterrupted.run.directory, PRESET.using(name))


def test_data_that_differ_by_one_bit_are_refused(uninterrupted, tiny_pixels, monkeypatch):
    other = tiny_pixels.copy()
    other[3, 2, 5, 5] ^= 1
    monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: dataset(other))
    with pytest.raises(InputError, match="holds a run on other data"):
        train(uninterrupted.run.directory)


@pytest.fixture
def glyphs(monkeypatch, tiny_pixels):
    """A function that replaces the installed glyphs by the tiny images, each pixel XORed with a number."""

    def install(change=0):
        tiny = replace(dataset(tiny_pixels ^ change), name="glyphs")
        monkeypatch.setattr(datasets, "load", lambda name, data=None, meanwhile=None: tiny)

    install()
    return install


@pytest.mark.slow("trains a run in two parts")
def test_a_run_keeps_its_glyphs_and_does_not_depend_on_the_installed_ones(glyphs, uninterrupted, tmp_path):
    stop_halfway(tmp_path)
    glyphs(1)  # as if a later version of the package drew other glyphs
    assert imaml.evaluate(tmp_path, PRESET, EVALUATION_TASKS).tasks == EVALUATION_TASKS
    run = train(tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    for what in (tmp_path, run):
        assert imaml.evaluate(what, PRESET, EVALUATION_TASKS) == uninterrupted.run.evaluation


@pytest.mark.slow("trains a run in two parts")
def test_a_damaged_copy_of_the_glyphs_is_written_again_and_without_a_copy_other_glyphs_are_refused(glyphs, tmp_path):
    stop_halfway(tmp_path)
    copy = tmp_path / "glyphs.npz"
    intact = copy.read_bytes()
    copy.write_bytes(intact[: len(intact) // 2])
    train(tmp_path, on_warning=(warnings := []).append)
    assert copy.read_bytes() == intact and warnings[0].startswith(f"{copy} is damaged (")
    copy.unlink()
    glyphs(1)
    with pytest.raises(InputError, match=r"on other data than the present glyphs data.*install the matplotlib"):
        imaml.evaluate(tmp_path, PRESET, EVALUATION_TASKS)
    with pytest.raises(InputError, match="holds a run on other data"):
        train(tmp_path)
    assert not copy.exists()


def test_only_glyphs_are_copied(uninterrupted):
    assert uninterrupted.run.directory / "glyphs.npz" not in list(uninterrupted.run.directory.iterdir())


@pytest.mark.slow("trains on a full disk, twice")
@pytest.mark.parametrize("free_bytes", [0, 30_000])  # 30,000 bytes hold the log but no checkpoint
def test_a_full_disk_ends_the_run_and_keeps_the_old_checkpoint(free_bytes, small_disk, uninterrupted):
    stop_halfway(small_disk)
    before = (small_disk / f"checkpoint-{STOP_AT:08}.npz").read_bytes()
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - free_bytes)
    with pytest.raises(OSError) as caught:
        train(small_disk)
    assert caught.value.errno == errno.ENOSPC
    assert (small_disk / f"checkpoint-{STOP_AT:08}.npz").read_bytes() == before
    ballast.unlink()
    train(small_disk)
    assert_same_run(small_disk, uninterrupted)


def test_a_read_only_run_can_be_evaluated_but_not_trained(uninterrupted, sealed):
    files_before = contents(uninterrupted.run.directory)
    with sealed(files_before) as folder:
        with pytest.raises(OSError) as caught:
            train(folder)
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
        assert imaml.evaluate(folder, tasks=EVALUATION_TASKS, preset=PRESET) == uninterrupted.run.evaluation
        assert contents(folder) == files_before


@pytest.mark.slow("trains a run")
def test_a_second_run_in_the_folder_is_refused_and_the_first_continues(uninterrupted, tmp_path):
    refusals = []

    def intrude(progress):
        with pytest.raises(InputError, match=f"{tmp_path} is in use by process {os.getpid()} on ") as caught:
            train(tmp_path)
        refusals.append(caught)

    train(tmp_path, on_progress=intrude)
    assert len(refusals) == STEPS
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow("trains a run twice")
def test_a_damaged_checkpoint_is_reported_and_renamed_and_the_run_ends_with_the_same_bits(uninterrupted, tmp_path):
    train(tmp_path, checkpoint_seconds=0.0, keep_checkpoints=3)
    damaged = tmp_path / f"checkpoint-{STEPS:08}.npz"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    events = []
    train(tmp_path, on_event=events.append)
    (message,) = [event for event in events if "damaged" in event]
    assert message.startswith(f"{damaged} is damaged (")
    assert message.endswith("renamed, and an older checkpoint is used")
    assert (tmp_path / f"{damaged.name}.damaged").read_bytes() == content[: len(content) // 2]
    assert_same_run(tmp_path, uninterrupted)


def test_refusing_a_run_changes_no_file(tmp_path):
    train(tmp_path, checkpoint_seconds=0.0)
    (tmp_path / f"checkpoint-{STEPS:08}.npz").write_bytes(b"")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"strength: 0\.1 → 0\.7"):
        train(tmp_path, replace(PRESET, strength=0.7))
    assert contents(tmp_path) == before


@pytest.mark.slow("trains and evaluates a run")
def test_the_last_and_the_best_checkpoint_are_kept_and_the_best_can_be_evaluated(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setattr(runlog, "RECENT", 1)
    losses = {p.step: p.loss for p in uninterrupted.progress}
    # Stop after a step with a larger loss than the step before, so that the last checkpoint is not the best one.
    last = next(step for step in range(2, STEPS + 1) if losses[step] > losses[step - 1])
    train(tmp_path, checkpoint_seconds=0.0, keep_checkpoints=1, on_progress=stop_at(last))
    best = min(range(1, last), key=losses.get)
    names = {name for name in contents(tmp_path) if name.endswith(".npz")}
    assert names == {f"checkpoint-{step:08}.npz" for step in (best, last)}
    # The best checkpoint is selected by the loss on training tasks, as logged, not by the evaluation.
    assert checkpoints.best(tmp_path).loss == losses[best]
    theta = checkpoints.best(tmp_path).restore(initial_state(PRESET)).theta
    expected = imaml.evaluate(theta, PRESET, EVALUATION_TASKS)
    assert imaml.evaluate(tmp_path, PRESET, EVALUATION_TASKS, best=True) == expected


def test_temporary_files_of_a_killed_process_are_deleted_on_resuming(tmp_path):
    stop_halfway(tmp_path)
    ours, foreign = tmp_path / ".checkpoint-00000004.npz.0123456789abcdef.imaml-tmp", tmp_path / ".mine"
    ours.touch(), foreign.touch()
    train(tmp_path)
    assert not ours.exists() and foreign.exists()


@pytest.mark.slow("evaluates a run several times")
def test_a_smaller_evaluation_does_not_replace_a_result(uninterrupted, tmp_path):
    for name, content in contents(uninterrupted.run.directory).items():
        (tmp_path / name).write_bytes(content)
    before, warnings = contents(tmp_path), []
    again = train(tmp_path, evaluation_tasks=2, on_warning=warnings.append)
    assert again.evaluation.tasks == 2 and contents(tmp_path) == before
    result = tmp_path / "result.json"
    assert warnings == [f"{result} keeps its evaluation on 4 tasks, because the new one has only 2"]
    larger = train(tmp_path, evaluation_tasks=6).evaluation
    assert json.loads(result.read_text())["evaluations"] == larger.records()


@pytest.mark.slow("evaluates a run for each change", fast=("config", "no result"))
@pytest.mark.parametrize(
    "change",
    [
        lambda result: result | {"data": "other"},
        lambda result: result | {"config": result["config"] | {"seed": 5}},
        lambda result: result | {"types": result["types"] | {"episode": "imaml.Curve"}},
        lambda result: {name: value for name, value in result.items() if name != "evaluations"},
        lambda result: [],
    ],
    ids=["data", "config", "types", "no evaluations", "no result"],
)
def test_a_result_of_another_run_is_replaced(change, uninterrupted, tmp_path):
    for name, content in contents(uninterrupted.run.directory).items():
        (tmp_path / name).write_bytes(content)
    result = tmp_path / "result.json"
    result.write_text(json.dumps(change(json.loads(result.read_text()))))
    found = train(tmp_path, evaluation_tasks=2).evaluation
    assert json.loads(result.read_text())["evaluations"] == found.records()


def test_other_versions_are_reported_and_do_not_stop_a_run(uninterrupted, tmp_path, monkeypatch):
    stop_halfway(tmp_path)
    versions = training.versions()
    monkeypatch.setattr(training, "versions", lambda: versions | {"jax": "9.9"})
    events = []
    train(tmp_path, on_event=events.append)
    assert f"resuming with other versions, so last bits may differ (jax: {versions['jax']} → 9.9)" in events


def test_a_checkpoint_describes_its_run(uninterrupted):
    description = checkpoints.newest(uninterrupted.run.directory).description
    assert description["preset"] == PRESET.name and description["config"] == PRESET.config()
    assert description["types"] == PRESET.types()
    # The entry "source" says how to read one's own data again. A run on a dataset of this package does not save it.
    facts = {"preset", "config", "types", "data", "versions"}
    assert set(description) == facts | {"format", "step", "loss", "leaves"} and uninterrupted.run.dataset is None
    assert description["data"] == datasets.load("tiny").fingerprint()
    assert {"python", "jax", "jaxlib", "numpy", "imaml", "devices"} == set(description["versions"])
    leaves = [path for path, _, _ in description["leaves"]]
    assert {"key", "step"} <= set(leaves) and {path.split("/")[0] for path in leaves} == {
        "theta", "optimizer", "key", "step"
    }  # fmt: skip
