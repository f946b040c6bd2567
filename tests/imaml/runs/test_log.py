"""The log: written lines are read back, truncated lines are skipped, and a resumed log contains each step once."""

import json
import os

import pytest

from imaml.runs import log as runlog
from imaml.runs.log import LogWriter, Progress


def progress(step, loss=1.5):
    return Progress(step, 10, loss, 0.25, 4, 1e-3, 0.1, {"BUDGET_USED": 3, "NONFINITE": 1}, 0.5 * step)


def write(directory, steps, start=0):
    with LogWriter(directory, start) as log:
        for step in steps:
            log.write(progress(step))


def steps(directory):
    return [entry.step for entry in runlog.read_log(directory)]


def test_written_entries_are_read_back(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert runlog.read_log(tmp_path) == [progress(1), progress(2), progress(3)]


def test_there_is_one_line_of_json_for_each_step(tmp_path):
    write(tmp_path, [1, 2])
    lines = (tmp_path / runlog.FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_step_can_be_read_before_the_next_one_is_written(tmp_path):
    with LogWriter(tmp_path, 0) as log:
        log.write(progress(1))
        assert steps(tmp_path) == [1]


def test_a_missing_log_reads_as_empty(tmp_path):
    assert runlog.read_log(tmp_path) == []


def test_a_truncated_last_line_is_skipped(tmp_path):
    write(tmp_path, [1, 2, 3])
    file = tmp_path / runlog.FILE
    file.write_text(file.read_text()[:-5])
    assert steps(tmp_path) == [1, 2]


def test_damaged_lines_are_skipped(tmp_path):
    write(tmp_path, [1, 2, 3])
    file = tmp_path / runlog.FILE
    first, _, third = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + b'{"step": \xff\n' + b"[]\n" + third)
    assert steps(tmp_path) == [1, 3]
    write(tmp_path, [4], start=3)
    assert steps(tmp_path) == [1, 3, 4]


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], start=2)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_resuming_after_a_truncated_line_writes_complete_lines(tmp_path):
    write(tmp_path, [1, 2, 3])
    file = tmp_path / runlog.FILE
    file.write_text(file.read_text()[:-5])
    write(tmp_path, [3, 4], start=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_failing_rewrite_keeps_the_old_log(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("imaml.storage.files.os.replace", fail)
        with pytest.raises(OSError, match="no space"):
            LogWriter(tmp_path, 1)
    assert steps(tmp_path) == [1, 2, 3]


def test_the_log_is_on_disk_after_a_sync(tmp_path, monkeypatch):
    flushed = []
    with LogWriter(tmp_path, 0) as log:
        log.write(progress(1))
        monkeypatch.setattr("imaml.runs.log.os.fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
        log.sync()
    assert flushed == [(tmp_path / runlog.FILE).stat().st_ino]


def test_the_recent_loss_is_a_mean_over_the_last_steps_across_a_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "RECENT", 3)
    means = []
    for first, last in ((1, 2), (3, 5)):  # The run is resumed after its second step.
        with LogWriter(tmp_path, first - 1) as log:
            for step in range(first, last + 1):
                log.write(progress(step, loss=2.0**-step))
                means.append(log.recent_loss)
    infinity = float("inf")  # The mean of fewer than RECENT steps counts as infinite.
    assert means == [infinity, infinity, (1 / 2 + 1 / 4 + 1 / 8) / 3, (1 / 4 + 1 / 8 + 1 / 16) / 3, 7 / 32 / 3]


def test_the_least_mean_loss_of_100_steps_is_found_with_its_last_step():
    entries = [progress(step, loss) for step, loss in enumerate([3.0] * 50 + [1.0] * 120 + [2.0] * 100, start=1)]
    assert runlog.losses_of(entries) == (1.0, 150, 2.0)
    assert runlog.losses_of(entries[:99]) is None


def test_a_loss_that_is_not_a_number_counts_as_infinite():
    entries = [progress(step, loss) for step, loss in enumerate([float("nan")] + [1.0] * 100, start=1)]
    assert runlog.losses_of(entries) == (1.0, 101, 1.0)
    assert runlog.losses_of(entries[:100]) == (float("inf"), 100, float("inf"))
