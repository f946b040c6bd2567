"""What a run came to, in one small file that can be kept when the run's folder is gone.

A record is made from a finished run's folder alone: its result, its log and its checkpoints' description. Those kept in
this package are what ``imaml reproduce table2`` shows; another folder of records can be named.
"""

import json
import platform
import re
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from imaml.errors import InputError
from imaml.reproduction.paper import Cell
from imaml.runs.folder import RESULT
from imaml.runs.log import Progress, read_log
from imaml.storage.files import write_whole

KEPT = Path(__file__).parent / "records"
"""The records that come with the package."""
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One run, without its parameters.

    Attributes:
        preset: the name of the preset that it began from.
        config: every setting, as :meth:`imaml.Preset.config` gives them.
        algorithm: ``"imaml"``, ``"maml"``, ``"fomaml"`` or ``"reptile"``.
        fidelity: ``"paper"`` for the paper's equations, ``"reference-code"`` for those of the authors' public code.
        split: the fingerprint of training and held-out classes, SHA-256.
        evaluations: of held-out tasks: metric, value, interval, tasks, normalisation and chance, each.
        meta_steps: that were done.
        tasks_seen: training tasks, counted again each time one is drawn.
        seconds: wall time of training, summed over the stretches between resumptions; evaluation is not in it.
        stretches: how many processes trained one after another.
        hardware: in words.
        versions: of the package, Python and what it computes with.
        command: that trains the same again.
        note: what a reader should know besides.
        format: of this record.
    """

    preset: str
    config: dict[str, Any]
    algorithm: str
    fidelity: str
    split: str
    evaluations: tuple[dict[str, Any], ...]
    meta_steps: int
    tasks_seen: int
    seconds: float
    stretches: int
    hardware: str
    versions: dict[str, str]
    command: str
    note: str = ""
    format: int = FORMAT

    @property
    def cell(self) -> Cell | None:
        """Where in table 2 it belongs; None for a run on other data or of other tasks."""
        if self.config["dataset"] != "omniglot":
            return None
        episode, row = self.config["episode"], self.algorithm
        if row == "imaml":
            row = "imaml-hf" if "cg_steps" in self.config["inner"] else "imaml-gd"
        return Cell(row, episode["ways"], episode["shots"])

    def write(self, path: Path) -> None:
        """Make or replace the file at ``path``, whole or not at all."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_whole(path, lambda stream: stream.write(content.encode()))


def read(directory: Path = KEPT) -> list[Record]:
    """All records in a folder, by name.

    Raises:
        InputError: for a folder that does not exist, and a file that is no record.
    """
    if not directory.is_dir():
        raise InputError(f"there is no folder {directory} of records; 'imaml record RUN --out DIR' makes one")
    return [_read(path) for path in sorted(directory.glob("*.json"))]


def _read(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no record of a run: make one with 'imaml record RUN --out DIR'") from None
    if version != FORMAT:
        raise InputError(f"{path} was written by another version of imaml (format {version}, not {FORMAT})")
    names = {field.name for field in fields(Record)}
    if set(content) != names:
        raise InputError(f"{path} is no record of a run: {', '.join(sorted(names ^ set(content)))} missing or unknown")
    return Record(**content | {"evaluations": tuple(content["evaluations"])})


def of_run(directory: Path, note: str = "", hardware: str | None = None) -> Record:
    """The record of a finished run.

    Args:
        directory: the run's folder.
        note: what a reader should know besides.
        hardware: in words; by default this machine's processor, which then should be the one that trained.

    Raises:
        InputError: for a folder without a finished run, or a log with steps missing, whose time cannot be told.
    """
    result = _result(directory)
    config = result["config"]
    log = read_log(directory)
    steps = config["outer"]["steps"]
    if [entry.step for entry in log] != list(range(1, steps + 1)):
        raise InputError(f"{directory} has a log of {len(log)} whole lines, not one for each of its {steps} meta-steps")
    seconds, stretches = time_of(log)
    return Record(
        preset=result["preset"],
        config=config,
        algorithm=config.get("algorithm", "imaml"),
        fidelity=config.get("fidelity", "paper"),
        split=result["data"],
        evaluations=_evaluations(result),
        meta_steps=steps,
        tasks_seen=steps * config["outer"]["tasks"],
        seconds=round(seconds, 1),
        stretches=stretches,
        hardware=hardware or this_machine(result["versions"].get("devices", "")),
        versions=result["versions"],
        command=command_of(result["preset"], config),
        note=note,
    )


def _result(directory):
    path = directory / RESULT
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no finished run in {directory}: it holds no {RESULT}") from None
    except ValueError:
        raise InputError(f"{path} is damaged: it is not JSON") from None
    if not {"preset", "config", "data", "versions"} <= set(result) or not {"evaluation", "evaluations"} & set(result):
        raise InputError(f"{path} was written by another version of imaml")
    return result


def _evaluations(result):
    if "evaluations" in result:
        return tuple(result["evaluations"])
    former = dict(result["evaluation"])  # of a version that evaluated with the query batch alone
    accuracy, normalisation = former.pop("accuracy"), former.pop("normalisation").split(",")[0]
    return ({"metric": "accuracy", "value": accuracy} | former | {"normalisation": normalisation},)


def time_of(log: list[Progress]) -> tuple[float, int]:
    """Seconds of training in a log, and the number of processes that wrote it.

    Each process counts from its own start, so a fall in the count is where another one went on, and the last count of
    each is what it took. What a process did beyond the checkpoint that was gone on from is not in the log, nor here.
    """
    total, stretches = 0.0, 0
    for entry, following in zip(log, [*log[1:], None], strict=True):
        if following is None or following.seconds < entry.seconds:
            total, stretches = total + entry.seconds, stretches + 1
    return total, stretches


def command_of(name: str, config: dict[str, Any]) -> str:
    """The command that trains with these settings: a preset's name, and every setting that differs from it."""
    from imaml.settings.overrides import settings
    from imaml.settings.published_presets import preset, restore

    wanted = settings(restore(name, config))
    begun = preset(name).using(config.get("algorithm", "imaml"))
    words = [] if begun.algorithm == "imaml" else [f"--algorithm {begun.algorithm}"]
    here = settings(begun)
    words += [f"--{path} {shlex.quote(str(value))}" for path, value in wanted.items() if here[path] != value]
    return " ".join(["imaml train", name, *words])


def this_machine(devices: str = "") -> str:
    """This machine in words: its processor, and the devices that a run says it had."""
    processor = platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found[1] if found else processor
    except OSError:  # not Linux
        pass
    return f"{processor}, {devices.replace(' cpu', ' CPU')} devices" if devices else processor
