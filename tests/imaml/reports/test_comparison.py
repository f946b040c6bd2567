"""Tests of the table of several runs, made from the files in their folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_preset import tiny_preset

import imaml
from imaml.runs import checkpoints
from imaml.runs.log import LogWriter, Progress

GLYPHS = imaml.preset("glyphs-5way-1shot-gd")
VERSIONS = {"python": "3.11", "imaml": "0.2.0", "devices": "2 cpu"}


def write_run(directory, preset, step, evaluated=(), data="f" * 64, types=True, seconds=(1.0, 2.0)):
    """Write the files of a run without training one."""
    directory.mkdir()
    description = {"preset": preset.name, "config": preset.config(), "data": data, "versions": VERSIONS}
    description |= {"types": preset.types()} if types else {}
    checkpoints.save(directory, step, {"theta": np.zeros(2)}, description)
    with LogWriter(directory, 0) as log:
        for number, second in enumerate(seconds, 1):
            log.write(Progress(number, step, 1.0, 0.5, 4, 0.1, 0.1, {}, second))
    if evaluated:
        (directory / "result.json").write_text(json.dumps(description | {"evaluations": evaluated}))
    return directory


def evaluation(value, normalisation="query batch"):
    fields = {"metric": "accuracy", "value": value, "interval": 0.01, "chance": 0.2, "tasks": 600}
    return fields | {"normalisation": normalisation}


@pytest.fixture
def runs(tmp_path):
    """A finished run with two evaluations, and an unfinished one with another λ, inner solver and data."""
    outer = replace(GLYPHS.outer, steps=100)
    one = replace(GLYPHS, outer=outer)
    other = replace(one, strength=0.5, inner=imaml.preset("glyphs-5way-1shot-hf").inner)
    found = [evaluation(0.85), evaluation(0.8, "support set")]
    return [
        write_run(tmp_path / "one", one, 100, found, seconds=(50.0, 60.0, 2.0, 63.0)),
        write_run(tmp_path / "other", other, 40, data="0" * 64),
    ]


def test_the_table_has_the_results_the_cost_and_the_differences(runs):
    lines = str(imaml.compare(runs)).splitlines()
    assert "85.00 % ± 1.00 %  query batch" in lines[2] and "2:03" in lines[2] and "  100  " in lines[2]
    assert lines[3].split() == ["80.00", "%", "±", "1.00", "%", "support", "set"]
    assert "40 of 100" in lines[4] and "160" in lines[4] and "not finished" in lines[4]
    differences = {line.split()[0]: line.split()[1:] for line in lines[8:]}
    assert differences["strength"] == ["0.1", "0.5"] and differences["inner.step_size"] == ["0.2", "–"]
    assert differences["data"] == ["f" * 12, "0" * 12] and differences["inner.cg_steps"] == ["–", "5"]
    assert "seed" not in differences and "name" not in differences


def test_a_run_that_has_ended_without_an_evaluation_is_not_called_unfinished(tmp_path):
    ended = write_run(tmp_path / "ended", replace(GLYPHS, outer=replace(GLYPHS.outer, steps=100)), 100)
    line = str(imaml.compare([ended])).splitlines()[2]
    assert "not evaluated" in line and "not finished" not in line


def test_the_records_are_json_and_the_markdown_is_two_tables(runs):
    compared = imaml.compare(runs)
    records = json.loads(json.dumps(compared.records()))
    assert records["runs"][0]["evaluations"][0]["value"] == 0.85 and records["runs"][1]["evaluations"] == []
    assert records["runs"][0]["seconds"] == 123.0 and records["runs"][1]["tasks_seen"] == 160
    assert records["differences"]["strength"] == [0.1, 0.5]
    assert compared.table("markdown").count("\n| --- |") == 2


def test_parts_of_other_types_differ_and_types_that_were_not_saved_do_not(tmp_path):
    preset = replace(GLYPHS, episode=replace(GLYPHS.episode, queries=2))
    other = replace(preset, network=tiny_preset(1).network)
    one, two = write_run(tmp_path / "one", preset, 3), write_run(tmp_path / "two", other, 3)
    types = imaml.compare([one, two]).differences["type of network"]
    assert types[0] == "imaml.Conv4" and types[1].endswith("TinyMLP")
    old = write_run(tmp_path / "old", preset, 3, types=False)
    assert imaml.compare([one, old]).differences == {}
    assert "same settings and data" in str(imaml.compare([one, old]))


def test_the_result_and_settings_of_an_earlier_version_are_compared(tmp_path):
    directory = write_run(tmp_path / "one", GLYPHS, 3)
    former = {"accuracy": 0.8, "interval": 0.02, "tasks": 600, "normalisation": "query batch, as published"}
    (directory / "result.json").write_text(json.dumps({"evaluation": former}))
    assert imaml.compare([directory]).records()["runs"][0]["evaluations"][0]["normalisation"] == "query batch"


def test_no_run_and_a_damaged_result_are_refused(tmp_path):
    with pytest.raises(imaml.InputError, match="no run to compare"):
        imaml.compare([])
    with pytest.raises(imaml.InputError, match="holds no intact checkpoint"):
        imaml.compare([tmp_path])
    directory = write_run(tmp_path / "one", GLYPHS, 3)
    (directory / "result.json").write_text("{")
    with pytest.raises(imaml.InputError, match=r"result\.json is damaged"):
        imaml.compare([directory])
