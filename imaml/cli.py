"""The command line: ``imaml train``, ``evaluate``, ``presets``, ``verify``, ``data``, ``record`` and ``reproduce``.

What is wrong with what was typed, or with the files that it names, is said in one sentence with exit code 2,
before anything is written. This module only parses and prints.
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
    "Every setting of a preset can be changed: --strength 0.5 --inner.steps 32; 'imaml presets NAME' lists them. "
    "--algorithm maml, fomaml or reptile trains that one with all else equal but the inner loop."
)

REPRODUCE_EPILOG = (
    "table2 reads the records of runs ('imaml record' makes one); figure2a is computed in seconds, figure2b in minutes."
)

TRAIN_OPTIONS = (
    "--data", "--out", "--meta-steps", "--keep-checkpoints", "--devices", "--coordinator", "--processes",
    "--process-id", "--help",
)  # fmt: skip
"""Those of ``imaml train`` beside the settings of its preset."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 for a check that failed; 2 for what cannot be used; 75 where another process of the run was lost; 130 or 143
    when stopped.
    """
    alone = arguments is None  # else the process belongs to whoever calls
    try:
        code = _run(arguments)
    except SystemExit as end:  # SIGTERM's; --help's is 0
        leave(int(end.code or 0), threads=alone)
        raise
    leave(code, threads=alone)
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
        where = f": {error.filename}" if error.filename else ""  # a full disk names no file
        print(f"{program}: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return USAGE_ERROR


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one sentence like everybody else's."""

    def error(self, message):
        raise InputError(f"{message}; see '{self.prog} --help'")


def _parser():
    parser = _Parser(
        prog="imaml",
        description="Few-shot learning with implicit MAML, and MAML, first-order MAML and Reptile beside it.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a preset, or resume", epilog=EPILOG, allow_abbrev=False)
    train.add_argument("preset", nargs="?", metavar="PRESET", help="default: glyphs-5way-1shot-gd, which needs no data")
    train.add_argument("--data", metavar="DIR", help="the folder of the dataset's files, where it is not embedded")
    train.add_argument("--out", metavar="DIR", type=Path, help="the run's folder; default: runs/PRESET")
    train.add_argument("--meta-steps", metavar="N", help="the same as --outer.steps")
    train.add_argument(
        "--keep-checkpoints", metavar="K", type=int, default=2, help="the last K stay, and the best (default: 2)"
    )
    train.add_argument(
        "--devices", metavar="N", type=_devices, help="of each process, or 'all' (default: as many as divide the tasks)"
    )
    train.add_argument("--coordinator", metavar="HOST:PORT", help="where the processes meet: a port of process 0")
    train.add_argument("--processes", metavar="N", type=int, help="that train together; start the command in each")
    train.add_argument("--process-id", metavar="I", type=int, help="which one this is, from 0; process 0 writes")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="accuracy or error of a run on held-out tasks", allow_abbrev=False)
    evaluate.add_argument("run_directory", metavar="RUN", type=Path, help="the folder of a run")
    evaluate.add_argument("--data", metavar="DIR", help="as for train")
    evaluate.add_argument(
        "--tasks", metavar="N", type=int, default=600, help="held-out tasks (default: the paper's 600)"
    )
    evaluate.add_argument(
        "--best", action="store_true", help="the checkpoint of least loss on training classes, not the last one"
    )
    evaluate.set_defaults(run=_evaluate)

    verify = commands.add_parser("verify", help="check a preset's meta-gradient at its real size", allow_abbrev=False)
    verify.add_argument("preset", nargs="?", metavar="PRESET", help="as for train")
    verify.add_argument("--data", metavar="DIR", help="as for train")
    verify.set_defaults(run=_verify)

    presets = commands.add_parser("presets", help="list the presets, or show one", allow_abbrev=False)
    presets.add_argument("preset", nargs="?", metavar="NAME")
    presets.set_defaults(run=_presets)

    record = commands.add_parser(
        "record", help="keep what a finished run came to, in one small file", allow_abbrev=False
    )
    record.add_argument("run_directory", metavar="RUN", type=Path, help="the folder of a finished run")
    record.add_argument("--out", metavar="DIR", type=Path, help="the folder that keeps records; default: records")
    record.add_argument("--note", metavar="TEXT", default="", help="what a reader should know besides")
    record.add_argument("--hardware", metavar="TEXT", help="that it was trained on, in words; default: this machine")
    record.set_defaults(run=_record)

    reproduce = commands.add_parser(
        "reproduce", help="the paper's table or figures beside ours", epilog=REPRODUCE_EPILOG, allow_abbrev=False
    )
    reproduce.add_argument("work", metavar="NAME", help="table2, figure2a or figure2b")
    reproduce.add_argument(
        "--records", metavar="DIR", type=Path, help="of the runs in table2; default: those that come with the package"
    )
    reproduce.add_argument(
        "--out", metavar="DIR", type=Path, help="a folder for the picture, and for what was measured"
    )
    reproduce.add_argument("--format", metavar="FORM", default="terminal", help="terminal (default) or markdown")
    reproduce.set_defaults(run=_reproduce)

    data = commands.add_parser("data", help="fetch and check a dataset's official files", allow_abbrev=False)
    data.add_argument("dataset", metavar="NAME", help="omniglot")
    data.add_argument("--dir", metavar="DIR", type=Path, help="where to put them; default: where train looks for them")
    data.add_argument("--url", metavar="URL", help="a mirror: the address of the folder that holds them")
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
    """The words that argparse knows, and the settings, ``--path value`` or ``--path=value``, as pairs."""
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
    # The algorithm first: it brings its own inner loop, whose settings others may then change.
    for path, value in sorted(overrides, key=lambda pair: pair[0] != "algorithm"):
        current = current_path(chosen, path)
        if current != path:
            print(f"imaml train: --{path} is deprecated: use --{current}", file=sys.stderr)
        chosen = override(chosen, current, value)
    return chosen


def _processes(options, tasks):
    """What the options say of processes, if anything, and whether the tasks can be shared out to them."""
    given = {"--coordinator": options.coordinator, "--processes": options.processes, "--process-id": options.process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise InputError(f"{', '.join(given)} belong together: {' and '.join(missing)} missing")
    processes = None if missing else Processes(*given.values())
    devices = options.devices if isinstance(options.devices, int) else 1
    check_shares(tasks, processes.count if processes else 1, devices)
    return processes


def _start_jax():
    """All cores, and compiled programs kept between runs."""
    import jax

    from imaml.datasets.cache import cache_directory
    from imaml.parallel.devices import use_all_cores

    use_all_cores()
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _train(options, overrides):
    chosen = _chosen(options, overrides)
    processes = _processes(options, chosen.outer.tasks)
    _start_jax()
    with joined(processes):
        return _train_here(options, chosen, writes=processes is None or processes.index == 0)


def _train_here(options, chosen, writes):
    """This process's share of the training; who does not write does not speak either, but of what went wrong."""
    from imaml.report.plots import learning_curve
    from imaml.report.progress import Reporter
    from imaml.runs.training import train

    name = chosen.name if chosen.algorithm == "imaml" else f"{chosen.name}-{chosen.algorithm}"
    directory = options.out or Path("runs") / name
    reporter = Reporter(sys.stdout if writes else io.StringIO())
    tell = print if writes else lambda *_, **__: None
    tell(f"{chosen.name}: {chosen.title} on {chosen.dataset}, in {directory}", flush=True)
    try:
        run = train(
            chosen, directory, options.data, devices=options.devices, on_event=reporter.event,
            on_progress=reporter.step, keep_checkpoints=options.keep_checkpoints,
        )  # fmt: skip
    finally:
        reporter.finish()
    picture = learning_curve(directory, getattr(chosen.episode, "ways", None)) if writes else None
    if run.stopped_by is not None:
        tell(f"stopped at step {run.step} of {chosen.outer.steps} and saved; the same command goes on from there")
        return 128 + run.stopped_by
    tell(run.evaluation)
    tell(f"learning curve: {picture}")
    return 0


def _evaluate(options, _):
    _start_jax()
    from imaml.runs.evaluation import evaluate

    run = options.run_directory
    print(evaluate(run, tasks=options.tasks, data=options.data, best=options.best, on_event=print))
    return 0


def _verify(options, _):
    from imaml.settings.published_presets import preset, presets

    chosen = preset(presets()[0] if options.preset is None else options.preset)
    _start_jax()
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
    print("\nwhere it departs from the citation")
    for sentence in chosen.deviations():
        print(f"  - {sentence}")
    if chosen.baselines is not None:
        print("\nother algorithms, each with its own inner loop and all else equal")
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
    _start_jax()
    from imaml.report.progress import Reporter

    reporter = Reporter(sys.stderr)  # so that a table can be sent to a file
    print(reproduce(options.work, options.records, options.out, options.format, reporter.event))
    return 0


def _inner_loop(chosen):
    steps = chosen.inner.max_steps
    tested = f", {chosen.test_steps} in evaluation" if chosen.test_steps else ""
    return f"steps of size {chosen.inner.step_size:g}: {steps}{tested}"


def _data(options, _):
    from imaml.datasets import download
    from imaml.report.progress import Reporter

    reporter = Reporter()
    try:
        folder = download(options.dataset, options.dir, options.url, reporter.event, reporter.transfer)
    finally:
        reporter.finish()
    named = "" if options.dir is None else f" --data {folder}"
    print(f"{options.dataset} is whole in {folder}; train on it: imaml train omniglot-5way-1shot-gd{named}")
    return 0
