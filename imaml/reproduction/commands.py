"""The commands ``imaml reproduce`` and ``imaml record``: they return what to print, and write files to a folder."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from imaml.datasets import omniglot_alphabets
from imaml.errors import InputError, check_choice
from imaml.reproduction import gradient_error, memory, pictures, records, trained
from imaml.reproduction.paper import ROWS, TABLE_2
from imaml.reproduction.table import rows, rows_by_alphabets, table_2
from imaml.runs import parameters
from imaml.runs.evaluation import trained as run_of
from imaml.runs.meta_step import initial_state
from imaml.runs.versions import versions
from imaml.settings.published_presets import restore
from imaml.storage.files import write_whole

FORMS = ("terminal", "markdown")


@dataclass(frozen=True)
class Reproduced:
    """A reproduced table or figure. ``str`` gives its text, with the place of the picture.

    Attributes:
        what: ``"table2"``, ``"figure2a"`` or ``"figure2b"``.
        text: the table, or the numbers of the figure as a table.
        result: the numbers, in JSON types. For the table, one entry for each row.
        picture: the file of the picture, or None if it was not drawn.
        other_splits: for the table, the rows of runs on ``omniglot-alphabets``. They are neither in ``result`` nor in
            the picture.
    """

    what: str
    text: str
    result: Any
    picture: Path | None
    other_splits: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.text if self.picture is None else f"{self.text}\n\npicture: {self.picture}"


@dataclass(frozen=True)
class Recorded:
    """The file to which a run's record was written, and facts about the run. ``str`` gives both in a sentence.

    Attributes:
        file: the file of the record.
        row: the name of the row of table 2 that the run belongs to, or None.
        meta_steps: meta-steps of the run.
        seconds: wall time of training, without the evaluation.
        dataset: the name of the dataset of the run.
    """

    file: Path
    row: str | None
    meta_steps: int
    seconds: float
    dataset: str

    def __str__(self) -> str:
        place = "no cell" if self.row is None else f"row {self.row!r}"
        place = f"{place} of table 2"
        if self.dataset == omniglot_alphabets.NAME:
            place = f"the table of {self.dataset} that 'imaml reproduce table2' prints below table 2"
        return f"wrote {self.file}: {self.meta_steps} meta-steps in {self.seconds:.0f} s, for {place}"


class Work(NamedTuple):
    """A table or figure before anything is written.

    Attributes:
        text: as in :class:`Reproduced`.
        draw: a function that draws the picture to a path, and returns the path.
        result: as in :class:`Reproduced`.
        other_splits: as in :class:`Reproduced`.
    """

    text: str
    draw: Callable[[Path], Path]
    result: Any
    other_splits: tuple[dict[str, Any], ...] = ()


def reproduce(
    what: str,
    directory: Path | None = None,
    out: Path | None = None,
    form: str = "terminal",
    on_event: Callable[[str], None] = lambda message: None,
) -> Reproduced:
    """Return a table or figure of the paper; with ``out``, also write its picture, and a figure's data as JSON.

    Args:
        what: ``"table2"``, ``"figure2a"`` or ``"figure2b"``.
        directory: folder of the records for ``"table2"``; by default the records that come with the package.
        out: folder to write to, created if it does not exist; None writes nothing.
        form: ``"terminal"`` or ``"markdown"``.
        on_event: called with a message before each long computation.

    Raises:
        InputError: for arguments that :func:`check` refuses, for a record that cannot be read, or if XLA does not
            report a program's memory.
        OSError: if ``out`` cannot be written.
    """
    check(what, directory, form)
    work = WORKS[what](directory, form, on_event)
    if out is None:
        return Reproduced(what, work.text, work.result, None, work.other_splits)
    out.mkdir(parents=True, exist_ok=True)
    picture = work.draw(out / f"{what}.png")
    if what != "table2":  # the numbers of the table are in the records
        record = {"command": f"imaml reproduce {what}", "versions": versions(), "result": work.result}
        _write(out / f"{what}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return Reproduced(what, work.text, work.result, picture, work.other_splits)


def check(what: str, directory: Path | None, form: str) -> None:
    """Check the arguments of :func:`reproduce` before anything is computed or written.

    Raises:
        InputError: for an unknown table, figure or format, or if ``directory`` is given for a figure, which reads no
            records.
    """
    for given, known, kind in ((what, WORKS, "table or figure"), (form, FORMS, "format")):
        check_choice(kind, given, tuple(known))
    if directory is not None and what != "table2":
        raise InputError(f"{what} is computed by this command and reads no records: omit --records")


def record(run: Path, out: Path | None = None, note: str = "", hardware: str | None = None) -> Recorded:
    """Write the record of a finished run and its parameters.

    The files are ``NAME.json`` and ``NAME.safetensors``, named after the run's folder.

    Args:
        run: the run's folder.
        out: folder that the record is written to, created if it does not exist; by default ``records`` in the working
            folder.
        note: remark for the reader of the record.
        hardware: the machine that trained the run, in words; by default this machine.

    Raises:
        InputError: for a run that :func:`.records.of_run` refuses, or if the folder holds no intact checkpoint.
        OSError: if the record cannot be written.
    """
    made = records.of_run(run, note, hardware)
    out = out or Path("records")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{run.resolve().name}.json"
    made.write(path)
    preset = restore(made.preset, made.config)
    theta = run_of(run).restore(initial_state(preset)).theta
    trained.save(path.with_suffix(parameters.SAFETENSORS), theta, preset, made)
    row = ROWS[made.cell.algorithm] if made.cell in TABLE_2 and made.cell else None
    return Recorded(path, row, made.meta_steps, made.seconds, made.config["dataset"])


def _table(directory, form, on_event) -> Work:
    found = records.read() if directory is None else records.read(directory)
    result = [row.cell._asdict() | {"paper": TABLE_2[row.cell]._asdict()} | _ours(row) for row in rows(found)]
    other = [{"dataset": omniglot_alphabets.NAME} | row.cell._asdict() | _ours(row) for row in rows_by_alphabets(found)]
    return Work(table_2(found, form), lambda path: pictures.table(path, _lines(found)), result, tuple(other))


def _ours(row):
    return {
        "ours": row.evaluation,
        "fidelity": row.record and row.record.fidelity,
        "meta_steps": row.record and row.record.meta_steps,
        "seconds": row.record and row.record.seconds,
    }


def _lines(found):
    """Return the lines for :func:`pictures.table`: each cell's name, the paper's numbers and ours, in per cent."""
    ours = {cell: [] for cell in TABLE_2}
    for row in rows(found):
        if row.evaluation:
            value, interval = (100 * row.evaluation[name] for name in ("value", "interval"))
            ours[row.cell].append((value, interval, row.evaluation["normalisation"] == "support set"))
    names = {cell: f"{ROWS[cell.algorithm]}, {cell.ways}-way {cell.shots}-shot" for cell in TABLE_2}
    unrun = {cell: "" if ours[cell] else " (not run)" for cell in TABLE_2}
    return [
        (names[cell] + unrun[cell], printed.accuracy, printed.interval, ours[cell]) for cell, printed in TABLE_2.items()
    ]


def _figure_2a(directory, form, on_event):
    on_event("computing both meta-gradients of a linear regression")
    found = gradient_error.gradient_errors()
    text = _fenced(gradient_error.shown(found), form)
    return Work(text, lambda path: pictures.gradient_error(path, found.steps, dict(found.curves)), asdict(found))


def _figure_2b(directory, form, on_event):
    found = memory.memory(on_event=on_event)
    text = _fenced(memory.shown(found), form)
    return Work(text, lambda path: pictures.memory(path, found.steps, found.temporary), asdict(found))


def _fenced(text, form):
    return f"```\n{text}\n```" if form == "markdown" else text


def _write(path, text):
    write_whole(path, lambda stream: stream.write(text.encode()))


WORKS: dict[str, Callable[..., Work]] = {
    "table2": _table,
    "figure2a": _figure_2a,
    "figure2b": _figure_2b,
}
"""Functions by the name of a table or figure. Each takes the folder of the records, the format and ``on_event``."""
