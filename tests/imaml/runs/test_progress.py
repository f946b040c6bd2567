"""Tests of the progress output: a bar on one line of a terminal, and a plain line every ten seconds in a file."""

import io
from dataclasses import replace

import pytest

from imaml.runs.log import Progress
from imaml.runs.progress import Reporter, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock. The fixture is a list of one number, the time in seconds, that a test increases."""
    now = [100.0]
    monkeypatch.setattr("imaml.runs.progress.time.monotonic", lambda: now[0])
    return now


def progress(step, steps=100, loss=1.0, accuracy=0.5, seconds=None):
    return Progress(step, steps, loss, accuracy, 4, 1e-3, 0.1, {}, 2.0 * step if seconds is None else seconds)


def run(stream, clock, interval, steps=100):
    """Return a reporter after ``steps`` meta-steps that are ``interval`` seconds apart."""
    reporter = Reporter(stream)
    for step in range(1, steps + 1):
        reporter.step(progress(step, steps))
        clock[0] += interval
    return reporter


def test_a_terminal_gets_one_line_that_is_redrawn(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    run(terminal, clock, interval=1.0).finish()
    shown = terminal.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n")
    *_, half, last = [line for line in shown.split("\r") if "step 50/" in line or "step 100/" in line]
    assert half.count("━") == 15 and last.count("━") == 30


def test_the_last_validation_is_shown_until_the_next_one():
    stream = io.StringIO()
    reporter = Reporter(stream)
    for step, validation in ((1, None), (2, 0.625), (3, None)):
        reporter._shown = float("-inf")
        reporter.step(replace(progress(step), validation=validation))
    lines = stream.getvalue().splitlines()
    assert ["validation 62.5%" in line for line in lines] == [False, True, True]
    reporter.finish()  # the next step may be that of another run
    reporter._shown = float("-inf")
    reporter.step(progress(1))
    assert "validation" not in stream.getvalue().splitlines()[-1]


def test_the_bar_is_redrawn_at_most_ten_times_a_second(clock):
    terminal = Terminal()
    run(terminal, clock, interval=0.015)
    # Steps 1, 8, 15, … are shown, because they are 0.105 s apart. The last step is always shown.
    assert terminal.getvalue().count("\r") == 16


def test_a_file_gets_a_plain_line_every_ten_seconds_and_one_for_the_last_step(clock):
    stream = io.StringIO()
    run(stream, clock, interval=1.0).finish()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in (*range(1, 100, 10), 100)]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_line_shows_loss_accuracy_and_the_time_left(clock):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.step(progress(1, loss=1.25, accuracy=0.5, seconds=30.0))  # including half a minute of compilation
    clock[0] += 10
    reporter.step(progress(11, loss=1.25, accuracy=0.5, seconds=50.0))
    first, second = stream.getvalue().splitlines()
    assert first == "step 1/100  loss 1.250  accuracy 50.0%"
    assert second == "step 11/100  loss 1.250  accuracy 50.0%  2:58 left"  # 89 steps that take 2 s each


def test_a_regression_shows_no_accuracy(clock):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.step(progress(1, loss=1.25, accuracy=None))
    assert stream.getvalue() == "step 1/100  loss 1.250\n"


def test_the_numbers_shown_are_running_means(clock):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.step(progress(1, loss=1.0))
    clock[0] += 10
    reporter.step(progress(2, loss=3.0))
    assert "loss 1.100" in stream.getvalue()  # 0.95 · 1 + 0.05 · 3


def test_no_line_is_wider_than_a_narrow_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    run(terminal, clock, interval=1.0)
    lines = [line.removesuffix("\x1b[K") for line in terminal.getvalue().split("\r")]
    assert max(map(len, lines)) <= 60


def test_an_event_is_printed_on_a_new_line_below_the_bar(clock):
    terminal = Terminal()
    reporter = run(terminal, clock, interval=1.0, steps=3)
    reporter.event("evaluating")
    reporter.finish()
    assert terminal.getvalue().endswith("\x1b[K\nevaluating …\n")


def test_a_download_is_shown_on_a_terminal_only(clock):
    for stream, shown in (
        (Terminal(), ["0.0 MB of 2.0 MB", "1.0 MB of 2.0 MB", "2.0 MB of 2.0 MB"]),
        (io.StringIO(), []),
    ):
        reporter = Reporter(stream)
        for done in range(0, 2_000_001, 100_000):  # 0.0101 s apart; the last one is always shown
            reporter.transfer(done, 2_000_000)
            clock[0] += 0.0101
        reporter.finish()
        assert [
            line.removesuffix("\x1b[K\n").removesuffix("\x1b[K") for line in stream.getvalue().split("\r")[1:]
        ] == shown


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_a_duration_has_minutes_and_seconds_and_hours_from_one_hour_on(seconds, text):
    assert duration(seconds) == text
