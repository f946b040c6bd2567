"""The command line: ``imaml train``, ``evaluate``, ``predict``, ``export`` and the other commands in ``COMMANDS``.

An error in the arguments, or in the files that they name, is printed to stderr in one line, with exit code 2.
:mod:`imaml.arguments` parses the arguments. This module runs the commands and prints. Each command imports the modules
that it needs, because a message about a wrong argument should not wait for JAX.
"""

import contextlib
import io
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from imaml.arguments import parse
from imaml.errors import InputError
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
            failed command ends the process without waiting for its threads. If the process has joined others, a failed
            command ends it with or without ``arguments``; see :func:`.leave`.
    """
    owns_process = arguments is None  # otherwise another program has called main, and threads may belong to it
    try:
        code = _run(arguments)
    except SystemExit as end:  # raised on SIGTERM, and by --help and --version with code 0
        leave(int(end.code or 0), threads=owns_process)
        raise
    leave(code, threads=owns_process)
    return code


class Outcome(NamedTuple):
    """The result of a command.

    Attributes:
        record: the result in JSON types, for ``--json``.
        text: the result in words. Nothing is printed if text and record are both empty.
        code: the exit code.
    """

    record: dict[str, Any]
    text: str
    code: int = 0


def _run(arguments):
    words = sys.argv[1:] if arguments is None else arguments
    command = words[0] if words else ""
    program = f"imaml {command}".rstrip()
    try:
        options = parse(words)
        with exit_on_sigterm():
            with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
                outcome = COMMANDS[options.command](options)
            if outcome.text or outcome.record:
                _print(_json(outcome.record) if options.json else outcome.text)
            return outcome.code
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""  # the error of a full disk has no file name
        print(f"{program}: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return USAGE_ERROR


def _print(text):
    """Print a result. It is no error if the reader of a pipe has ended, as in ``imaml presets | head -n 1``."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json(record):
    return json.dumps(_finite(record), indent=2)


def _finite(value):
    """Return JSON types with None for each number that is not finite, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processes(options, tasks):
    """Return the processes that the options name, or None for a run of one process.

    Raises:
        InputError: if only some of ``--coordinator``, ``--processes`` and ``--process-id`` are given, or if the tasks
            cannot be divided equally among the processes and their devices.
    """
    given = {"--coordinator": options.coordinator, "--processes": options.processes, "--process-id": options.process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise InputError(f"{', '.join(given)} belong together: {' and '.join(missing)} missing")
    from imaml.parallel.devices import check_shares

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
    """Train in this process. With ``writes`` False, print and draw nothing."""
    from imaml.reports.plots import learning_curve
    from imaml.runs.training import train

    dataset = _dataset_name(options)
    name = chosen.name if chosen.algorithm == "imaml" else f"{chosen.name}-{chosen.algorithm}"
    name = name if options.dataset is None else f"{name}-{dataset}"
    directory = options.out or Path("runs") / (name if options.start is None else f"{name}-tuned")
    reporter = _reporter(options, None if writes else io.StringIO())
    warn = _warn if writes and options.quiet else reporter.event
    if writes and not options.quiet:
        print(f"{chosen.name}: {chosen.title} on {dataset}, in {directory}")
    try:
        run = train(
            chosen, directory, options.data, dataset=options.dataset, start=options.start, devices=options.devices,
            loggers=_loggers(options), on_event=reporter.event, on_warning=warn, on_progress=reporter.step,
            keep_checkpoints=options.keep_checkpoints,
        )  # fmt: skip
    finally:
        reporter.finish()
    code = 0 if run.stopped_by is None else 128 + run.stopped_by
    if not writes:
        return Outcome({}, "", code)
    picture = learning_curve(directory, getattr(chosen.episode, "ways", None))
    if run.stopped_by is not None:
        text = f"stopped at step {run.step} of {chosen.outer.steps} and saved; run the same command again to resume"
    else:
        text = str(run.evaluation) + ("" if options.quiet else f"\nlearning curve: {picture}")
    if run.finished and run.best_step is not None and not options.quiet:
        best = f"the parameters after {run.best_step} of {run.step} meta-steps had the best validation and are kept"
        text = f"{best}\n{text}"
    record = {
        "preset": chosen.name,
        "algorithm": chosen.algorithm,
        "dataset": dataset,
        "directory": str(directory),
        "step": run.step,
        "steps": chosen.outer.steps,
        "best_step": run.best_step,
        "finished": run.finished,
        "stopped_by": run.stopped_by and run.stopped_by.name,
        "evaluations": run.evaluation.records() if run.evaluation else [],
        "learning_curve": str(picture),
    }
    return Outcome(record, text, code)


def _loggers(options):
    from imaml.runs.loggers import TensorBoard, WeightsAndBiases

    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [kinds[name]() for name in dict.fromkeys(options.log)]


def _dataset_name(options):
    """Return the name of the folder for ``--dataset folder``, and otherwise the name in ``--dataset`` or the preset."""
    from imaml.datasets import FOLDER

    if options.dataset == FOLDER and options.data is not None:
        return Path(options.data).resolve().name
    return options.chosen.dataset if options.dataset is None else options.dataset


def _evaluate(options):
    if (options.run_directory is None) == (options.record is None):
        raise InputError("evaluate takes the folder of a run, or --record NAME")
    if options.record is not None and (options.part != "test" or options.best is not None):
        raise InputError("--part, --best and --last choose from the folder of a run: omit them with --record")
    start_jax()
    if options.record is not None:
        from imaml.reproduction import trained

        found = trained.evaluate(options.record, options.tasks, options.data)
    else:
        from imaml.runs.evaluation import evaluate

        found = evaluate(
            options.run_directory, tasks=options.tasks, data=options.data, best=options.best,
            on_event=_warn if options.quiet else print, part=options.part,
        )  # fmt: skip
    evaluated = {"record": options.record} if options.record else {"run": str(options.run_directory)}
    return Outcome(evaluated | {"part": options.part, "evaluations": found.records()}, str(found))


def _diagnose(options):
    start_jax()
    from imaml.runs.diagnosis import diagnose

    found = diagnose(
        options.run, tasks=options.tasks, data=options.data, best=options.best,
        on_event=_warn if options.quiet else print, part=options.part,
    )  # fmt: skip
    return Outcome({"run": str(options.run), "part": options.part} | found.record(), str(found))


def _predict(options):
    start_jax()
    from imaml.runs.learner import load
    from imaml.runs.prediction import predict_files

    learner = load(options.run, best=options.best, on_event=_warn)
    invert = None if options.ink is None else options.ink == "dark"
    found = predict_files(learner, options.support, options.query, options.transductive, invert)
    return Outcome(found.records(), str(found))


def _export(options):
    from imaml.runs.learner import load

    load(options.run, best=options.best, on_event=_warn).save(options.out)
    place = str(options.out)
    text = f"{place} holds the trained parameters; load them in Python by imaml.load({place!r})"
    return Outcome({"run": str(options.run), "file": place}, text)


def _warn(message):
    print(message, file=sys.stderr)


def _verify(options):
    start_jax()
    from imaml.runs.verification import verify

    reporter = _reporter(options)
    try:
        found = verify(
            options.chosen, options.data, dataset=options.dataset, on_event=reporter.event, on_progress=reporter.part
        )
    finally:
        reporter.finish()
    return Outcome(found.records(), str(found), 0 if found.ok else 1)


def _report(options):
    start_jax()
    from imaml.reports.run_report import report

    reporter = _reporter(options)
    path = report(
        options.run, options.out, tasks=options.tasks, data=options.data, on_event=reporter.event, on_warning=_warn
    )
    return Outcome({"run": str(options.run), "file": str(path)}, f"report: {path}")


def _compare(options):
    from imaml.reports.comparison import compare

    found = compare(options.runs)
    text = _json(found.records()) if options.format == "json" else found.table(options.format)
    return Outcome(found.records(), text)


def _sweep(options):
    start_jax()
    from imaml.runs.sweep import sweep

    reporter = _reporter(options)
    try:
        found = sweep(
            options.chosen, dict(options.over), options.out, options.data, dataset=options.dataset,
            on_event=reporter.event, on_warning=_warn if options.quiet else reporter.event, on_progress=reporter.step,
        )  # fmt: skip
    finally:
        reporter.finish()
    stopped = "" if found.stopped_by is None else "\nstopped; run the same command again to resume"
    return Outcome(found.records(), f"{found}{stopped}", 0 if found.stopped_by is None else 128 + found.stopped_by)


def _presets(options):
    from imaml.learning.algorithms import ALGORITHMS
    from imaml.settings.overrides import settings
    from imaml.settings.published_presets import preset, presets

    if options.preset is None:
        return Outcome({"presets": list(presets())}, "\n".join(presets()))
    chosen = preset(options.preset)
    lines = [chosen.name, "", chosen.citation, "", "settings"]
    lines += [f"  --{path} {value}" for path, value in settings(chosen).items()]
    lines += ["", "departures from the citation", *(f"  - {sentence}" for sentence in chosen.deviations())]
    others = [] if chosen.baselines is None else [chosen.using(name) for name in list(ALGORITHMS)[1:]]
    if others:
        lines += ["", "other algorithms, each with its own inner loop and all other settings equal"]
    lines += [f"  --algorithm {other.algorithm}  ({other.title}, {_inner_loop(other)})" for other in others]
    record = {
        "name": chosen.name,
        "dataset": chosen.dataset,
        "citation": chosen.citation,
        "settings": settings(chosen),
        "departures": list(chosen.deviations()),
        "other_algorithms": {other.algorithm: settings(other) for other in others},
    }
    return Outcome(record, "\n".join(lines))


def _record(options):
    from imaml.reproduction.commands import record

    made = record(options.run_directory, options.out, options.note, options.hardware)
    return Outcome(asdict(made) | {"file": str(made.file)}, str(made))


def _reproduce(options):
    from imaml.reproduction.commands import check, reproduce

    check(options.work, options.records, options.format)
    start_jax()
    reporter = _reporter(options, sys.stderr)  # stdout is kept for the table, which may be redirected to a file
    made = reproduce(options.work, options.records, options.out, options.format, reporter.event)
    picture = None if made.picture is None else str(made.picture)
    record = {"name": made.what, "result": made.result, "other_splits": made.other_splits, "picture": picture}
    return Outcome(record, str(made))


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
    words = "" if options.dataset == "omniglot" else f" --dataset {options.dataset}"
    words += "" if options.dir is None else f" --data {folder}"
    text = f"{options.dataset} is complete in {folder}; train on it: imaml train omniglot-5way-1shot-gd{words}"
    return Outcome({"dataset": options.dataset, "directory": str(folder)}, text)


def _completion(options):
    from imaml.arguments.completion import script

    text = script(options.shell)
    return Outcome({"shell": options.shell, "script": text}, text)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "diagnose": _diagnose,
    "predict": _predict,
    "export": _export,
    "verify": _verify,
    "report": _report,
    "compare": _compare,
    "sweep": _sweep,
    "presets": _presets,
    "record": _record,
    "reproduce": _reproduce,
    "data": _data,
    "completion": _completion,
}
"""The function of each command. It takes the parsed options and returns an :class:`Outcome`."""
