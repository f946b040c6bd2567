"""The report on the paper study shows the numbers of the records, and docs/reproducing.md contains its tables."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks import paper_study_report as report

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reproducing.md"
RECORD = {
    "name": "literal",
    "settings": {"factor": "nothing"},
    "test": {"accuracy": 0.5, "interval": 0.02, "tasks": 300},
    "curve": [
        {
            "step": 50, "accuracy": 0.3, "inner_residual": 2.0, "linear_residual": 0.5, "counted": 1.0,
            "statuses": {"NEGATIVE_CURVATURE": 0.5},
        },
        {
            "step": 100, "accuracy": 0.4, "inner_residual": 3.0, "linear_residual": 0.3, "counted": 0.5,
            "statuses": {"BUDGET_USED": 1.0},
        },
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


def test_a_row_shows_the_numbers_of_its_records():
    again = changed(test={"accuracy": 0.4, "interval": 0.01, "tasks": 300})
    assert report.row(RECORD, again) == (
        "nothing", "50.0 ± 2.0", "40.0 ± 1.0", "30 → 40", "-2 to 4", "30%", "40.0%", "25%", "25%", "(50%)",
    )  # fmt: skip
    assert report.row(RECORD)[2] == "—"


def test_the_table_of_a_long_run_shows_means_over_the_steps_before_a_milestone():
    line = report.course(RECORD).splitlines()
    assert line[2:] == ["| 100 | 35 | 2.50 | 0.40 | 25% |"]


def test_the_literal_setting_comes_first_then_the_others_by_accuracy(tmp_path):
    for name, accuracy in (("a", 0.6), ("b", 0.9), ("literal", 0.5)):
        test = RECORD["test"] | {"accuracy": accuracy}
        (tmp_path / f"{name}.json").write_text(json.dumps(changed(name=name, test=test)))
    assert [record["name"] for record in report.read(tmp_path)] == ["literal", "b", "a"]


def test_a_row_without_a_certificate_shows_no_correction():
    last = {name: value for name, value in RECORD["probes"][-1].items() if name not in ("correction", "gradient")}
    assert report.row(changed(probes=[last]))[-1] == "—"


@pytest.mark.parametrize("others", [1, 4, 5])
def test_any_number_of_variants_gives_a_picture(others, tmp_path):
    records = [RECORD, *(changed(name=f"other {number}") for number in range(others))]
    for draw in (report.draw, report.draw_long):
        assert draw(records, tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_tables_of_the_records():
    page = PAGE.read_text(encoding="utf-8")
    assert report.table(report.read(), report.read(report.RESULTS / report.SEED_1)) in page
    long = report.read(report.RESULTS / report.LONG)
    assert long
    for record in long:
        assert report.course(record) in page


@pytest.mark.parametrize("folder", ["", report.SEED_1, report.LONG])
def test_all_records_of_a_folder_have_the_same_length_split_and_seed(folder):
    records = report.read(report.RESULTS / folder)
    assert records[0]["name"] == "literal"
    assert len({(record["steps"], record["split"], record["seed"], record["test"]["tasks"]) for record in records}) == 1
