"""The command line: ``imaml train``, ``evaluate``, ``predict``, ``export`` and the other commands in ``COMMANDS``.

An error in the arguments, or in the files that they name, is printed to stderr in one line, with exit code 2.
:mod:`imaml.arguments` parses the arguments. This module runs the commands and prints. Each command imports the modules
that it needs.
"""

import io
import json
import sys
from pathlib import Path

from imaml.arguments import parse
from imaml.errors import InputError
from imaml.parallel.devices import check_shares
from imaml.parallel.processes import Processes, joined, leave
from imaml.runs.interruption import exit_on_sigterm

USAGE_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    The exit code is 0 for success, 1 if a check of ``imaml verify`` fails, 2 for arguments or files that cannot be used
    and for training that diverges, 75 if another process of the same run was lost, 130 after Ctrl-C and 143 after
    SIGTERM.

    Args:
        arguments: the words of the command line after ``imaml``. With None they are taken from ``sys.argv``, and a
            failure ends the process without waiting for its threads. If the process has joined others, a failure ends
            it in any case; see :func:`.leave`.
    """
    owns_process = arguments is None  # with arguments, the threads may be the caller's
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
        options = parse(words)
        with exit_on_sigterm():
            return COMMANDS[options.command](options)
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""  # the error of a full disk has no file name
        print(f"{program}: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return USAGE_ERROR


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


def start_jax() -> None:
    """Configure JAX to use one device per CPU core, and to cache compiled programs on disk."""
    import jax

    from imaml.datasets.cache import cache_directory
    from imaml.parallel.devices import use_all_cores

    use_all_cores()
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _reporter(options, stream=None):
    """Return a Reporter that writes to ``stream``, by default stdout. With ``--quiet``, its output is discarded."""
    from imaml.runs.progress import Reporter

    return Reporter(io.StringIO() if options.quiet else stream)


def _train(options):
    processes = _processes(options, options.chosen.outer.tasks)
    start_jax()
    with joined(processes):
        return _train_here(options, options.chosen, writes=processes is None or processes.index == 0)


def _train_here(options, chosen, writes):
    """Train in this process, and return the exit code. With ``writes`` False, print and draw nothing."""
    from imaml.reports.plots import learning_curve
    from imaml.runs.training import train

    dataset = _dataset_name(options)
    name = chosen.name if chosen.algorithm == "imaml" else f"{chosen.name}-{chosen.algorithm}"
    name = name if options.dataset is None else f"{name}-{dataset}"
    directory = options.out or Path("runs") / (name if options.start is None else f"{name}-tuned")
    reporter = _reporter(options, sys.stdout if writes else io.StringIO())
    say = print if writes else lambda *_: None
    warn = (lambda message: print(message, file=sys.stderr)) if writes and options.quiet else reporter.event
    progress = say if not options.quiet else lambda *_: None
    progress(f"{chosen.name}: {chosen.title} on {dataset}, in {directory}")
    try:
        run = train(
            chosen, directory, options.data, dataset=options.dataset, start=options.start, devices=options.devices,
            on_event=reporter.event, on_warning=warn, on_progress=reporter.step,
            keep_checkpoints=options.keep_checkpoints,
        )  # fmt: skip
    finally:
        reporter.finish()
    picture = learning_curve(directory, getattr(chosen.episode, "ways", None)) if writes else None
    if run.stopped_by is not None:
        say(f"stopped at step {run.step} of {chosen.outer.steps} and saved; run the same command again to resume")
        return 128 + run.stopped_by
    if run.best_step is not None:
        progress(f"{run.step} meta-steps; the best validation, after {run.best_step} of them, chooses the parameters")
    say(run.evaluation)
    progress(f"learning curve: {picture}")
    return 0


def _dataset_name(options):
    """Return the name of a command's dataset: that of the option or the preset, or of the folder of one's own data."""
    from imaml.datasets import FOLDER

    if options.dataset == FOLDER and options.data is not None:
        return Path(options.data).resolve().name
    return options.chosen.dataset if options.dataset is None else options.dataset


def _evaluate(options):
    if (options.run_directory is None) == (options.record is None):
        raise InputError("evaluate takes the folder of a run, or --record NAME")
    start_jax()
    if options.record is not None:
        from imaml.reproduction import trained

        print(trained.evaluate(options.record, options.tasks, options.data))
        return 0
    from imaml.runs.evaluation import evaluate

    run = options.run_directory
    print(evaluate(run, tasks=options.tasks, data=options.data, best=options.best, on_event=print, part=options.part))
    return 0


def _predict(options):
    start_jax()
    from imaml.runs.learner import load
    from imaml.runs.prediction import predict_files

    learner = load(options.run, best=options.best, on_event=_warn)
    invert = None if options.ink is None else options.ink == "dark"
    found = predict_files(learner, options.support, options.query, options.transductive, invert)
    print(json.dumps(found.records(), indent=2) if options.json else found)
    return 0


def _export(options):
    from imaml.runs.learner import load

    load(options.run, best=options.best, on_event=_warn).save(options.out)
    print(f"{options.out} holds the trained parameters; load them in Python by imaml.load({str(options.out)!r})")
    return 0


def _warn(message):
    print(message, file=sys.stderr)


def _verify(options):
    start_jax()
    from imaml.runs.verification import verify

    verification = verify(options.chosen, options.data, dataset=options.dataset, on_event=_reporter(options).event)
    print(verification)
    return 0 if verification.ok else 1


def _presets(options):
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


def _record(options):
    from imaml.reproduction.commands import record

    print(record(options.run_directory, options.out, options.note, options.hardware))
    return 0


def _reproduce(options):
    from imaml.reproduction.commands import check, reproduce

    check(options.work, options.records, options.format)
    start_jax()
    reporter = _reporter(options, sys.stderr)  # stdout is kept for the table, which may be redirected to a file
    print(reproduce(options.work, options.records, options.out, options.format, reporter.event))
    return 0


def _inner_loop(chosen):
    steps = chosen.inner.max_steps
    evaluated = f", {chosen.test_steps} in evaluation" if chosen.test_steps else ""
    return f"{steps} inner steps of size {chosen.inner.step_size:g}{evaluated}"


def _data(options):
    from imaml.datasets import download

    reporter = _reporter(options)
    try:
        folder = download(options.dataset, options.dir, options.url, reporter.event, reporter.transfer)
    finally:
        reporter.finish()
    data_option = "" if options.dir is None else f" --data {folder}"
    print(f"{options.dataset} is complete in {folder}; train on it: imaml train omniglot-5way-1shot-gd{data_option}")
    return 0


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "verify": _verify,
    "presets": _presets,
    "record": _record,
    "reproduce": _reproduce,
    "data": _data,
}
"""The function of each command. It takes the parsed options and returns the exit code."""
