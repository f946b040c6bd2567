"""The command line as a person would mistype it, and once for real: started, interrupted, resumed, ended."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import imaml
from imaml import InputError, cli
from imaml.datasets import glyphs
from imaml.parallel import processes
from imaml.runs import checkpoints
from imaml.runs import log as runlog
from imaml.storage import files

ROOT = Path(__file__).resolve().parents[2]
DEFAULT, OMNIGLOT = imaml.presets()[0], "omniglot-5way-1shot-gd"
FEW_QUERIES = ["train", "--outer.queries", "1"]  # a class of the tests' glyphs has six images
PATIENCE = 400.0
"""Seconds for a process to end, compiling included; a few on an idle machine."""


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory, tiny_pixels):
    """A cache that holds whole, few glyphs, in place of those whose drawing takes half a minute."""
    folder = tmp_path_factory.mktemp("glyph-cache")

    def build():
        labels = {split: np.array([f"{split}/{i}" for i in range(12)]) for split in ("train", "test")}
        return {f"{s}_pixels": tiny_pixels for s in labels} | {f"{s}_labels": names for s, names in labels.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAML_CACHE", str(folder))
        patch.setattr(glyphs, "_build", build)
        glyphs.load()
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, glyph_cache):
    """An empty working folder, few glyphs, and a JAX that keeps this process's settings."""
    monkeypatch.setenv("IMAML_CACHE", str(glyph_cache))
    monkeypatch.setattr(cli, "_start_jax", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(arguments):
    """The exit code, whether main returns it or argparse raises it."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def complaint(arguments, capsys):
    """What the command says on stderr while it exits with 2, in one sentence and without a traceback."""
    assert code_of(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    *usage, sentence = said.strip().splitlines()
    assert all(line.startswith(("usage:", " ")) for line in usage), said
    assert sentence.startswith("imaml")
    return sentence


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("train glyphs-5way-1shot-dg", f"there is no preset 'glyphs-5way-1shot-dg': did you mean {DEFAULT}?"),
        ("presets glyps", "there is no preset 'glyps'"),
        ("train --inner.step 3", "there is no setting --inner.step: did you mean --inner.steps?"),
        ("train --inner.step=3", "there is no setting --inner.step: did you mean --inner.steps?"),
        ("train --meta-step 3", "there is no option --meta-step: did you mean --meta-steps?"),
        ("train --strength", "--strength needs a value"),
        ("train --strength --seed 3", "--strength needs a value"),
        ("train --strength strong", "--strength takes a number, got 'strong'"),
        ("train --meta-steps few", "--outer.steps takes a whole number, got 'few'"),
        ("train --meta-steps 0", "outer.steps must be at least 1, got 0"),
        ("train --inner.steps -1", "GradientDescent needs steps and tol of at least 0, got -1"),
        ("train --linear.maxiter 0", "CG needs maxiter of at least 1, got 0"),
        ("train --outer.queries 1 --episode.ways 13", "13 ways are more than the 12 classes of glyphs's training set"),
        ("train --outer.queries 1 --episode.shots 6", "6 shots and 1 queries are more than the 6 images"),
        ("train --data here", "the glyphs dataset reads no files and takes no data folder"),
        ("train --keep-checkpoints none", "invalid int value: 'none'"),
        ("train --keep-checkpoints 0 --outer.queries 1", "at least 1 checkpoint must be kept, got 0"),
        ("train --keep-checkpoint 3", "there is no option --keep-checkpoint: did you mean --keep-checkpoints?"),
        ("train --out", "expected one argument"),
        ("train one two", "unrecognized arguments: two"),
        ("trian", "invalid choice: 'trian'"),
        ("", "required: COMMAND"),
        ("evaluate", "required: RUN"),
        ("evaluate .", "there is no run in .: it holds no whole checkpoint"),
        ("evaluate . --best", "there is no run in .: it holds no whole checkpoint"),
        ("evaluate nowhere", "there is no run in nowhere"),
        ("evaluate . --tasks many", "invalid int value: 'many'"),
        ("evaluate . --task 3", "unrecognized arguments: --task 3"),
        ("data", "required: NAME"),
        ("data omniglt", "there is no dataset 'omniglt': known are glyphs, omniglot, miniimagenet, sinusoid"),
        ("data sinusoid", "the sinusoid dataset is sampled: there is nothing to download"),
        ("data miniimagenet", "miniimagenet may not be redistributed: obtain the images yourself, and name the folder"),
        ("train miniimagenet-5way-1shot-gd", "miniimagenet needs its images: name the folder that holds images/"),
        ("train miniimagenet-5way-1shot-gd --data nowhere", "nowhere: no such folder; name the one that holds images/"),
        ("train sinusoid-5shot-gd --data here", "the sinusoid dataset reads no files and takes no data folder"),
        ("train --strength 2 --algorithm maml", "there is no setting --strength"),
        ("train --algorithm mmal", "there is no algorithm 'mmal': did you mean maml?"),
        ("train glyphs-5way-1shot-hf --inner.step_size 1", "there is no setting --inner.step_size"),
        ("verify omniglot-5way-1shot-reference-code", "verify compares with the paper's equations"),
        ("data glyphs", "the glyphs dataset is rendered from fonts: there is nothing to download"),
    ],
)
def test_a_slip_is_answered_in_one_sentence_and_nothing_is_written(arguments, expected, here, capsys):
    assert expected in complaint(arguments.split(), capsys)
    assert list(here.iterdir()) == []


def test_a_preset_that_needs_archives_says_so(here, capsys):
    said = complaint(["train", OMNIGLOT], capsys)
    assert "download them with 'imaml data omniglot', or name the folder that holds them with --data DIR" in said
    assert list(here.iterdir()) == []


def test_a_missing_archive_folder_is_named(here, capsys):
    assert "nowhere" in complaint(["train", OMNIGLOT, "--data", "nowhere"], capsys)
    assert list(here.iterdir()) == []


def test_a_truncated_archive_is_named(here, capsys):
    for name in ("images_background.zip", "images_evaluation.zip"):
        (here / name).write_bytes(b"PK\x03\x04" + bytes(40))
    assert "images_background.zip" in complaint(["train", OMNIGLOT, "--data", "."], capsys)
    assert len(list(here.iterdir())) == 2


def test_a_damaged_checkpoint_is_named_and_kept(here, capsys):
    file = here / "checkpoint-00000007.npz"
    file.write_bytes(b"PK\x03\x04" + bytes(40))
    for command in ([*FEW_QUERIES, "--out", "."], ["evaluate", "."]):
        assert ". holds no whole checkpoint: checkpoint-00000007.npz is damaged" in complaint(command, capsys)
    assert {path.name for path in here.iterdir()} == {file.name, files.LOCK} and file.stat().st_size == 44


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"config": {"sharpness": 1}}, "were saved by another version: "),
        ({"preset": "glyphs-5way-1shot-dg"}, f"there is no preset 'glyphs-5way-1shot-dg': did you mean {DEFAULT}?"),
    ],
)
def test_a_run_of_settings_that_are_not_known_here_is_refused(change, expected, here, capsys):
    description = {"preset": DEFAULT, "config": imaml.preset(DEFAULT).config(), "data": "", "versions": {}}
    checkpoints.save(here, 1, {}, description | change)
    assert expected in complaint(["evaluate", "."], capsys)


def test_a_run_in_use_is_refused_with_who_uses_it_and_can_be_read(here, capsys):
    with files.alone_in(here):
        said = complaint([*FEW_QUERIES, "--out", "."], capsys)
        assert f". is in use by process {os.getpid()} on " in said
        assert "there is no run in ." in complaint(["evaluate", "."], capsys)  # looked for, not waited for


def test_a_read_only_folder_is_named_before_anything_is_compiled(here, sealed, capsys, monkeypatch):
    monkeypatch.setattr("imaml.runs.compilation.meta_step", lambda *_: pytest.fail("compiles"))
    with sealed({}) as folder:
        said = complaint([*FEW_QUERIES, "--out", str(folder)], capsys)
        assert said.endswith(f": {folder / files.LOCK}") and ("Read-only" in said or "denied" in said)


def test_a_file_in_the_folders_place_is_named(here, capsys):
    (here / "taken").write_text("")
    assert complaint([*FEW_QUERIES, "--out", "taken"], capsys) == "imaml train: File exists: taken"


def test_a_full_disk_is_told_without_a_file_name(here, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("imaml.runs.training.train", full)
    assert complaint(["train"], capsys) == "imaml train: No space left on device"


def test_an_interruption_outside_of_training_exits_with_130(here, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("imaml.runs.training.train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_sigterm_outside_of_training_unwinds_and_exits_with_143(here, monkeypatch):
    unwound = []

    def terminated(*_, **__):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(True)

    def unhandled(number, frame):  # in place of the end of the whole test run
        raise AssertionError("SIGTERM would have ended the process at once")

    monkeypatch.setattr("imaml.runs.training.train", terminated)
    before = signal.signal(signal.SIGTERM, unhandled)
    try:
        assert code_of(["train"]) == 143
        assert unwound == [True] and signal.getsignal(signal.SIGTERM) is unhandled
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("end, code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (InputError("no"), 2)])
def test_a_command_that_ends_early_does_not_wait_for_a_compilation(end, code, here, monkeypatch):
    compiled, left = threading.Event(), []

    def train(*_, **__):
        thread = ThreadPoolExecutor(1)
        thread.submit(compiled.wait)
        thread.shutdown(wait=False)
        raise end

    monkeypatch.setattr("imaml.runs.training.train", train)
    monkeypatch.setattr(processes, "_exit", left.append)
    monkeypatch.setattr(sys, "argv", ["imaml", "train"])
    try:
        assert code_of(["train"]) == code and not left  # not the process of whoever calls
        assert code_of(None) == code and left == [code]
    finally:
        compiled.set()


def test_the_version_is_told_with_those_it_rests_on(capsys):
    assert code_of(["--version"]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("imaml ") and f"python {sys.version.split()[0]}" in said and f"numpy {np.__version__}" in said
    )


def test_presets_lists_the_names(capsys):
    assert cli.main(["presets"]) == 0
    assert capsys.readouterr().out.split() == list(imaml.presets())


@pytest.mark.parametrize("name", imaml.presets())
def test_presets_shows_one_in_full(name, capsys):
    assert cli.main(["presets", name]) == 0
    shown = capsys.readouterr().out
    chosen = imaml.preset(name)
    assert shown.startswith(f"{name}\n") and chosen.citation in shown
    assert f"  --inner.steps {chosen.inner.steps}\n" in shown and f"  --seed {chosen.seed}\n" in shown
    assert all(sentence in shown for sentence in chosen.deviations())
    assert ("--algorithm reptile  (Reptile, steps of size" in shown) == (chosen.baselines is not None)


@pytest.mark.parametrize("words", ["--inner.steps 3 --algorithm maml", "--algorithm=maml --inner.steps=3"])
def test_an_algorithm_is_trained_in_a_folder_of_its_own_with_what_was_typed(words, here, monkeypatch, capsys):
    asked = []

    def train(preset, directory, *_, **__):
        asked.append((preset, directory))
        raise KeyboardInterrupt

    monkeypatch.setattr("imaml.runs.training.train", train)
    assert cli.main(["train", *words.split()]) == 130
    ((preset, directory),) = asked
    assert (preset.algorithm, preset.inner.steps, preset.inner.step_size) == ("maml", 3, 0.4)
    assert directory == Path("runs") / f"{DEFAULT}-maml"
    assert f"{DEFAULT}: MAML on glyphs, in runs/{DEFAULT}-maml" in capsys.readouterr().out


# --- For real ------------------------------------------------------------------------------------------------------

COMMAND = [
    sys.executable, "-m", "imaml", "train", "--network.filters", "2", "--inner.steps", "1", "--linear.maxiter=1",
    "--outer.tasks", "2", "--outer.queries", "1", "--meta-steps", "400", "--out", "run",
]  # fmt: skip


def environment(cache):
    settings = {"IMAML_CACHE": str(cache), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return os.environ | settings | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # compiled in half the time


def interrupt_at_first_step(folder, cache):
    """The exit code and output of the command, sent SIGINT when it shows its first meta-step."""
    process = subprocess.Popen(
        COMMAND, cwd=folder, env=environment(cache), text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        lines = []
        with process:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("step 1/"):
                    process.send_signal(signal.SIGINT)
    finally:
        watchdog.cancel()
    return process.returncode, "".join(lines)


def test_training_interrupted_exits_130_and_the_same_command_ends_it(tmp_path, glyph_cache):
    run = tmp_path / "run"
    code, output = interrupt_at_first_step(tmp_path, glyph_cache)
    assert code == 130, output
    assert "of 400 and saved; the same command goes on from there" in output
    stopped = len(runlog.read_log(run))
    assert 1 <= stopped == checkpoints.newest(run).step < 400
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env=environment(glyph_cache), capture_output=True, encoding="utf-8", timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "test accuracy " in done.stdout and "(chance 20%)" in done.stdout
    assert f"step {stopped + 1}/400" in done.stdout
    assert [entry.step for entry in runlog.read_log(run)] == list(range(1, 401))
    assert (run / "learning_curve.png").exists()
    assert json.loads((run / "result.json").read_text())["versions"]["python"] == sys.version.split()[0]
