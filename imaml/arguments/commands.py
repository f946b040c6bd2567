"""The commands of the command line, each with its arguments."""

import argparse
from pathlib import Path

from imaml.arguments.parser import Parser, Version, one_of

SHELLS = ("bash", "zsh", "fish")
"""The shells for which ``imaml completion`` prints a script."""

EPILOG = (
    "Every setting above can be changed, for example --strength 0.5 --inner.max_steps 32. If a description names "
    "types, such as MLP, read the part after the type that your preset uses. If that type is not named, the preset "
    "does not have the setting. 'imaml {} PRESET --help' shows the settings of one preset with their values. "
    "--algorithm maml, fomaml or reptile changes the inner loop as well."
)
REPRODUCE_EPILOG = (
    "table2 reads the records of runs, which 'imaml record' makes. figure2a takes seconds to compute, and figure2b "
    "takes minutes."
)
DIAGNOSE_EPILOG = (
    "The nearest class mean and the linear probe classify the features of the trained network without adaptation. If "
    "they are as accurate as the adapted network, adaptation adds nothing to the features."
)
COMPLETION_EPILOG = (
    "For bash: imaml completion bash > ~/.local/share/bash-completion/completions/imaml. "
    "For zsh: imaml completion zsh > DIR/_imaml, with a folder DIR of $fpath. "
    "For fish: imaml completion fish > ~/.config/fish/completions/imaml.fish. Then start a new shell."
)
CONFIG = (
    "a TOML file with options of this command under their names without dashes, such as meta-steps = 60, and settings "
    "such as inner.max_steps = 32; the command line wins over the file"
)

LOGGERS = ("tensorboard", "wandb")
"""The words that ``imaml train --log`` accepts."""
FORMATS = ("terminal", "markdown", "json")
"""The forms of the table of ``imaml compare``."""

WITH_SETTINGS = ("train", "verify", "sweep")
"""The commands that accept the settings of a preset as options."""


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command line, and the parsers of the commands by their names."""
    parser = Parser(
        prog="imaml",
        description="Few-shot learning with implicit MAML, MAML, first-order MAML and Reptile.",
        epilog="'imaml COMMAND --help' lists the options of a command.",
    )
    parser.add_argument(
        "--version", action=Version, nargs=0, default=argparse.SUPPRESS,
        help="print the versions of imaml and its dependencies and exit",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a preset, or resume a run", epilog=EPILOG.format("train"))
    _add_preset(train)
    _add_data(train)
    _add_dataset(train)
    train.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="the run's folder; default: runs/PRESET, with -ALGORITHM and the dataset's name appended if chosen, and "
        "-tuned with --start",
    )
    train.add_argument(
        "--start",
        metavar="RUN",
        type=Path,
        help="start from the parameters in the folder of a run or in a file of 'imaml export', or from those of a "
        "record in the package, to fine-tune them",
    )
    train.add_argument(
        "--log",
        metavar="|".join(LOGGERS),
        action="append",
        type=one_of(*LOGGERS),
        default=[],
        help="send the progress to this program too; can be given twice. The log metrics.jsonl is written in any case",
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

    evaluate = commands.add_parser("evaluate", help="measure accuracy or error of a run on held-out tasks")
    evaluate.add_argument("run_directory", metavar="RUN", type=Path, nargs="?", help="the folder of a run")
    evaluate.add_argument(
        "--record",
        metavar="NAME",
        help="evaluate trained parameters that come with the package, by the name of their record",
    )
    _add_evaluation(evaluate)

    diagnose = commands.add_parser(
        "diagnose", help="compare a run with classifiers that do not adapt, and measure its calibration",
        epilog=DIAGNOSE_EPILOG,
    )  # fmt: skip
    diagnose.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    _add_evaluation(diagnose)

    predict = commands.add_parser("predict", help="adapt a run to a folder of labelled images, and label other images")
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
    predict.add_flag(
        "transductive",
        "normalise by the statistics of the query images, as published, instead of those of the support images",
    )
    predict.add_argument(
        "--ink",
        metavar="dark|bright",
        type=one_of("dark", "bright"),
        help="whether ink is dark or bright in the images, for a run on glyphs or Omniglot (default: dark). Without "
        "this option, a run on a folder of images reads new images as it read that folder",
    )

    export = commands.add_parser("export", help="write trained parameters and their settings to one file")
    _add_trained(export)
    export.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the file to write, NAME.safetensors or NAME.npz"
    )

    verify = commands.add_parser(
        "verify", help="check a preset's meta-gradient on the full-size network", epilog=EPILOG.format("verify")
    )
    _add_preset(verify)
    _add_data(verify)
    _add_dataset(verify)

    report = commands.add_parser("report", help="write a report of a run as one HTML file")
    report.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, finished or not")
    report.add_argument(
        "--out", metavar="FILE", type=Path, help="the file to write; default: report.html in the run's folder"
    )
    report.add_argument(
        "--tasks",
        metavar="N",
        type=int,
        help="number of held-out tasks for calibration, confusion and examples (default: as in the run's evaluation)",
    )
    _add_data(report)

    compare = commands.add_parser("compare", help="print a table of runs and of the settings in which they differ")
    compare.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the folders of the runs")
    compare.add_argument(
        "--format",
        metavar="|".join(FORMATS),
        default="terminal",
        type=one_of(*FORMATS),
        help="form of the table (default: terminal)",
    )

    sweep = commands.add_parser(
        "sweep",
        help="train every combination of some settings, and compare them on validation classes",
        epilog=EPILOG.format("sweep"),
    )
    _add_preset(sweep)
    sweep.add_argument(
        "--over",
        metavar="SETTING=VALUE,…",
        action="append",
        type=_varied,
        required=True,
        default=[],
        help="a setting and the values to try, such as inner.step_size=0.05,0.1; give the option once for each setting",
    )
    sweep.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder for the folders of the runs")
    sweep.add_argument("--meta-steps", metavar="N", help="the same as --outer.steps")
    _add_data(sweep)
    _add_dataset(sweep)

    presets = commands.add_parser("presets", help="list the presets, or show one")
    presets.add_argument("preset", nargs="?", metavar="NAME", help="the preset to show")

    record = commands.add_parser("record", help="write settings, results and parameters of a finished run to a folder")
    record.add_argument("run_directory", metavar="RUN", type=Path, help="the folder of a finished run")
    record.add_argument("--out", metavar="DIR", type=Path, help="the folder for the record; default: records")
    record.add_argument("--note", metavar="TEXT", default="", help="a remark for readers of the record")
    record.add_argument(
        "--hardware",
        metavar="TEXT",
        help="description of the machine that the run was trained on; default: this machine",
    )

    reproduce = commands.add_parser(
        "reproduce", help="compare the paper's table or figures with ours", epilog=REPRODUCE_EPILOG
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

    data = commands.add_parser("data", help="fetch and check a dataset's official files")
    data.add_argument("dataset", metavar="NAME", help="omniglot, or omniglot-alphabets with the same two archives")
    data.add_argument(
        "--dir",
        metavar="DIR",
        type=Path,
        help="the folder for the files; default: the folder that 'imaml train' reads",
    )
    data.add_argument("--url", metavar="URL", help="address of a folder on a mirror that has the files")

    completion = commands.add_parser(
        "completion", help="print a script that completes commands and options in a shell", epilog=COMPLETION_EPILOG
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, type=one_of(*SHELLS), help=", ".join(SHELLS))

    for command in commands.choices.values():
        command.add_argument("--config", metavar="FILE", type=Path, help=CONFIG)
        command.add_flag("quiet", "print the result, but no progress")
        command.add_flag("json", "print the result as one JSON object; progress goes to stderr")
    return parser, dict(commands.choices)


def _add_preset(command):
    command.add_argument(
        "preset", nargs="?", metavar="PRESET", help="default: glyphs-5way-1shot-gd, which needs no files"
    )


def _add_trained(command):
    command.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="the folder of a run, a file of 'imaml export', or the name of a record with parameters in the package",
    )
    _add_best(command)


def _add_evaluation(command):
    _add_data(command)
    command.add_argument(
        "--tasks", metavar="N", type=int, default=600, help="number of held-out tasks (default: the paper's 600)"
    )
    _add_best(command)
    command.add_argument(
        "--part",
        metavar="PART",
        default="test",
        help="take the test classes (test, the default) or the validation classes (validation)",
    )


def _add_best(command):
    command.add_argument(
        "--best",
        action="store_const",
        const=True,
        help="take the checkpoint with the best validation; in a run without validation, take the one with the least "
        "training loss instead of the last one",
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
        "folder of images for each class; 'omniglot-alphabets' is Omniglot, split by whole alphabets; any other NAME "
        "is a dataset of this or of another installed package",
    )


def _varied(text):
    path, equals, values = text.partition("=")
    if not (path and equals) or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"must be a setting and its values, such as strength=1,2, got {text!r}")
    return path.removeprefix("--"), values.split(",")


def _devices(text):
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, or 'all', got {text!r}")
    return int(text)
