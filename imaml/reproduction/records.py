"""Records of finished runs: one small JSON file holds a run's settings and results, without its parameters.

A record is made from a run's folder: from ``result.json`` and the log. ``imaml reproduce table2`` shows the records
that come with the package, or those of another folder.
"""

import json
import platform
import re
import shlex
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from imaml.errors import InputError
from imaml.reproduction.paper import Cell
from imaml.runs import parameters
from imaml.runs.folder import RESULT, differences
from imaml.runs.log import read_log, time_of
from imaml.runs.parameters import KEPT
from imaml.runs.summary import evaluations_in
from imaml.storage.files import write_whole

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Settings and results of one finished run.

    Attributes:
        preset: name of the preset that the run started from.
        config: all settings, as :meth:`imaml.Preset.config` returns them.
        algorithm: ``"imaml"``, ``"maml"``, ``"fomaml"`` or ``"reptile"``.
        fidelity: ``"paper"`` for the paper's equations, ``"reference-code"`` for those of the authors' public code.
        split: SHA-256 fingerprint of the training and held-out classes.
        evaluations: evaluations on held-out tasks; each has metric, value, interval, chance, tasks and normalisation.
        meta_steps: number of meta-steps.
        tasks_seen: number of training tasks drawn, without those of the run that ``start`` names.
        seconds: wall time of training, as :func:`.time_of` sums it over resumptions; evaluation is not included.
        stretches: number of processes that trained the run one after another, as :func:`.time_of` counts them.
        hardware: the machine, in words.
        versions: versions of Python, this package, jax, jaxlib and numpy, and the devices.
        command: the command that trains the same run again.
        note: remark for the reader.
        format: version of the record's file format.
        start: the name of the record in the package from whose parameters the run started; "" for drawn parameters.
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
    start: str = ""

    @property
    def cell(self) -> Cell | None:
        """Algorithm, ways and shots of the run as a cell; None for a run on another dataset than ``omniglot``.

        The cell need not be in table 2. A run on ``omniglot-alphabets`` has no cell, because table 2 is about another
        split.
        """
        return self.cell_on("omniglot")

    def cell_on(self, dataset: str) -> Cell | None:
        """Return algorithm, ways and shots of the run as a cell; None if the run is on another dataset.

        Args:
            dataset: the name of a dataset of images.
        """
        if self.config["dataset"] != dataset:
            return None
        episode, row = self.config["episode"], self.algorithm
        if row == "imaml":
            row = "imaml-hf" if "cg_steps" in self.config["inner"] else "imaml-gd"
        return Cell(row, episode["ways"], episode["shots"])

    def write(self, path: Path) -> None:
        """Write the record to ``path``, replacing an existing file; after an error the old file is unchanged."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_whole(path, lambda stream: stream.write(content.encode()))


def read(directory: Path = KEPT) -> list[Record]:
    """Return the records of all JSON files in a folder, sorted by the files' names.

    Raises:
        InputError: if the folder does not exist or one of the files is not a record.
    """
    if not directory.is_dir():
        raise InputError(f"there is no folder {directory} of records; 'imaml record RUN --out DIR' makes one")
    return [read_one(path) for path in sorted(directory.glob("*.json"))]


def read_one(path: Path) -> Record:
    """Return the record in a file.

    Raises:
        InputError: if the file is not a record, or if another version wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a record of a run: make one with 'imaml record RUN --out DIR'") from None
    if version != FORMAT:
        raise InputError(f"{path} was written by another version of imaml (format {version}, not {FORMAT})")
    names = {field.name for field in fields(Record)}
    optional = {field.name for field in fields(Record) if field.default is not MISSING}
    if differing := (names ^ set(content)) - (optional - set(content)):
        differing = ", ".join(sorted(differing))
        raise InputError(f"{path} is not a record of a run: missing or unknown fields {differing}")
    return Record(**content | {"evaluations": tuple(content["evaluations"])})


def of_run(directory: Path, note: str = "", hardware: str | None = None) -> Record:
    """Make the record of a finished run.

    Args:
        directory: the run's folder.
        note: remark for the reader.
        hardware: the machine that trained the run, in words; by default this machine and the run's devices.

    Raises:
        InputError: if the folder holds no finished run, if the run was trained on one's own data, was extended or
            started from other trained parameters than those of a record in the package on the same split, if its log
            lacks a step, so that the time is unknown, or if :func:`command_of` refuses its settings.
    """
    result = _result(directory)
    if "source" in result:
        raise InputError(
            f"{directory} holds a run on {result['config']['dataset']}, which is no dataset of this package: a record "
            "is made only of a run that others can train again"
        )
    if "extended" in result:
        raise InputError(f"{directory} holds a run that was extended, so no single command trains it again")
    start = _record_at_the_start(directory, result)
    config = result["config"]
    log = read_log(directory)
    steps = result.get("meta_steps", config["outer"]["steps"])  # fewer if the run stopped early
    if [entry.step for entry in log] != list(range(1, steps + 1)):
        raise InputError(
            f"the log in {directory} must have one line for each of {steps} meta-steps, but has {len(log)} intact lines"
        )
    seconds, stretches = time_of(log)
    return Record(
        preset=result["preset"],
        config=config,
        algorithm=config.get("algorithm", "imaml"),
        fidelity=config.get("fidelity", "paper"),
        split=result["data"],
        evaluations=evaluations_in(result),
        meta_steps=steps,
        tasks_seen=steps * config["outer"]["tasks"],
        seconds=round(seconds, 1),
        stretches=stretches,
        hardware=hardware or this_machine(result["versions"].get("devices", "")),
        versions=result["versions"],
        command=command_of(result["preset"], config, result.get("types")) + (f" --start {start}" if start else ""),
        note=note,
        start=start,
    )


def _record_at_the_start(directory, result):
    """Return the name of the record in the package from whose parameters a run started; "" for drawn parameters."""
    if "start" not in result:
        return ""
    for name in parameters.names():
        named = parameters.read(KEPT / f"{name}{parameters.SAFETENSORS}")[1]
        if parameters.digest(named) == result["start"]["sha256"]:
            break
    else:
        raise InputError(
            f"{directory} holds a run that started from trained parameters that do not come with the package, so no "
            "command trains it again elsewhere"
        )
    if (split := read_one(KEPT / f"{name}.json").split) != result["data"]:
        raise InputError(
            f"{directory} holds a run that started from {name}, which was trained on another split ({split[:8]}): test "
            "characters of the run may have been training characters there"
        )
    return name


def _result(directory):
    """Return the content of ``result.json``, written by this or an earlier version."""
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


def command_of(name: str, config: dict[str, Any], types: dict[str, str] | None = None) -> str:
    """Return the command that trains with these settings: a preset's name, and options for the settings that differ.

    Args:
        name: name of the preset.
        config: all settings, as :meth:`imaml.Preset.config` returned them in this or an earlier version.
        types: the types of the preset and of its components, as :meth:`imaml.Preset.types` returned them. None if they
            were not saved. They are then those of the published preset.

    Raises:
        InputError: if there is no such preset, if a type differs from that in the published preset, or if this version
            cannot express the settings.
    """
    from imaml.settings.overrides import settings
    from imaml.settings.published_presets import preset, restore

    begun = preset(name).using(config.get("algorithm", "imaml"))
    if types is not None and (found := differences(begun.types(), types)):
        raise InputError(
            f"a run can be recorded only if its settings have the types of the preset {name}, but the run has other "
            f"types ({'; '.join(found)})"
        )
    wanted = settings(restore(name, config))
    words = [] if begun.algorithm == "imaml" else [f"--algorithm {begun.algorithm}"]
    words += [] if config["dataset"] == begun.dataset else [f"--dataset {shlex.quote(config['dataset'])}"]
    here = settings(begun)
    words += [f"--{path} {shlex.quote(str(value))}" for path, value in wanted.items() if here[path] != value]
    return " ".join(["imaml train", name, *words])


def this_machine(devices: str = "") -> str:
    """Return this machine in words: its processor, and ``devices``, such as ``"2 cpu"``, if given."""
    processor = platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found[1] if found else processor
    except OSError:  # Only Linux has /proc/cpuinfo.
        pass
    return f"{processor}, {devices.replace(' cpu', ' CPU')} devices" if devices else processor
