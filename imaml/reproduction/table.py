"""Table 2 of the paper, with our results next to the paper's. A cell without a record prints ``not run``."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from imaml.reproduction.paper import ROWS, SOURCE, TABLE_2, Cell
from imaml.reproduction.records import Record
from imaml.runs.progress import duration
from imaml.tables import table

NOT_RUN = "not run"
HEADER = (
    "algorithm", "task", "paper, %", "ours, %", "normalised over", "fidelity", "meta-steps", "time", "split", "run",
)  # fmt: skip


class Row(NamedTuple):
    """One line of the printed table.

    Attributes:
        cell: the cell of table 2.
        record: our run, or None if there is none for this cell.
        evaluation: one evaluation of that run, or None if there is no run.
        number: number of the note below the table that describes the run, or None if there is no run.
    """

    cell: Cell
    record: Record | None
    evaluation: dict | None
    number: int | None


def rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yield the rows of the table, cell by cell in the paper's order.

    A cell has one row for each evaluation of its records. A cell without a record has one row.
    """
    numbers = {id(record): number for number, record in enumerate(_ordered(records), start=1)}
    for cell in TABLE_2:
        found = [record for record in _ordered(records) if record.cell == cell]
        for record in found:
            for evaluation in record.evaluations:
                yield Row(cell, record, evaluation, numbers[id(record)])
        if not found:
            yield Row(cell, None, None, None)


def _ordered(records: Iterable[Record]) -> list[Record]:
    """Return the records that have a cell in table 2, in the cells' order.

    Within a cell, records with the paper's equations come before those of the reference code. Among records of the same
    fidelity, longer runs come first.
    """
    order = list(TABLE_2)
    placed = [record for record in records if record.cell in TABLE_2]
    return sorted(placed, key=lambda r: (order.index(r.cell), r.fidelity != "paper", -r.meta_steps))  # type: ignore[arg-type]


def table_2(records: Sequence[Record], form: str = "terminal") -> str:
    """Format the table as text, with a note on each run below.

    Args:
        records: records of our runs; those without a cell in table 2 are ignored.
        form: ``"terminal"``, with aligned columns, or ``"markdown"``.
    """
    lines = [_words(row) for row in rows(records)]
    shown = table(HEADER, lines, form)
    return "\n".join([f"Omniglot, test accuracy with 95 % intervals; paper: {SOURCE}", "", shown, "", *_notes(records)])


def _words(row):
    cell, record, evaluation, number = row
    printed = TABLE_2[cell]
    left = (ROWS[cell.algorithm], f"{cell.ways}-way {cell.shots}-shot", printed.text)
    if record is None:
        return (*left, NOT_RUN, *[""] * (len(HEADER) - len(left) - 1))
    return (
        *left,
        f"{100 * evaluation['value']:.2f} ± {100 * evaluation['interval']:.2f}",
        evaluation["normalisation"],
        record.fidelity,
        f"{record.meta_steps:,}",
        duration(record.seconds),
        record.split[:8],
        f"[{number}]",
    )


def _notes(records):
    """Return one note for each run in the table: command, number of tasks, hardware, seed and remark."""
    placed = _ordered(records)
    if not placed:
        return [
            "There is no record for this table: 'imaml record RUN --out DIR' makes one from a finished run's folder."
        ]
    notes = []
    for number, record in enumerate(placed, start=1):
        notes.append(
            f"[{number}] {record.command}; {record.tasks_seen:,} tasks, {record.hardware}, seed {record.config['seed']}"
            + (f". {record.note}" if record.note else "")
        )
    run = sum(any(record.cell == cell for record in placed) for cell in TABLE_2)
    return [*notes, f"{run} of {len(TABLE_2)} cells have a record."]
