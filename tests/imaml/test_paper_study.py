"""The study of the paper's setting: what its report says is what its records hold, and the page shows just that."""

import copy
from pathlib import Path

import pytest

from benchmarks import paper_study_report as report

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reproducing.md"
RECORD = {
    "name": "literal",
    "settings": {"factor": "nothing"},
    "test": {"accuracy": 0.5, "interval": 0.02, "tasks": 300},
    "curve": [
        {"step": 50, "accuracy": 0.3, "linear_residual": 0.5, "counted": 1.0, "statuses": {"NEGATIVE_CURVATURE": 0.5}},
        {"step": 100, "accuracy": 0.4, "linear_residual": 0.3, "counted": 0.5, "statuses": {"BUDGET_USED": 1.0}},
    ],
    "probes": [
        {
            "lowest_ritz": [-1.0, -2.0], "highest_ritz": [3.0, 4.0], "inner_residual_left": [0.2, 0.4],
            "gradient": 2.0, "correction": 1.0, "first_order": False,
        },
    ],
}  # fmt: skip


def changed(**changes):
    return copy.deepcopy(RECORD) | changes


def test_a_row_says_what_its_record_holds():
    assert report.row(RECORD) == (
        "nothing", "50.0 ± 2.0", "30 → 40", "-2 to 4", "30%", "40.0%", "25%", "25%", "(50%)",
    )  # fmt: skip


def test_the_literal_setting_comes_first_then_the_best(tmp_path):
    import json

    for name, accuracy in (("a", 0.6), ("b", 0.9), ("literal", 0.5)):
        test = RECORD["test"] | {"accuracy": accuracy}
        (tmp_path / f"{name}.json").write_text(json.dumps(changed(name=name, test=test)))
    assert [record["name"] for record in report.read(tmp_path)] == ["literal", "b", "a"]


@pytest.mark.parametrize("others", [1, 4, 5])
def test_any_number_of_variants_gives_a_picture(others, tmp_path):
    records = [RECORD, *(changed(name=f"other {number}") for number in range(others))]
    assert report.draw(records, tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_table_of_the_records():
    assert report.table(report.read()) in PAGE.read_text(encoding="utf-8")


def test_the_records_are_of_one_length_and_one_split():
    records = report.read()
    assert {record["name"] for record in records} >= {"literal", "kernel-gain", "summed-loss"}
    assert len({(record["steps"], record["split"], record["seed"], record["test"]["tasks"]) for record in records}) == 1
