"""Tests of the loggers and the printed progress of a training run, with stand-ins for the loggers' libraries."""

import sys
from types import SimpleNamespace

import pytest
from tiny_run import EVALUATION_TASKS, STEPS, STOP_AT, stop_at, train

import imaml
from imaml.runs.log import read_log
from imaml.runs.loggers import scalars

pytestmark = pytest.mark.usefixtures("traces")


class Recorder:
    """A logger that records its calls."""

    def __init__(self, begins=True):
        self.calls, self._begins = [], begins

    def begin(self, directory, description, step):
        if not self._begins:
            raise imaml.InputError("no library")
        self.calls.append(("begin", description["config"]["seed"], step))

    def step(self, progress):
        self.calls.append(("step", progress.step))

    def end(self, evaluation):
        self.calls.append(("end", evaluation))


class Writer:
    """A stand-in for ``tensorboardX.SummaryWriter`` that records its arguments, and whether it is closed."""

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, {}, False
        self.texts = {}

    def add_scalar(self, name, value, step):
        assert not self.closed
        self.scalars[name, step] = value

    def add_text(self, name, text, step):
        self.texts[name] = text

    def close(self):
        self.closed = True


@pytest.mark.slow("trains a run twice")
def test_a_logger_sees_each_step_once_over_a_resumption_and_the_evaluation(tmp_path):
    first, second = Recorder(), Recorder()
    train(tmp_path, on_progress=stop_at(STOP_AT), loggers=[first])
    assert first.calls == [("begin", 0, 0), *(("step", i) for i in range(1, STOP_AT + 1)), ("end", None)]
    run = train(tmp_path, loggers=[second])
    steps = [("step", i) for i in range(STOP_AT + 1, STEPS + 1)]
    assert second.calls == [("begin", 0, STOP_AT), *steps, ("end", run.evaluation)]
    assert run.evaluation.tasks == EVALUATION_TASKS


def test_a_logger_that_has_begun_is_ended_after_an_error(tmp_path):
    good = Recorder()
    with pytest.raises(imaml.InputError, match="no library"):
        train(tmp_path, loggers=[good, Recorder(begins=False)])
    assert good.calls == [("begin", 0, 0), ("end", None)]


def test_tensorboard_gets_the_numbers_of_the_log_and_of_the_evaluation(tmp_path, monkeypatch):
    writers = []
    library = SimpleNamespace(SummaryWriter=lambda *a, **k: writers.append(Writer(*a, **k)) or writers[-1])
    monkeypatch.setitem(sys.modules, "tensorboardX", library)
    train(tmp_path, on_progress=stop_at(STOP_AT), loggers=[imaml.TensorBoard()])
    run = train(tmp_path, loggers=[imaml.TensorBoard()])
    one, two = writers
    assert one.folder == str(tmp_path / "tensorboard") and (one.purge_step, two.purge_step) == (None, STOP_AT + 1)
    assert one.closed and two.closed and "strength: 0.1" in one.texts["settings"]
    written = one.scalars | two.scalars
    for entry in read_log(tmp_path):
        for name, value in scalars(entry).items():
            assert written.pop((name, entry.step)) == value
    value, interval = run.evaluation.value, run.evaluation.interval
    assert written == {("test/none/accuracy", STEPS): value, ("test/none/interval", STEPS): interval}


def test_weights_and_biases_resumes_the_same_run(tmp_path, monkeypatch):
    opened = []

    def init(**options):
        run = SimpleNamespace(options=options, logged={}, summary={}, finished=False)
        run.log = lambda values, step: run.logged.update({step: values})
        run.finish = lambda: setattr(run, "finished", True)
        opened.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    logger = imaml.WeightsAndBiases("few-shot", {"mode": "offline"})
    train(tmp_path, on_progress=stop_at(STOP_AT), loggers=[logger])
    run = train(tmp_path, loggers=[logger])
    one, two = opened
    assert one.options["id"] == two.options["id"] and one.options["mode"] == "offline"
    assert one.options["project"] == "few-shot" and one.options["config"]["config"]["strength"] == 0.1
    assert [*one.logged, *two.logged] == list(range(1, STEPS + 1)) and one.finished and two.finished
    assert one.summary == {} and two.summary["test/none/accuracy"] == run.evaluation.value


@pytest.mark.parametrize("logger, module", [(imaml.TensorBoard(), "tensorboardX"), (imaml.WeightsAndBiases(), "wandb")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(logger, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(imaml.InputError, match=f"pip install {module}"):
        train(tmp_path, loggers=[logger])


def test_progress_prints_events_and_steps(tmp_path, capsys):
    events = []
    train(tmp_path, progress=True, on_event=events.append)
    lines = capsys.readouterr().out.splitlines()
    assert [f"{event} …" for event in events] == [line for line in lines if line.endswith("…")]
    assert any(line.startswith(f"step {STEPS}/{STEPS}  loss") for line in lines)
    train(tmp_path)
    assert capsys.readouterr().out == ""
