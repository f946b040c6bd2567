"""Reproduction of the paper: records, table 2, figure 2a with fewer tasks, and figure 2b with a small network."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import imaml
from imaml import cli, datasets
from imaml.arguments import parse
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.errors import InputError
from imaml.learning.networks import mlp
from imaml.reproduction import commands, gradient_error, memory, paper, pictures, records, table, trained
from imaml.runs import checkpoints, parameters
from imaml.runs import log as runlog
from imaml.runs.evaluation import evaluate_classes
from imaml.runs.meta_step import initial_state
from imaml.runs.start import read_start
from imaml.settings.parts import Validation
from imaml.settings.published_presets import restore
from imaml.storage import safetensors

PACKAGE = Path(__file__).resolve().parents[3] / "imaml"
OMNIGLOT = imaml.preset("omniglot-5way-1shot-gd")
EVALUATION = {
    "metric": "accuracy", "value": 0.9512, "interval": 0.0034, "chance": 0.2, "tasks": 600,
    "normalisation": "query batch",
}  # fmt: skip


def finished_run(directory, seconds=(1.0, 2.0, 3.0), preset=OMNIGLOT):
    """Write the log and the result of a run with one meta-step for each entry of ``seconds``, and return the folder."""
    directory.mkdir()
    preset = dataclasses.replace(preset, outer=dataclasses.replace(preset.outer, steps=len(seconds)))
    steps = [
        runlog.Progress(step, len(seconds), 1.0, 0.5, 4, 0.1, 0.1, {}, at) for step, at in enumerate(seconds, start=1)
    ]
    with runlog.LogWriter(directory, 0) as log:
        for progress in steps:
            log.write(progress)
    result = {"preset": preset.name, "config": preset.config(), "data": "ab" * 32, "versions": {"devices": "2 cpu"}}
    (directory / "result.json").write_text(json.dumps(result | {"evaluations": [EVALUATION]}))
    return directory


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


# --- Records -------------------------------------------------------------------------------------------------------


def test_a_record_holds_the_runs_results_and_can_be_read_from_its_file(run, tmp_path):
    made = records.of_run(run, note="a note", hardware="an abacus")
    made.write(tmp_path / "made.json")
    assert records.read(tmp_path) == [made]
    assert made.cell == paper.Cell("imaml-gd", 5, 1)
    assert (made.algorithm, made.fidelity, made.split) == ("imaml", "paper", "ab" * 32)
    assert (made.meta_steps, made.tasks_seen) == (3, 3 * OMNIGLOT.outer.tasks)
    assert made.evaluations == (EVALUATION,) and made.hardware == "an abacus"


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ((1.0, 2.0, 3.0), (3.0, 1)),
        ((1.0, 2.0, 0.5, 4.0), (6.0, 2)),
        ((5.0, 1.0, 2.0, 0.5), (7.5, 3)),
        ((7.0,), (7.0, 1)),
    ],
)
def test_seconds_are_summed_over_all_processes_of_a_resumed_run(seconds, expected, tmp_path):
    made = records.of_run(finished_run(tmp_path / "run", seconds))
    assert (made.seconds, made.stretches) == expected


@pytest.mark.parametrize("algorithm, row", [("imaml", "imaml-gd"), ("maml", "maml"), ("reptile", "reptile")])
def test_a_records_command_gives_the_same_settings(algorithm, row, tmp_path):
    chosen = OMNIGLOT.using(algorithm)
    changed = dataclasses.replace(chosen, outer=dataclasses.replace(chosen.outer, learning_rate=0.25), seed=7)
    run = finished_run(tmp_path / "run", preset=changed)
    made = records.of_run(run)
    assert made.cell == paper.Cell(row, 5, 1)
    words = made.command.split()
    assert words[:3] == ["imaml", "train", OMNIGLOT.name]
    again = parse(words[1:]).chosen
    assert again.config() == json.loads((run / "result.json").read_text())["config"]


def test_a_run_with_a_part_of_another_type_has_no_record(run):
    path = run / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"types": OMNIGLOT.types()}))
    assert records.of_run(run).command.startswith(f"imaml train {OMNIGLOT.name}")
    path.write_text(json.dumps(result | {"types": OMNIGLOT.types() | {"episode": "mine.Episode"}}))
    with pytest.raises(InputError, match=r"the run has other types \(episode: imaml.Episode → mine.Episode\)"):
        records.of_run(run)


def test_a_run_on_another_dataset_has_no_cell_in_the_table(tmp_path):
    glyphs = records.of_run(finished_run(tmp_path / "run", preset=imaml.preset("glyphs-5way-1shot-gd")))
    assert glyphs.cell is None
    assert table.table_2([glyphs]) == table.table_2([])


@pytest.fixture
def by_alphabets(tmp_path):
    """The folder of a finished run on the split of Omniglot by whole alphabets."""
    return finished_run(tmp_path / "by-alphabets", preset=dataclasses.replace(OMNIGLOT, dataset="omniglot-alphabets"))


def test_a_run_on_the_split_by_alphabets_fills_no_cell_and_is_shown_apart(run, by_alphabets):
    made, pooled = records.of_run(by_alphabets), records.of_run(run)
    assert made.cell is None and made.cell_on("omniglot-alphabets") == paper.Cell("imaml-gd", 5, 1)
    for among in ([], [pooled]):
        first, second = table.table_2([*among, made]).split(f"\n\n{table.TITLE_BY_ALPHABETS}\n\n")
        assert first == table.table_2(among)
        (line,) = (line for line in second.splitlines() if "iMAML, gradient descent" in line)
        assert "5-way 1-shot" in line and "95.12 ± 0.34" in line and "99.16" not in second
        assert f"[{len(among) + 1}] {made.command}; 24 tasks" in second
    assert "dataset omniglot-alphabets" in table.TITLE_BY_ALPHABETS
    markdown = table.table_2([made], "markdown").split(table.TITLE_BY_ALPHABETS)[1].splitlines()
    counts = {line.count("|") for line in markdown if line.startswith("|")}
    assert counts == {len(table.HEADER_BY_ALPHABETS) + 1}


def test_the_second_table_is_sorted_like_the_first_and_shows_every_task(by_alphabets):
    made = records.of_run(by_alphabets)
    maml = dataclasses.replace(made, algorithm="maml")
    longer = dataclasses.replace(made, meta_steps=9)
    ten = dataclasses.replace(made, config=made.config | {"episode": made.config["episode"] | {"ways": 10}})
    assert [row.record for row in table.rows_by_alphabets([ten, made, longer, maml])] == [maml, longer, made, ten]


def test_the_command_of_a_record_names_another_dataset_than_the_presets(by_alphabets):
    made = records.of_run(by_alphabets)
    assert made.command == f"imaml train {OMNIGLOT.name} --dataset omniglot-alphabets --outer.steps 3"
    options = parse(made.command.split()[1:])
    assert dataclasses.replace(options.chosen, dataset=options.dataset).config() == made.config


def test_the_numbers_of_the_other_split_are_not_among_those_of_the_table(run, by_alphabets, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for number, folder in enumerate((run, by_alphabets)):
        records.of_run(folder).write(kept / f"{number}.json")
    made = commands.reproduce("table2", kept)
    assert sum(row["ours"] is not None for row in made.result) == 1 and len(made.result) == 20
    (other,) = made.other_splits
    assert other["dataset"] == "omniglot-alphabets" and "paper" not in other and other["ours"] == EVALUATION


def test_an_unfinished_or_damaged_run_is_not_recorded(run, tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        records.of_run(tmp_path)
    log = run / runlog.FILE
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="one line for each of 3 meta-steps, but has 2 intact lines"):
        records.of_run(run)
    (run / "result.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        records.of_run(run)


def with_facts(run, **facts):
    """Add facts to the result of a run."""
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | facts))


@pytest.mark.parametrize("fact, words", [("start", "do not come with the package"), ("extended", "was extended")])
def test_a_run_that_no_command_trains_again_is_not_recorded(fact, words, run):
    with_facts(run, **{fact: {"sha256": "ab" * 32}})
    with pytest.raises(InputError, match=words):
        records.of_run(run)


def test_a_run_that_started_from_a_record_in_the_package_is_recorded_with_its_name(run, tmp_path):
    name = "omniglot-5way-1shot-gd-320000-tasks"
    origin = records.read_one(records.KEPT / f"{name}.json")
    theta, facts = read_start(OMNIGLOT, name, pytest.fail)
    with_facts(run, data=origin.split, **facts)
    made = records.of_run(run)
    assert (made.start, made.tasks_seen) == (name, 3 * OMNIGLOT.outer.tasks)
    assert made.command == f"imaml train {OMNIGLOT.name} --outer.steps 3 --start {name}"
    options = parse(made.command.split()[1:])
    assert str(options.start) == name and options.chosen.config() == made.config
    assert "; 24 tasks more, " in table.table_2([made])
    made.write(tmp_path / "made.json")
    trained.save(tmp_path / "made.safetensors", theta, OMNIGLOT, made)
    assert records.read_one(tmp_path / "made.json") == made
    assert imaml.load(tmp_path / "made.safetensors").facts["start"] == {"from": name}


def test_a_run_that_started_from_a_record_on_another_split_is_not_recorded(run):
    with_facts(run, **read_start(OMNIGLOT, "omniglot-5way-1shot-gd-320000-tasks", pytest.fail)[1])
    with pytest.raises(InputError, match="was trained on another split"):
        records.of_run(run)


def test_a_run_that_stopped_early_is_recorded_with_the_command_and_the_meta_steps_done(tmp_path):
    preset = dataclasses.replace(OMNIGLOT, validation=Validation(every=1, patience=2, held_out=0.1))
    run = finished_run(tmp_path / "run", preset=preset)
    result = json.loads((run / "result.json").read_text())
    result["config"]["outer"]["steps"] = 100
    (run / "result.json").write_text(json.dumps(result | {"meta_steps": 3}))
    made = records.of_run(run)
    assert made.meta_steps == 3
    options = "--outer.steps 100 --validation.every 1 --validation.patience 2 --validation.held_out 0.1"
    assert made.command == f"imaml train {OMNIGLOT.name} {options}"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1, "preset": "mine"}', '{"format": 99}'])
def test_a_file_that_is_not_a_record_is_named(content, tmp_path):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(InputError, match=r"odd\.json"):
        records.read(tmp_path)


def test_the_packages_records_are_complete_and_belong_to_a_cell():
    for record in records.read():
        cells = [record.cell_on(dataset) for dataset in ("omniglot", "omniglot-alphabets")]
        assert sum(cell in paper.TABLE_2 for cell in cells) == 1
        assert record.seconds > 0 and record.hardware and record.command
        assert len(record.split) == 64 and record.evaluations
        for evaluation in record.evaluations:
            assert 0 <= evaluation["value"] <= 1 and evaluation["tasks"] >= 2


# --- Table 2 -------------------------------------------------------------------------------------------------------


def test_table_2_has_the_printed_numbers():
    assert len(paper.TABLE_2) == 20
    assert paper.TABLE_2[paper.Cell("imaml-hf", 20, 5)] == (99.14, 0.1, "99.14 ± 0.1")
    assert paper.TABLE_2[paper.Cell("maml", 5, 1)][:2] == (98.7, 0.4)
    assert paper.TABLE_2[paper.Cell("imaml-gd", 20, 1)][:2] == (94.46, 0.42)


def test_a_cell_without_a_record_prints_not_run(run):
    empty = table.table_2([])
    assert empty.count(table.NOT_RUN) == 20
    one = table.table_2([records.of_run(run)])
    assert one.count(table.NOT_RUN) == 19 and "1 of 20 cells have a record" in one


@pytest.mark.parametrize("form", commands.FORMS)
def test_a_cell_shows_every_evaluation_of_its_run(form, run):
    made = records.of_run(run)
    support = EVALUATION | {"value": 0.9, "normalisation": "support set"}
    made = dataclasses.replace(made, evaluations=(EVALUATION, support))
    lines = table.table_2([made], form).splitlines()
    ours = [line for line in lines if "iMAML, gradient descent" in line and "5-way 1-shot" in line]
    assert len(ours) == 2
    assert "99.16 ± 0.35" in ours[0] and "95.12 ± 0.34" in ours[0] and "query batch" in ours[0] and "paper" in ours[0]
    assert "90.00 ± 0.34" in ours[1] and "support set" in ours[1] and "abababab" in ours[1]


def test_markdown_has_as_many_columns_in_every_line(run):
    lines = [line for line in table.table_2([records.of_run(run)], "markdown").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(table.HEADER) + 1}


# --- Figure 2a -----------------------------------------------------------------------------------------------------

STEPS = (1, 4, 16, 64)


@pytest.fixture(scope="module")
def errors():
    return gradient_error.gradient_errors(STEPS, gradient_error.CG_STEPS, tasks=4)


@pytest.mark.slow("compiles both algorithms with several numbers of steps")
def test_implicit_maml_has_smaller_errors_than_maml_after_equal_steps(errors):
    maml = np.array(errors["MAML"])
    assert (np.array(errors["iMAML, 11 CG steps"]) < maml).all()
    # Compare the first two entries only. After more inner steps, 5 CG steps are the larger source of error.
    assert (np.array(errors["iMAML, 5 CG steps"])[:2] < maml[:2]).all()


@pytest.mark.slow("compiles both algorithms with several numbers of steps")
def test_errors_fall_with_inner_steps(errors):
    for name in ("MAML", "iMAML, 11 CG steps"):
        assert (np.diff(errors[name]) < 0).all(), name


@pytest.mark.slow("compiles both algorithms with several numbers of steps")
def test_the_error_of_too_few_cg_steps_remains_after_many_inner_steps(errors):
    two, five, eleven = (errors[f"iMAML, {count} CG steps"][-1] for count in gradient_error.CG_STEPS)
    assert two > 5 * five > 5 * eleven
    assert two > errors["MAML"][-1]


def test_the_closed_form_is_the_derivative_of_the_solved_problem():
    theta, batch = gradient_error.draw(tasks=1)
    task = imaml.Task(*(array[0] for array in dataclasses.astuple(batch)))
    strength, direction = gradient_error.STRENGTH, np.random.default_rng(1).normal(size=theta.shape)

    def value(theta):
        x, y = task.support_x, task.support_y
        phi = np.linalg.solve(x.T @ x / len(x) + strength * np.eye(len(theta)), x.T @ y / len(x) + strength * theta)
        return 0.5 * np.mean((task.query_x @ phi - task.query_y) ** 2)

    h = 1e-4  # The value is quadratic in θ, so central differences are exact up to rounding.
    slope = (value(theta + h * direction) - value(theta - h * direction)) / (2 * h)
    assert slope == pytest.approx(gradient_error.exact(theta, task)[0] @ direction, rel=1e-7)


# --- Figure 2b -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def needed():
    """Compute the memory for a small network on eight pixels of many images.

    A step's intermediate values then need more memory than the parameters.
    """
    network = mlp((8, 8, 2))
    few = dataclasses.replace(network, apply=lambda theta, x: network.apply(theta, x.reshape(len(x), -1)[:, ::98]))
    return memory.memory((16, 508, 1000), few, ways=2, shots=20)


@pytest.mark.slow("compiles a network with several numbers of inner steps")
def test_the_memory_of_implicit_maml_is_the_same_for_every_number_of_steps(needed):
    few, middle, many = needed.temporary["iMAML, 5 CG steps"]
    assert few == middle == many > 0


@pytest.mark.slow("compiles a network with several numbers of inner steps")
def test_the_memory_of_unrolled_maml_is_linear_in_the_number_of_steps(needed):
    few, middle, many = needed.temporary["MAML, unrolled"]
    assert (many - few) / (1000 - 16) > 4 * 40 * 8  # Each step stores at least the hidden layer's outputs.
    assert middle == pytest.approx((few + many) / 2, rel=0.01)


@pytest.mark.slow("compiles a network with several numbers of inner steps")
def test_recomputation_needs_more_memory_than_implicit_maml_and_less_than_unrolling(needed):
    implicit, unrolled = (needed.temporary[name][-1] for name in ("iMAML, 5 CG steps", "MAML, unrolled"))
    assert implicit < needed.temporary["MAML, steps recomputed"][-1] < unrolled


# --- The commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("reproduce tabel2", "no table or figure 'tabel2': did you mean table2? known: table2, figure2a, figure2b"),
        ("reproduce table2 --format html", "there is no format 'html': known: terminal, markdown"),
        ("reproduce figure2a --records .", "figure2a is computed by this command and reads no records"),
        ("reproduce table2 --records nowhere", "there is no folder nowhere of records"),
        ("reproduce", "required: NAME"),
        ("record nowhere", "there is no finished run in nowhere"),
        ("record", "required: RUN"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_in_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    assert cli.main(arguments.split()) == 2
    message = capsys.readouterr().err
    assert expected in message and len(message.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """The folder of a finished run with a checkpoint, and the state in that checkpoint."""
    network = dataclasses.replace(OMNIGLOT.network, filters=2)
    run = finished_run(
        tmp_path_factory.mktemp("trained") / "run", preset=dataclasses.replace(OMNIGLOT, network=network)
    )
    content = json.loads((run / "result.json").read_text())
    state = initial_state(restore(content["preset"], content["config"]))
    checkpoints.save(run, 3, state, content)
    return run, state


def test_a_run_is_recorded_and_shown_in_the_table_with_a_picture(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    kept, out = tmp_path / "kept", tmp_path / "out"
    assert cli.main(["record", str(trained_run[0]), "--out", str(kept), "--note", "short"]) == 0
    assert "iMAML, gradient descent" in capsys.readouterr().out
    assert cli.main(["reproduce", "table2", "--records", str(kept), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "95.12 ± 0.34" in shown and "short" in shown and str(out / "table2.png") in shown
    assert [path.name for path in out.iterdir()] == ["table2.png"]


# --- Trained parameters --------------------------------------------------------------------------------------------


def blank_omniglot(monkeypatch, fingerprint):
    """Replace the datasets by random images whose fingerprint is ``fingerprint``, and return the test classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 28, 28, 1), dtype=np.uint8)
    train, classes = (ImageClasses(pixels, tuple(f"{split}{i}" for i in range(6))) for split in ("train", "test"))
    dataset = ImageDataset("omniglot", train, classes)
    monkeypatch.setattr(type(dataset), "fingerprint", lambda self: fingerprint)
    monkeypatch.setattr(datasets, "load", lambda name, data=None: dataset)
    return classes


@pytest.mark.slow("compiles an evaluation of a convolutional network")
def test_recorded_parameters_have_the_evaluation_of_the_run(trained_run, tmp_path, monkeypatch):
    run, state = trained_run
    commands.record(run, tmp_path)
    assert parameters.names(tmp_path) == ("run",)
    classes = blank_omniglot(monkeypatch, "ab" * 32)
    record = records.read_one(tmp_path / "run.json")
    expected = evaluate_classes(state.theta, restore(record.preset, record.config), classes, 4)
    assert trained.evaluate("run", 4, directory=tmp_path) == expected


def test_recorded_parameters_equal_those_of_the_run(trained_run, tmp_path):
    run, state = trained_run
    commands.record(run, tmp_path)
    record = records.read_one(tmp_path / "run.json")
    theta = trained.load(tmp_path / "run.safetensors", restore(record.preset, record.config))
    assert jax.tree.structure(theta) == jax.tree.structure(state.theta)
    for ours, theirs in zip(jax.tree.leaves(theta), jax.tree.leaves(state.theta), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_parameters_are_refused_with_other_data_or_another_network(trained_run, tmp_path, monkeypatch):
    commands.record(trained_run[0], tmp_path)
    with pytest.raises(InputError, match=r"the arrays in .*run\.safetensors do not fit the network"):
        trained.load(tmp_path / "run.safetensors", OMNIGLOT)
    half = {name: np.asarray(leaf, np.float16) for name, leaf in checkpoints.named_leaves(trained_run[1].theta)}
    safetensors.write(tmp_path / "half.safetensors", half, {})
    record = records.read_one(tmp_path / "run.json")
    with pytest.raises(InputError, match=r"half\.safetensors is float16, but should be float32"):
        trained.load(tmp_path / "half.safetensors", restore(record.preset, record.config))
    (tmp_path / "half.safetensors").unlink()
    blank_omniglot(monkeypatch, "cd" * 32)
    with pytest.raises(InputError, match="run was trained on other data than the present omniglot data"):
        trained.evaluate("run", 4, directory=tmp_path)
    with pytest.raises(InputError, match="no record with trained parameters 'rum': did you mean run"):
        trained.evaluate("rum", 4, directory=tmp_path)
    (tmp_path / "run.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"run\.safetensors is damaged"):
        trained.evaluate("run", 4, directory=tmp_path)


@pytest.mark.parametrize("name", parameters.names())
def test_the_name_of_a_record_loads_the_learner_that_its_run_trained(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = records.read_one(records.KEPT / f"{name}.json")
    learner = imaml.load(name)
    theta = trained.load(records.KEPT / f"{name}.safetensors", restore(record.preset, record.config))
    jax.tree.map(np.testing.assert_array_equal, learner.theta, theta)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(theta))
    assert learner.preset == restore(record.preset, record.config)
    facts = {"data": record.split, "step": record.meta_steps, "versions": record.versions}
    assert learner.facts == facts | ({"start": {"from": record.start}} if record.start else {})


def test_the_parameters_of_a_record_start_a_run_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "omniglot-5way-1shot-gd-320000-tasks"
    record = records.read_one(records.KEPT / f"{name}.json")
    preset = restore(record.preset, record.config)
    theta, facts = read_start(preset, name, pytest.fail)
    jax.tree.map(np.testing.assert_array_equal, theta, imaml.load(name).theta)
    assert facts["start"]["from"] == str(records.KEPT / f"{name}.safetensors")
    assert facts["start"]["data"] == record.split
    with pytest.raises(InputError, match=f"no record of that name: did you mean {name}"):
        imaml.load(f"{name}s")
    for other in ("omniglot-5way-1shot-gd", f"{tmp_path}/{name}"):  # the folder of a run that does not exist
        with pytest.raises(InputError, match=r"there is no run in .*: it holds no intact checkpoint$"):
            imaml.load(other)
    with pytest.raises(InputError, match="there is no file"):
        imaml.load(f"{name}.npz")
    with pytest.raises(InputError, match=f"imaml evaluate --record {name} evaluates the record"):
        imaml.evaluate(name)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="there is no run in"):
        imaml.load(name)


@pytest.mark.slow("compiles both algorithms with several numbers of steps")
def test_a_figure_writes_its_picture_and_its_data(tmp_path, errors, monkeypatch):
    monkeypatch.setattr(gradient_error, "gradient_errors", lambda: errors)
    text = str(commands.reproduce("figure2a", out=tmp_path))
    assert "MAML" in text and sorted(path.name for path in tmp_path.iterdir()) == ["figure2a.json", "figure2a.png"]
    kept = json.loads((tmp_path / "figure2a.json").read_text())
    assert kept["command"] == "imaml reproduce figure2a" and kept["result"]["steps"] == list(STEPS)
    assert dict(kept["result"]["curves"])["MAML"] == list(errors["MAML"])


@pytest.mark.slow("compiles a network with several numbers of inner steps")
def test_the_memory_picture_depends_on_the_measured_memory(tmp_path, needed):
    first = pictures.memory(tmp_path / "one.png", needed.steps, needed.temporary).read_bytes()
    doubled = {name: [2 * size for size in sizes] for name, sizes in needed.temporary.items()}
    second = pictures.memory(tmp_path / "two.png", needed.steps, doubled).read_bytes()
    assert first.startswith(b"\x89PNG") and first != second


def test_importing_pictures_loads_neither_jax_nor_matplotlib():
    code = f"""
import sys, types
for name, folder in (("imaml", {str(PACKAGE)!r}), ("imaml.reproduction", {str(PACKAGE / "reproduction")!r})):
    package = types.ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
import imaml.reproduction.pictures
sys.exit(", ".join({{"jax", "jaxlib", "bilevel", "matplotlib"}} & set(sys.modules)) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
