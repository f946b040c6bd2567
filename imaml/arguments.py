"""The arguments of the command line: the parser, and the settings that follow ``--path value``."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from imaml.errors import InputError
from imaml.runs.versions import versions
from imaml.settings.overrides import override, settings
from imaml.settings.preset import Preset
from imaml.settings.published_presets import preset, presets
from imaml.settings.renamed import current_path

EPILOG = (
    "Every setting of a preset can be changed, for example --strength 0.5 --inner.max_steps 32; 'imaml presets NAME' "
    "lists the settings. --algorithm maml, fomaml or reptile trains another algorithm, with its own inner loop and all "
    "other settings equal."
)

VERIFY_EPILOG = "The settings of the preset can be changed as in 'imaml train', for example --linear.max_steps 20."
REPRODUCE_EPILOG = (
    "table2 reads the records of runs, which 'imaml record' makes. figure2a takes seconds to compute, and figure2b "
    "takes minutes."
)

WITH_SETTINGS = ("train", "verify")
"""The commands that accept the settings of a preset as options."""
WITH_PROGRESS = ("train", "verify", "reproduce", "data")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command, such as ``["train", "--strength", "0.5"]``.

    The result has one attribute for each argument of the command, and the name of the command as ``command``. For
    ``train`` and ``verify``, ``chosen`` is the :class:`imaml.Preset` with all overridden settings. For a setting with a
    deprecated path, a message is printed to stderr.

    Args:
        words: the words of the command line after ``imaml``.

    Raises:
        InputError: for words that cannot be used. For an unknown option or setting, the message suggests a similar one
            if there is one.
    """
    parser, commands = _parsers()
    overrides = []
    if words and words[0] in WITH_SETTINGS:
        words, overrides = _split(words, commands[words[0]].options)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], commands[options.command].options, n=1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f": did you mean {near[0]}?" if near else ""))
    if options.command in WITH_SETTINGS:
        options.chosen = _chosen(options, overrides, commands[options.command].options)
    return options


class _Parser(argparse.ArgumentParser):
    """Parser that raises errors of argparse as InputError, and keeps the names of its options in ``options``."""

    def __init__(self, *arguments, **keywords):
        self.options: list[str] = []
        super().__init__(*arguments, **keywords)

    def add_argument(self, *names, **keywords):
        self.options += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **keywords)

    def error(self, message):
        raise InputError(f"{message}; see '{self.prog} --help'")


def _parsers():
    """Return the parser of all commands, and the parser of each command by its name."""
    parser = _Parser(
        prog="imaml",
        description="Few-shot learning with implicit MAML, MAML, first-order MAML and Reptile.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a preset, or resume a run", epilog=EPILOG, allow_abbrev=False)
    _add_preset(train)
    _add_data(train)
    _add_dataset(train)
    train.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="the run's folder; default: runs/PRESET, with -ALGORITHM and -DATASET appended if these are given, and "
        "-tuned with --start",
    )
    train.add_argument(
        "--start",
        metavar="RUN",
        type=Path,
        help="start from the parameters in the folder of a run or in a file of 'imaml export', to fine-tune them",
    )
    train.add_argument("--meta-steps", metavar="N", help="the same as --outer.steps")
    train.add_argument(
        "--keep-checkpoints",
        metavar="K",
        type=int,
        default=2,
        help="keep the last K checkpoints and the best one (default: 2)",
    )
    train.add_argument(
        "--devices",
        metavar="N",
        type=_devices,
        help="number of devices of each process, or 'all' (default: the largest number that divides the tasks)",
    )
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, with a free port, for training with several processes",
    )
    train.add_argument(
        "--processes",
        metavar="N",
        type=int,
        help="number of processes that train together; start each with the same command except for --process-id",
    )
    train.add_argument(
        "--process-id", metavar="I", type=int, help="index of this process, from 0; process 0 writes the files"
    )

    evaluate = commands.add_parser(
        "evaluate", help="measure accuracy or error of a run on held-out tasks", allow_abbrev=False
    )
    evaluate.add_argument("run_directory", metavar="RUN", type=Path, nargs="?", help="the folder of a run")
    evaluate.add_argument(
        "--record",
        metavar="NAME",
        help="evaluate trained parameters that come with the package, by the name of their record",
    )
    _add_data(evaluate)
    evaluate.add_argument(
        "--tasks", metavar="N", type=int, default=600, help="number of held-out tasks (default: the paper's 600)"
    )
    _add_best(evaluate)
    evaluate.add_argument(
        "--part",
        metavar="PART",
        default="test",
        help="test (default), or validation for the validation classes of your own dataset",
    )

    predict = commands.add_parser(
        "predict", help="adapt a run to a folder of labelled images, and label other images", allow_abbrev=False
    )
    _add_trained(predict)
    predict.add_argument(
        "--support",
        metavar="DIR",
        type=Path,
        required=True,
        help="a folder with one subfolder of images for each class",
    )
    predict.add_argument(
        "--query", metavar="DIR", type=Path, required=True, help="a folder of the images to label, or one image"
    )
    predict.add_argument(
        "--transductive",
        action="store_true",
        help="normalise by the statistics of the query images, as published, instead of those of the support images",
    )
    predict.add_argument(
        "--ink",
        choices=("dark", "bright"),
        help="whether ink is dark or bright in the images, for a run on drawings (default: dark)",
    )
    predict.add_argument("--json", action="store_true", help="print JSON, with the probability of every class")

    export = commands.add_parser(
        "export", help="write trained parameters and their settings to one file", allow_abbrev=False
    )
    _add_trained(export)
    export.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the file to write, NAME.safetensors or NAME.npz"
    )

    verify = commands.add_parser(
        "verify", help="check a preset's meta-gradient at its real size", epilog=VERIFY_EPILOG, allow_abbrev=False
    )
    _add_preset(verify)
    _add_data(verify)
    _add_dataset(verify)

    presets = commands.add_parser("presets", help="list the presets, or show one", allow_abbrev=False)
    presets.add_argument("preset", nargs="?", metavar="NAME")

    record = commands.add_parser(
        "record", help="write the settings and results of a finished run into one small file", allow_abbrev=False
    )
    record.add_argument("run_directory", metavar="RUN", type=Path, help="the folder of a finished run")
    record.add_argument("--out", metavar="DIR", type=Path, help="the folder for the record; default: records")
    record.add_argument("--note", metavar="TEXT", default="", help="a remark for readers of the record")
    record.add_argument(
        "--hardware",
        metavar="TEXT",
        help="description of the machine that the run was trained on; default: this machine",
    )

    reproduce = commands.add_parser(
        "reproduce", help="compare the paper's table or figures with ours", epilog=REPRODUCE_EPILOG, allow_abbrev=False
    )
    reproduce.add_argument("work", metavar="NAME", help="table2, figure2a or figure2b")
    reproduce.add_argument(
        "--records",
        metavar="DIR",
        type=Path,
        help="the folder of the records for table2; default: the records in the package",
    )
    reproduce.add_argument("--out", metavar="DIR", type=Path, help="a folder for the picture and the measured numbers")
    reproduce.add_argument("--format", metavar="FORM", default="terminal", help="terminal (default) or markdown")

    data = commands.add_parser("data", help="fetch and check a dataset's official files", allow_abbrev=False)
    data.add_argument("dataset", metavar="NAME", help="omniglot")
    data.add_argument(
        "--dir",
        metavar="DIR",
        type=Path,
        help="the folder for the files; default: the folder that 'imaml train' reads",
    )
    data.add_argument("--url", metavar="URL", help="address of a folder on a mirror that has the files")
    for name in WITH_PROGRESS:
        commands.choices[name].add_argument("--quiet", action="store_true", help="print the result, but no progress")
    return parser, commands.choices


def _add_preset(command):
    command.add_argument(
        "preset", nargs="?", metavar="PRESET", help="default: glyphs-5way-1shot-gd, which needs no files"
    )


def _add_trained(command):
    command.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, or a file of 'imaml export'")
    _add_best(command)


def _add_best(command):
    command.add_argument(
        "--best",
        action="store_const",
        const=True,
        help="take the checkpoint with the best validation or, in a run without validation, with the least training "
        "loss instead of the last one",
    )
    command.add_argument(
        "--last",
        dest="best",
        action="store_const",
        const=False,
        help="take the last checkpoint of a run with validation instead of the one with the best validation",
    )


def _add_data(command):
    command.add_argument("--data", metavar="DIR", help="the folder of the dataset's files, if it needs any")


def _add_dataset(command):
    command.add_argument(
        "--dataset",
        metavar="NAME",
        help="use another dataset than the preset's: 'folder' reads your own images from --data DIR, which holds one "
        "folder of images for each class; any other NAME is a dataset that an installed package offers",
    )


def _devices(text):
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, or 'all', got {text!r}")
    return int(text)


def _version():
    found = versions()
    return f"imaml {found.pop('imaml')} ({', '.join(f'{name} {number}' for name, number in found.items())})"


def _split(words, options):
    """Split the arguments of a command into those for argparse, and pairs of a setting's path and its value as text.

    A setting is written ``--path value`` or ``--path=value``. Every option that is not in ``options`` counts as a
    setting. The text is None if no value follows.
    """
    known, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in options:
            known.append(word)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else None
        overrides.append((option[2:], value))
    return known, overrides


def _chosen(options, overrides, known) -> Preset:
    """Return the preset of a command with the overridden settings; ``known`` lists the other options of the command."""
    chosen = preset(presets()[0] if options.preset is None else options.preset)
    if getattr(options, "meta_steps", None) is not None:
        overrides = [*overrides, ("outer.steps", options.meta_steps)]
    # Override the algorithm first: it replaces the inner loop, whose settings other overrides may change.
    for path, value in sorted(overrides, key=lambda pair: pair[0] != "algorithm"):
        current = current_path(chosen, path)
        if current not in settings(chosen):
            if near := difflib.get_close_matches(f"--{path}", known, n=1, cutoff=0.75):
                raise InputError(f"there is no option --{path}: did you mean {near[0]}?")
        elif value is None:
            raise InputError(f"--{path} needs a value")
        if current != path:
            print(f"imaml {options.command}: --{path} is deprecated: use --{current}", file=sys.stderr)
        chosen = override(chosen, current, value or "")
    return chosen
