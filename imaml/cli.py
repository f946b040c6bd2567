"""The command line: ``imaml train``, ``evaluate``, ``presets``, ``verify``, ``data``, ``record`` and ``reproduce``.

An error in the arguments, or in the files that they name, is printed to stderr in one sentence, with exit code 2. This
module only parses arguments and prints. Its commands import the modules that do the work.
"""

import argparse
import difflib
import io
import sys
from pathlib import Path

from imaml.errors import InputError
from imaml.parallel.devices import check_shares
from imaml.parallel.processes import Processes, joined, leave
from imaml.runs.interruption import exit_on_sigterm
from imaml.runs.versions import versions

USAGE_ERROR = 2
EPILOG = (
    "Every setting of a preset can be changed, for example --strength 0.5 --inner.max_steps 32; 'imaml presets NAME' "
    "lists the settings. --algorithm maml, fomaml or reptile trains another algorithm, with its own inner loop and all "
    "other settings equal."
)

REPRODUCE_EPILOG = (
    "table2 reads the records of runs, which 'imaml record' makes. figure2a takes seconds to compute, figure2b minutes."
)

TRAIN_OPTIONS = (
    "--data", "--out", "--meta-steps", "--keep-checkpoints", "--devices", "--coordinator", "--processes",
    "--process-id", "--help",
)  # fmt: skip
"""The options of ``imaml train`` that argparse reads. Any other option is the path of a setting of the preset."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    The exit code is 0 for success, 1 if ``imaml verify`` finds an error, 2 for arguments or files that cannot be used
    and for training that diverges, 75 if another process of the same run was lost, 130 after Ctrl-C and 143 after
    SIGTERM.

    Args:
        arguments: the words of the command line after ``imaml``. With None they are taken from ``sys.argv``, and a
            failure ends the process without waiting for its threads.
    """
    owns_process = arguments is None  # with arguments, the process belongs to the caller and must not be ended
    try:
        code = _run(arguments)
    except SystemExit as end:  # raised on SIGTERM, and by --help and --version with code 0
        leave(int(end.code or 0), threads=owns_process)
        raise
    leave(code, threads=owns_process)
    return code


def _run(arguments):
    words = sys.argv[1:] if arguments is None else arguments
    command = words[0] if words else ""
    program = f"imaml {command}".rstrip()
    try:
        words, overrides = _split(words) if command == "train" else (words, [])
        options = _parser().parse_args(words)
        with exit_on_sigterm():
            return options.run(options, overrides)
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""  # the error of a full disk has no file name
        print(f"{program}: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return USAGE_ERROR


class _Parser(argparse.ArgumentParser):
    """Parser that raises errors of argparse as InputError, so that all errors are printed in the same form."""

    def error(self, message):
        raise InputError(f"{message}; see '{self.prog} --help'")


def _parser():
    parser = _Parser(
        prog="imaml",
        description="Few-shot learning with implicit MAML, MAML, first-order MAML and Reptile.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a preset, or resume a run", epilog=EPILOG, allow_abbrev=False)
    train.add_argument(
        "preset", nargs="?", metavar="PRESET", help="default: glyphs-5way-1shot-gd, which needs no files"
    )
    train.add_argument("--data", metavar="DIR", help="the folder of the dataset's files, if it needs any")
    train.add_argument("--out", metavar="DIR", type=Path, help="the run's folder; default: runs/PRESET")
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
        help="devices of each process, or 'all' (default: as many as divide the tasks)",
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
        help="number of processes that train together; start the same command in each",
    )
    train.add_argument(
        "--process-id", metavar="I", type=int, help="number of this process, from 0; process 0 writes the files"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate", help="measure accuracy or error of a run on held-out tasks", allow_abbrev=False
    )
    evaluate.add_argument("run_directory", metavar="RUN", type=Path, help="the folder of a run")
    evaluate.add_argument("--data", metavar="DIR", help="the folder of the dataset's files, if it needs any")
    evaluate.add_argument(
        "--tasks", metavar="N", type=int, default=600, help="number of held-out tasks (default: the paper's 600)"
    )
    evaluate.add_argument(
        "--best",
        action="store_true",
        help="evaluate the checkpoint with the least training loss instead of the last one",
    )
    evaluate.set_defaults(run=_evaluate)

    verify = commands.add_parser("verify", help="check a preset's meta-gradient at its real size", allow_abbrev=False)
    verify.add_argument(
        "preset", nargs="?", metavar="PRESET", help="default: glyphs-5way-1shot-gd, which needs no files"
    )
    verify.add_argument("--data", metavar="DIR", help="the folder of the dataset's files, if it needs any")
    verify.set_defaults(run=_verify)

    presets = commands.add_parser("presets", help="list the presets, or show one", allow_abbrev=False)
    presets.add_argument("preset", nargs="?", metavar="NAME")
    presets.set_defaults(run=_presets)

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
    record.set_defaults(run=_record)

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
    reproduce.set_defaults(run=_reproduce)

    data = commands.add_parser("data", help="fetch and check a dataset's official files", allow_abbrev=False)
    data.add_argument("dataset", metavar="NAME", help="omniglot")
    data.add_argument(
        "--dir", metavar="DIR", type=Path, help="the folder to put them in; default: the one that train reads"
    )
    data.add_argument("--url", metavar="URL", help="address of a folder on a mirror that has the files")
    data.set_defaults(run=_data)
    return parser


def _devices(text):
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 1 or 'all', got {text!r}")
    return int(text)


def _version():
    found = versions()
    return f"imaml {found.pop('imaml')} ({', '.join(f'{name} {number}' for name, number in found.items())})"


def _split(words):
    """Split the arguments of ``train`` into those for argparse, and pairs of a setting's path and its text.

    A setting is written ``--path value`` or ``--path=value``.
    """
    known, overrides, rest = [], [], iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in TRAIN_OPTIONS:
            known.append(word)
            continue
        value = value if equals else next(rest, None)
        if value is None or value.startswith("--"):
            raise InputError(f"{option} needs a value")
        if near := difflib.get_close_matches(option, TRAIN_OPTIONS, n=1, cutoff=0.7):
            raise InputError(f"there is no option {option}: did you mean {near[0]}?")
        overrides.append((option[2:], value))
    return known, overrides


def _chosen(options, overrides):
    from imaml.settings.overrides import override
    from imaml.settings.published_presets import preset, presets
    from imaml.settings.renamed import current_path

    chosen = preset(presets()[0] if options.preset is None else options.preset)
    if options.meta_steps is not None:
        overrides = [*overrides, ("outer.steps", options.meta_steps)]
    # Override the algorithm first: it replaces the inner loop, whose settings other overrides may change.
    for path, value in sorted(overrides, key=lambda pair: pair[0] != "algorithm"):
        current = current_path(chosen, path)
        if current != path:
            print(f"imaml train: --{path} is deprecated: use --{current}", file=sys.stderr)
        chosen = override(chosen, current, value)
    return chosen


def _processes(options, tasks):
    """Return the processes that the options name, or None for a run of one process.

    Raises:
        InputError: if some of the three options are missing, or if the tasks cannot be divided equally among the
            processes and their devices.
    """
    given = {"--coordinator": options.coordinator, "--processes": options.processes, "--process-id": options.process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise InputError(f"{', '.join(given)} belong together: {' and '.join(missing)} missing")
    processes = None if missing else Processes(*given.values())
    devices = options.devices if isinstance(options.devices, int) else 1
    check_shares(tasks, processes.count if processes else 1, devices)
    return processes


def start_jax():
    """Configure JAX to use one device per CPU core, and to cache compiled programs on disk."""
    import jax

    from imaml.datasets.cache import cache_directory
    from imaml.parallel.devices import use_all_cores

    use_all_cores()
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _train(options, overrides):
    chosen = _chosen(options, overrides)
    processes = _processes(options, chosen.outer.tasks)
    start_jax()
    with joined(processes):
        return _train_here(options, chosen, writes=processes is None or processes.index == 0)


def _train_here(options, chosen, writes):
    """Train in this process, and return the exit code. With ``writes`` False, print and draw nothing."""
    from imaml.report.plots import learning_curve
    from imaml.report.progress import Reporter
    from imaml.runs.training import train

    name = chosen.name if chosen.algorithm == "imaml" else f"{chosen.name}-{chosen.algorithm}"
    directory = options.out or Path("runs") / name
    reporter = Reporter(sys.stdout if writes else io.StringIO())
    say = print if writes else lambda *_, **__: None
    say(f"{chosen.name}: {chosen.title} on {chosen.dataset}, in {directory}", flush=True)
    try:
        run = train(
            chosen, directory, options.data, devices=options.devices, on_event=reporter.event,
            on_progress=reporter.step, keep_checkpoints=options.keep_checkpoints,
        )  # fmt: skip
    finally:
        reporter.finish()
    picture = learning_curve(directory, getattr(chosen.episode, "ways", None)) if writes else None
    if run.stopped_by is not None:
        say(f"stopped at step {run.step} of {chosen.outer.steps} and saved; run the same command again to resume")
        return 128 + run.stopped_by
    say(run.evaluation)
    say(f"learning curve: {picture}")
    return 0


def _evaluate(options, _):
    start_jax()
    from imaml.runs.evaluation import evaluate

    run = options.run_directory
    print(evaluate(run, tasks=options.tasks, data=options.data, best=options.best, on_event=print))
    return 0


def _verify(options, _):
    from imaml.settings.published_presets import preset, presets

    chosen = preset(presets()[0] if options.preset is None else options.preset)
    start_jax()
    from imaml.report.progress import Reporter
    from imaml.runs.verification import verify

    verification = verify(chosen, options.data, on_event=Reporter().event)
    print(verification)
    return 0 if verification.ok else 1


def _presets(options, _):
    from imaml.learning.algorithms import ALGORITHMS
    from imaml.settings.overrides import settings
    from imaml.settings.published_presets import preset, presets

    if options.preset is None:
        print("\n".join(presets()))
        return 0
    chosen = preset(options.preset)
    print(f"{chosen.name}\n\n{chosen.citation}\n\nsettings")
    for path, value in settings(chosen).items():
        print(f"  --{path} {value}")
    print("\ndepartures from the citation")
    for sentence in chosen.deviations():
        print(f"  - {sentence}")
    if chosen.baselines is not None:
        print("\nother algorithms, each with its own inner loop and all other settings equal")
        for algorithm in list(ALGORITHMS)[1:]:
            other = chosen.using(algorithm)
            print(f"  --algorithm {algorithm}  ({other.title}, {_inner_loop(other)})")
    return 0


def _record(options, _):
    from imaml.reproduction.commands import record

    print(record(options.run_directory, options.out, options.note, options.hardware))
    return 0


def _reproduce(options, _):
    from imaml.reproduction.commands import check, reproduce

    check(options.work, options.records, options.format)
    start_jax()
    from imaml.report.progress import Reporter

    reporter = Reporter(sys.stderr)  # stdout is kept for the table, which may be redirected to a file
    print(reproduce(options.work, options.records, options.out, options.format, reporter.event))
    return 0


def _inner_loop(chosen):
    steps = chosen.inner.max_steps
    evaluated = f", {chosen.test_steps} in evaluation" if chosen.test_steps else ""
    return f"{steps} inner steps of size {chosen.inner.step_size:g}{evaluated}"


def _data(options, _):
    from imaml.datasets import download
    from imaml.report.progress import Reporter

    reporter = Reporter()
    try:
        folder = download(options.dataset, options.dir, options.url, reporter.event, reporter.transfer)
    finally:
        reporter.finish()
    data_option = "" if options.dir is None else f" --data {folder}"
    print(f"{options.dataset} is complete in {folder}; train on it: imaml train omniglot-5way-1shot-gd{data_option}")
    return 0
