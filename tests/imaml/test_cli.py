"""Tests of the command line: mistyped arguments, damaged files, and one real run that is interrupted and resumed."""

import json
import os
import re
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
from imaml.arguments import parse
from imaml.datasets import glyphs
from imaml.parallel import processes
from imaml.runs import checkpoints
from imaml.runs import log as runlog
from imaml.settings.overrides import settings
from imaml.storage import files

ROOT = Path(__file__).resolve().parents[2]
DEFAULT, OMNIGLOT = imaml.presets()[0], "omniglot-5way-1shot-gd"
# The small glyph classes have six images each, too few for the 15 queries of the glyph presets.
TRAIN_WITH_ONE_QUERY = ["train", "--outer.queries", "1"]
TIMEOUT = 400.0
"""Time limit of a process in seconds, compilation included. On an idle machine a process takes a few seconds."""


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory, tiny_pixels):
    """A cache folder with twelve classes of six glyphs in each split, because drawing the real ones takes seconds."""
    folder = tmp_path_factory.mktemp("glyph-cache")

    def build():
        labels = {split: np.array([f"{split}/{i}" for i in range(12)]) for split in ("train", "test")}
        return {f"{s}_pixels": tiny_pixels for s in labels} | {f"{s}_labels": names for s, names in labels.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAML_CACHE", str(folder))
        patch.setattr(glyphs, "draw_file", build)
        with pytest.warns(UserWarning, match="are not those of other machines"):
            glyphs.load()
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, glyph_cache):
    """Change into an empty folder, use the small glyphs, and keep the command from configuring JAX."""
    monkeypatch.setenv("IMAML_CACHE", str(glyph_cache))
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(arguments):
    """Return the exit code of a command, whether main returns it or raises SystemExit with it."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def error_of(arguments, capsys):
    """Return the one-line error message of a command that exits with 2."""
    assert code_of(arguments) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    *usage, sentence = stderr.strip().splitlines()
    assert all(line.startswith(("usage:", " ")) for line in usage), stderr
    assert sentence.startswith("imaml")
    return sentence


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("train glyphs-5way-1shot-dg", f"there is no preset 'glyphs-5way-1shot-dg': did you mean {DEFAULT}?"),
        ("presets glyps", "there is no preset 'glyps': 'imaml presets' lists all of them"),
        ("train --inner.max_step 3", "there is no setting --inner.max_step: did you mean --inner.max_steps?"),
        ("train --inner.max_step=3", "there is no setting --inner.max_step: did you mean --inner.max_steps?"),
        ("train --meta-step 3", "there is no option --meta-step: did you mean --meta-steps?"),
        ("train --meta-step", "there is no option --meta-step: did you mean --meta-steps?"),
        ("train --quite", "there is no option --quite: did you mean --quiet?"),
        ("train --quite --seed 3", "there is no option --quite: did you mean --quiet?"),
        ("train --verbose", "there is no option --verbose: see 'imaml train glyphs-5way-1shot-gd --help'\n"),
        ("train --suport 2", "there is no option --suport: see 'imaml train glyphs-5way-1shot-gd --help'\n"),
        ("train --meta-stesp 3", "there is no option --meta-stesp: did you mean --meta-steps?\n"),
        ("train --quiet=yes", "ignored explicit argument 'yes'"),
        ("verify --linear.max_step 3", "there is no setting --linear.max_step: did you mean --linear.max_steps?"),
        ("verify --linear.max_steps 0", "CG needs max_steps of at least 1, got 0"),
        ("verify --meta-steps 3", "there is no setting --meta-steps: did you mean --test_steps?"),
        ("verify --quite", "there is no option --quite: did you mean --quiet?"),
        ("verify --algorithm maml", "verify compares with the paper's equations"),
        ("data omniglot --quite", "there is no option --quite: did you mean --quiet?"),
        ("train --strength", "--strength needs a value"),
        ("train --strength --seed 3", "--strength needs a value"),
        ("train --strength strong", "--strength takes a number, got 'strong'"),
        ("train --meta-steps few", "--outer.steps takes a whole number, got 'few'"),
        ("train --meta-steps 0", "outer.steps must be at least 1, got 0"),
        ("train --inner.max_steps -1", "GradientDescent needs max_steps and tol of at least 0, got -1"),
        ("train --linear.max_steps 0", "CG needs max_steps of at least 1, got 0"),
        ("train --outer.queries 1 --episode.ways 13", "13 ways are more than the 12 classes of glyphs's training set"),
        ("train --outer.queries 1 --episode.shots 6", "6 shots and 1 queries are more than the 6 images"),
        ("train --data here", "the glyphs dataset reads no files and takes no data folder"),
        ("train --keep-checkpoints none", "invalid int value: 'none'"),
        ("train --keep-checkpoints 0 --outer.queries 1", "at least 1 checkpoint must be kept, got 0"),
        ("train --keep-checkpoint 3", "there is no option --keep-checkpoint: did you mean --keep-checkpoints?"),
        ("train --out", "expected one argument"),
        ("train one two", "unrecognized arguments: two"),
        ("trian", "there is no command 'trian': did you mean train?"),
        ("", "required: COMMAND"),
        ("evaluate", "evaluate takes the folder of a run, or --record NAME"),
        ("evaluate .", "there is no run in .: it holds no intact checkpoint"),
        ("evaluate . --best", "there is no run in .: it holds no intact checkpoint"),
        ("evaluate nowhere", "there is no run in nowhere"),
        ("evaluate --record any --part validation", "--part, --best and --last choose from the folder of a run"),
        ("evaluate --record any --last", "--part, --best and --last choose from the folder of a run"),
        ("evaluate . --tasks many", "invalid int value: 'many'"),
        ("diagnose", "required: RUN"),
        ("diagnose nowhere", "there is no run in nowhere"),
        ("diagnose . --taks 3", "there is no option --taks: did you mean --tasks?\n"),
        ("diagnose . --part tset", "there is no part of a dataset 'tset': did you mean test?"),
        ("diagnos .", "there is no command 'diagnos': did you mean diagnose?"),
        ("evaluate . --task 3", "there is no option --task: did you mean --tasks?"),
        ("data", "required: NAME"),
        ("data omniglt", "there is no dataset 'omniglt': did you mean omniglot? known: glyphs, omniglot,"),
        ("data omniglot-alphabet", "there is no dataset 'omniglot-alphabet': did you mean omniglot-alphabets? known:"),
        ("data sinusoid", "the sinusoid dataset is sampled: there is nothing to download"),
        ("data miniimagenet", "miniimagenet may not be redistributed: obtain the images yourself, and use --data"),
        ("train miniimagenet-5way-1shot-gd", "miniimagenet needs its images: use --data DIR to name the folder"),
        ("train miniimagenet-5way-1shot-gd --data nowhere", "nowhere: no such folder; name the one that holds images/"),
        ("train sinusoid-5shot-gd --data here", "the sinusoid dataset reads no files and takes no data folder"),
        ("train --strength 2 --algorithm maml", f"no setting --strength in {DEFAULT} with algorithm maml: see"),
        ("train --algorithm mmal", "there is no algorithm 'mmal': did you mean maml?"),
        ("train glyphs-5way-1shot-hf --inner.step_size 1", "there is no setting --inner.step_size"),
        ("verify omniglot-5way-1shot-reference-code", "verify compares with the paper's equations"),
        ("data glyphs", "the glyphs dataset is part of this package: there is nothing to download"),
    ],
)
def test_a_mistake_gives_one_sentence_and_writes_nothing(arguments, expected, here, capsys):
    assert expected in error_of(arguments.split(), capsys) + "\n"
    assert list(here.iterdir()) == []


def test_training_without_the_archives_says_how_to_get_them(here, capsys):
    for chosen in ([], ["--dataset", "omniglot-alphabets"]):
        stderr = error_of(["train", OMNIGLOT, *chosen], capsys)
        assert f"{(chosen or ['omniglot'])[-1]} needs Omniglot's two official archives" in stderr
        assert "download them with 'imaml data omniglot', or name the folder that holds them with --data DIR" in stderr
    assert list(here.iterdir()) == []


def test_the_message_names_a_missing_archive_folder(here, capsys):
    assert "nowhere" in error_of(["train", OMNIGLOT, "--data", "nowhere"], capsys)
    assert list(here.iterdir()) == []


def test_the_message_names_a_truncated_archive(here, capsys):
    for name in ("images_background.zip", "images_evaluation.zip"):
        (here / name).write_bytes(b"PK\x03\x04" + bytes(40))
    assert "images_background.zip" in error_of(["train", OMNIGLOT, "--data", "."], capsys)
    assert len(list(here.iterdir())) == 2


def test_the_message_names_a_damaged_checkpoint_and_the_file_is_kept(here, capsys):
    file = here / "checkpoint-00000007.npz"
    file.write_bytes(b"PK\x03\x04" + bytes(40))
    for command in ([*TRAIN_WITH_ONE_QUERY, "--out", "."], ["evaluate", "."]):
        assert ". holds no intact checkpoint: checkpoint-00000007.npz is damaged" in error_of(command, capsys)
    assert {path.name for path in here.iterdir()} == {file.name, files.LOCK} and file.stat().st_size == 44


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"config": {"sharpness": 1}}, "were saved by another version: "),
        ({"preset": "glyphs-5way-1shot-dg"}, f"there is no preset 'glyphs-5way-1shot-dg': did you mean {DEFAULT}?"),
    ],
)
def test_a_run_with_settings_unknown_to_this_version_is_refused(change, expected, here, capsys):
    description = {"preset": DEFAULT, "config": imaml.preset(DEFAULT).config(), "data": "", "versions": {}}
    checkpoints.save(here, 1, {}, description | change)
    assert expected in error_of(["evaluate", "."], capsys)


def test_a_run_in_use_is_refused_with_the_process_that_uses_it_and_can_be_evaluated(here, capsys):
    with files.alone_in(here):
        stderr = error_of([*TRAIN_WITH_ONE_QUERY, "--out", "."], capsys)
        assert f". is in use by process {os.getpid()} on " in stderr
        assert "there is no run in ." in error_of(["evaluate", "."], capsys)  # evaluate does not wait for the lock


def test_a_read_only_folder_is_reported_before_anything_is_compiled(here, sealed, capsys, monkeypatch):
    monkeypatch.setattr("imaml.runs.step_compiler.meta_step", lambda *_: pytest.fail("must not compile"))
    with sealed({}) as folder:
        stderr = error_of([*TRAIN_WITH_ONE_QUERY, "--out", str(folder)], capsys)
        assert stderr.endswith(f": {folder / files.LOCK}") and ("Read-only" in stderr or "denied" in stderr)


def test_the_message_names_a_file_with_the_name_of_the_run_folder(here, capsys):
    (here / "taken").write_text("")
    assert error_of([*TRAIN_WITH_ONE_QUERY, "--out", "taken"], capsys) == "imaml train: File exists: taken"


def test_a_full_disk_is_reported_without_a_file_name(here, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("imaml.runs.training.train", full)
    assert error_of(["train"], capsys) == "imaml train: No space left on device"


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

    def unhandled(number, frame):  # fails this test; the default handler would end the test run
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
    compiled, exits = threading.Event(), []

    def train(*_, **__):
        thread = ThreadPoolExecutor(1)
        thread.submit(compiled.wait)
        thread.shutdown(wait=False)
        raise end

    monkeypatch.setattr("imaml.runs.training.train", train)
    monkeypatch.setattr(processes, "_exit", exits.append)
    monkeypatch.setattr(sys, "argv", ["imaml", "train"])
    try:
        assert code_of(["train"]) == code and not exits  # given arguments, main does not end the process
        assert code_of(None) == code and exits == [code]
    finally:
        compiled.set()


def test_the_version_lists_the_versions_of_the_dependencies(capsys):
    assert code_of(["--version"]) == 0
    stdout = capsys.readouterr().out
    assert (
        stdout.startswith("imaml ")
        and f"python {sys.version.split()[0]}" in stdout
        and f"numpy {np.__version__}" in stdout
    )


def test_the_presets_command_lists_all_names(capsys):
    assert cli.main(["presets"]) == 0
    assert capsys.readouterr().out.split() == list(imaml.presets())


@pytest.mark.parametrize("name", imaml.presets())
def test_the_presets_command_shows_all_of_a_preset(name, capsys):
    assert cli.main(["presets", name]) == 0
    shown = capsys.readouterr().out
    chosen = imaml.preset(name)
    assert shown.startswith(f"{name}\n") and chosen.citation in shown
    assert f"  --inner.max_steps {chosen.inner.max_steps}\n" in shown and f"  --seed {chosen.seed}\n" in shown
    assert all(sentence in shown for sentence in chosen.deviations())
    reptile = re.search(r"--algorithm reptile  \(Reptile, \d+ inner steps of size", shown)
    assert (reptile is not None) == (chosen.baselines is not None)


@pytest.mark.parametrize("words", ["--inner.max_steps 3 --algorithm maml", "--algorithm=maml --inner.max_steps=3"])
def test_another_algorithm_is_trained_in_another_folder_with_the_settings_that_were_typed(
    words, here, monkeypatch, capsys
):
    calls = []

    def train(preset, directory, *_, **__):
        calls.append((preset, directory))
        raise KeyboardInterrupt

    monkeypatch.setattr("imaml.runs.training.train", train)
    assert cli.main(["train", *words.split()]) == 130
    ((preset, directory),) = calls
    assert (preset.algorithm, preset.inner.max_steps, preset.inner.step_size) == ("maml", 3, 0.4)
    assert directory == Path("runs") / f"{DEFAULT}-maml"
    assert f"{DEFAULT}: MAML on glyphs, in runs/{DEFAULT}-maml" in capsys.readouterr().out


def test_a_start_is_passed_on_and_gets_a_folder_of_its_own(here, monkeypatch, capsys):
    calls = []

    def train(preset, directory, *_, start, **__):
        calls.append((preset.validation.every, directory, start))
        raise KeyboardInterrupt

    monkeypatch.setattr("imaml.runs.training.train", train)
    for words in ("--start runs/first --validation.every 5", "--out here", "--validation.patience 3 --start=theta.npz"):
        assert cli.main(["train", *words.split()]) == 130
    tuned = Path("runs") / f"{DEFAULT}-tuned"
    assert calls == [(5, tuned, Path("runs/first")), (0, Path("here"), None), (0, tuned, Path("theta.npz"))]


@pytest.mark.parametrize("words, best", [([], None), (["--best"], True), (["--last"], False)])
def test_the_checkpoint_of_an_evaluation_is_the_one_that_was_asked_for(words, best, here, monkeypatch, capsys):
    calls = []

    def evaluate(run, **options):
        calls.append(options["best"])
        return imaml.Evaluation("accuracy", 0.5, 0.1, 0.2, 600, "none")

    monkeypatch.setattr("imaml.runs.evaluation.evaluate", evaluate)
    assert cli.main(["evaluate", "run", *words]) == 0 and calls == [best]


@pytest.mark.parametrize("stopped_by", [None, signal.SIGTERM])
def test_quiet_training_prints_the_result_and_warnings_only(stopped_by, here, monkeypatch, capsys):
    evaluation = imaml.Evaluation("accuracy", 0.5, 0.1, 0.2, 600, "none")

    def train(preset, directory, *_, on_event, on_warning, on_progress, **__):
        Path(directory).mkdir(parents=True)
        on_event("compiling the meta-step")
        on_warning("a checkpoint is damaged")
        on_progress(runlog.Progress(1, 1, 0.5, 0.5, 4, 0.1, 0.1, {}, 1.0))
        return imaml.Run(directory, preset, {}, 1, True, stopped_by, evaluation)

    monkeypatch.setattr("imaml.runs.training.train", train)
    assert cli.main(["train", "--quiet"]) == (0 if stopped_by is None else 143)
    out, err = capsys.readouterr()
    assert err == "a checkpoint is damaged\n"
    assert out == f"{evaluation}\n" if stopped_by is None else out.startswith("stopped at step 1 of 3000")
    assert cli.main(["train", "--out", "loud"]) == (0 if stopped_by is None else 143)
    out, err = capsys.readouterr()
    assert err == "" and all(part in out for part in ("in loud", "compiling", "a checkpoint is damaged …", "step 1/1"))


# --- Help, TOML files, JSON and completion -------------------------------------------------------------------------

COMMANDS = list(cli.COMMANDS)


def imported_by(words):
    """Return the exit code of a command in a new process, its output, and the modules that it has imported."""
    code = (
        "import sys\nfrom imaml.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print(code, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, encoding="utf-8", timeout=TIMEOUT, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    *_, last = done.stderr.splitlines()
    code, *modules = last.split()
    return int(code), done.stdout, modules


@pytest.mark.parametrize("words", [["presets"], ["presets", "--json"]])
def test_a_pipe_whose_reader_has_ended_is_no_error(words):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "imaml", *words], stdout=write_end, stderr=subprocess.PIPE, encoding="utf-8",
        timeout=TIMEOUT, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["predict", "--suport", "x"]])
def test_help_and_messages_about_options_do_not_import_jax(words):
    code, _, modules = imported_by(words)
    assert code == (2 if "--suport" in words else 0)
    assert not {"jax", "numpy", "matplotlib", "bilevel", "shtab"} & set(modules)
    assert len(modules) < 250  # jax alone imports more than a thousand


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_the_common_options(command, capsys):
    assert code_of([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: imaml {command}")
    assert all(option in shown for option in ("--config FILE", "--quiet", "--json"))


@pytest.mark.parametrize("command", ["train", "verify"])
def test_the_help_lists_every_setting_of_every_preset_with_its_meaning(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert code_of([command, "--help"]) == 0
    shown = capsys.readouterr().out
    paths = {path for name in imaml.presets() for path in settings(imaml.preset(name))}
    assert set(re.findall(r"^  --([\w.]+) ", shown.partition("settings of the preset:")[2], re.MULTILINE)) == paths
    assert re.search(r"--inner\.max_steps N +GradientDescent: the budget, in gradients\. HessianFree: ", shown)
    assert re.search(r"--outer\.learning_rate X +Adam's learning rate at the first meta-step\.", shown)


def test_the_help_of_one_preset_has_its_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert code_of(["verify", "sinusoid-5shot-gd", "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"--network\.hidden N +MLP: units of each hidden layer\. \[40\]", shown)
    assert "--network.filters" not in shown and "--inner.max_steps N" in shown


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("predict run --suport a --query b", "there is no option --suport: did you mean --support?"),
        ("predict run --support a --query b --ink drak", "invalid choice: 'drak': did you mean dark?"),
        ("--verion", "there is no option --verion: did you mean --version?"),
        ("--quiet train", "there is no option --quiet: see 'imaml --help'"),
        ("evaluat", "there is no command 'evaluat': did you mean evaluate?"),
        ("evaluate run -best", "unrecognized arguments: -best: did you mean --best?"),
        ("train --network.products flaot32", "got 'flaot32': did you mean float32?"),
        ("train --inner.max_step 3", "did you mean --inner.max_steps?\n"),
        ("verify omniglot-5way-1shot-g", "did you mean omniglot-5way-1shot-gd?"),
        ("train --dataset gliphs", "there is no dataset 'gliphs': did you mean glyphs?"),
        ("train --dataset omniglot-alphabet", "'omniglot-alphabet': did you mean omniglot-alphabets?"),
        ("evaluate nowhere --part tset", "there is no part of a dataset 'tset': did you mean test?"),
        ("completion bsh", "invalid choice: 'bsh': did you mean bash?"),
        ("train --config nowhere.toml", "No such file or directory: nowhere.toml"),
        ("train --config", "expected one argument"),
    ],
)
def test_a_mistyped_word_is_answered_with_a_similar_one(arguments, expected, here, capsys):
    assert expected in error_of(arguments.split(), capsys) + "\n"
    assert list(here.iterdir()) == []


CONFIG = """
preset = "sinusoid-5shot-gd"
out = "runs/from-file"
meta_steps = 7
strength = 0.5
quiet = true
inner.max_steps = 32
[linear]
max_steps = 9
engine = "watched"
"""


def test_a_toml_file_gives_options_and_settings_and_the_command_line_wins(here):
    (here / "run.toml").write_text(CONFIG)
    options = parse(["train", "--config", "run.toml"])
    chosen = options.chosen
    assert (chosen.name, options.out, options.quiet) == ("sinusoid-5shot-gd", Path("runs/from-file"), True)
    assert (chosen.outer.steps, chosen.strength, chosen.inner.max_steps) == (7, 0.5, 32)
    assert (chosen.linear.max_steps, chosen.linear.engine) == (9, "watched")
    words = "train sinusoid-10shot-gd --no-quiet --out other --outer.steps 8 --strength=2 --linear.max_steps 3"
    options = parse([*words.split(), "--config=run.toml"])
    chosen = options.chosen
    assert (chosen.name, options.out, options.quiet) == ("sinusoid-10shot-gd", Path("other"), False)
    assert (chosen.outer.steps, chosen.strength, chosen.linear.max_steps, chosen.inner.max_steps) == (8, 2.0, 3, 32)


def test_the_algorithm_of_the_command_line_replaces_that_of_the_file(here):
    (here / "run.toml").write_text('algorithm = "maml"\n')
    assert parse(["train", "--config", "run.toml"]).chosen.algorithm == "maml"
    assert parse(["train", "--config", "run.toml", "--algorithm", "reptile"]).chosen.algorithm == "reptile"


def test_a_toml_file_gives_required_arguments(here):
    (here / "run.toml").write_text('run = "runs/one"\nsupport = "cards"\nquery = "new"\nink = "bright"\n')
    options = parse(["predict", "--config", "run.toml", "--query", "other"])
    assert (options.run, options.support, options.query, options.ink) == (
        Path("runs/one"), Path("cards"), Path("other"), "bright"
    )  # fmt: skip


@pytest.mark.parametrize(
    "command, content, expected",
    [
        ("train", "inner.max_step = 3", "run.toml: there is no setting inner.max_step: did you mean inner.max_steps?"),
        ("train", "meta-step = 3", "run.toml: there is no option meta-step: did you mean meta-steps?"),
        ("train", "strength = 'strong'", "run.toml: --strength takes a number, got 'strong'"),
        ("train", "meta-steps = 2.5", "run.toml: --outer.steps takes a whole number, got '2.5'"),
        ("train", "devices = 0", "run.toml: devices: must be a whole number of at least 1, or 'all', got '0'"),
        ("train", "quiet = 1", "run.toml: quiet takes true or false, got 1"),
        ("train", "strength = [1]", "run.toml: strength takes one number, word or switch, got [1]"),
        ("train", "preset = 'glyps-5way-1shot-gd'", f"did you mean {DEFAULT}?"),
        ("train", "config = 'other.toml'", "run.toml: a file cannot name another one: remove config"),
        ("evaluate", "task = 3", "run.toml: there is no option 'task': did you mean tasks?"),
        ("evaluate", "tasks = 'many'", "run.toml: tasks takes a whole number, got 'many'"),
        ("evaluate", "strength = 1", "run.toml: there is no option 'strength'"),
        ("evaluate", "tasks = ", "run.toml is not TOML: Invalid value"),
    ],
)
def test_a_mistake_in_a_toml_file_names_the_file(command, content, expected, here, capsys):
    (here / "run.toml").write_text(content)
    assert expected in error_of([command, "--config", "run.toml"], capsys)


def test_json_is_the_only_output_and_progress_goes_to_stderr(here, monkeypatch, capsys):
    evaluation = imaml.Evaluation("accuracy", 0.5, float("nan"), 0.2, 600, "none")

    def train(preset, directory, *_, on_event, **__):
        Path(directory).mkdir(parents=True)
        on_event("compiling the meta-step")
        print("a library prints")
        return imaml.Run(directory, preset, {}, 1, True, None, evaluation)

    monkeypatch.setattr("imaml.runs.training.train", train)
    assert cli.main(["train", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["preset"], found["directory"], found["finished"]) == (DEFAULT, f"runs/{DEFAULT}", True)
    assert (found["evaluations"][0]["value"], found["evaluations"][0]["interval"]) == (0.5, None)
    assert "compiling the meta-step" in err and "a library prints" in err
    assert cli.main(["train", "--json", "--quiet", "--out", "other"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["directory"] == "other" and err == "a library prints\n"


def test_the_presets_are_shown_as_json(capsys):
    assert cli.main(["presets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"presets": list(imaml.presets())}
    assert cli.main(["presets", DEFAULT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == settings(imaml.preset(DEFAULT)) and found["other_algorithms"]["maml"]["seed"] == 0


def test_bash_completes_commands_options_settings_and_their_words(tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "imaml.bash"
    script.write_text(capsys.readouterr().out)
    cases = {
        "imaml ev": {"evaluate"},
        "imaml train sinusoid-5": {"sinusoid-5shot-gd"},
        "imaml train --inner.m": {"--inner.max_steps", "--inner.momentum"},
        "imaml verify --network.products ": {"float32", "tensorfloat32", "bfloat16"},
        "imaml train --network.pooling t": {"true"},
        "imaml predict run --ink ": {"dark", "bright"},
        "imaml reproduce f": {"figure2a", "figure2b"},
        "imaml compare run --format j": {"json"},
        "imaml train --log t": {"tensorboard"},
        "imaml train --dataset omni": {"omniglot", "omniglot-alphabets"},
        "imaml data omni": {"omniglot", "omniglot-alphabets"},
    }
    lines = [f"source {script}"]
    for line in cases:
        words = line.split(" ")
        quoted = " ".join(f'"{word}"' for word in words)
        lines.append(f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE={line!r}")
        lines.append(f'_shtab_imaml imaml "{words[-1]}" "{words[-2]}"; echo "${{COMPREPLY[*]}}"')
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(cases.values()), done


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells_name_the_commands_and_settings(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "inner.max_steps", "glyphs-5way-1shot-gd"))


# --- A real run in a process ---------------------------------------------------------------------------------------

COMMAND = [
    sys.executable, "-m", "imaml", "train", "--network.filters", "2", "--inner.max_steps", "1", "--linear.max_steps=1",
    "--outer.tasks", "2", "--outer.queries", "1", "--meta-steps", "400", "--out", "run",
]  # fmt: skip


def environment(cache):
    settings = {"IMAML_CACHE": str(cache), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return os.environ | settings | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # halves the time of compilation


def interrupt_at_first_step(folder, cache):
    """Run the command, send it SIGINT when it prints its first meta-step, and return its exit code and output."""
    process = subprocess.Popen(
        COMMAND, cwd=folder, env=environment(cache), text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    watchdog = threading.Timer(TIMEOUT, process.kill)
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


@pytest.mark.slow("trains a preset by its command, twice")
def test_interrupted_training_exits_with_130_and_the_same_command_resumes_it(tmp_path, glyph_cache):
    run = tmp_path / "run"
    code, output = interrupt_at_first_step(tmp_path, glyph_cache)
    assert code == 130, output
    assert "of 400 and saved; run the same command again to resume" in output
    stopped_at = len(runlog.read_log(run))
    assert 1 <= stopped_at == checkpoints.newest(run).step < 400
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env=environment(glyph_cache), capture_output=True, encoding="utf-8", timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "test accuracy " in done.stdout and "(chance 20%)" in done.stdout
    assert f"step {stopped_at + 1}/400" in done.stdout
    assert [entry.step for entry in runlog.read_log(run)] == list(range(1, 401))
    assert (run / "learning_curve.png").exists()
    assert json.loads((run / "result.json").read_text())["versions"]["python"] == sys.version.split()[0]
