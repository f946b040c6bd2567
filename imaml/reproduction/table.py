"""Table 2 of the paper, with our results next to the paper's. A cell without a record prints ``not run``.

Runs on ``omniglot-alphabets`` are in a second table, without numbers of the paper. Their test characters belong to
alphabets that training has not seen, so their accuracy must not fill a cell of table 2.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from imaml.datasets import omniglot_alphabets
from imaml.reproduction.paper import ROWS, SOURCE, TABLE_2, Cell
from imaml.reproduction.records import Record
from imaml.runs.progress import duration
from imaml.tables import table

NOT_RUN = "not run"
HEADER = (
    "algorithm", "task", "paper, %", "ours, %", "normalised over", "fidelity", "meta-steps", "time", "split", "run",
)  # fmt: skip
HEADER_BY_ALPHABETS = tuple(name for name in HEADER if name != "paper, %")
TITLE_BY_ALPHABETS = (
    f"Omniglot split by whole alphabets (dataset {omniglot_alphabets.NAME}), test accuracy with 95 % intervals. The "
    "964 training characters belong to 30 alphabets, and the 659 test characters to 20 others. Table 2 of the paper is "
    "about a split of single characters, so it has no number to compare with."
)


class Row(NamedTuple):
    """One line of the printed table.

    Attributes:
        cell: the cell of table 2, or algorithm, ways and shots of a run on another split.
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
    numbers = _numbers(records)
    for cell in TABLE_2:
        found = [record for record in _ordered(records) if record.cell == cell]
        for record in found:
            for evaluation in record.evaluations:
                yield Row(cell, record, evaluation, numbers[id(record)])
        if not found:
            yield Row(cell, None, None, None)


def rows_by_alphabets(records: Sequence[Record]) -> Iterator[Row]:
    """Yield one row for each evaluation of the records of runs on ``omniglot-alphabets``."""
    numbers = _numbers(records)
    for record in _ordered_by_alphabets(records):
        cell = record.cell_on(omniglot_alphabets.NAME)
        assert cell is not None  # a record without a cell is not in this order
        for evaluation in record.evaluations:
            yield Row(cell, record, evaluation, numbers[id(record)])


def _numbers(records):
    """Return the number of each record's note by the record's ``id``. Both tables share the numbers."""
    shown = [*_ordered(records), *_ordered_by_alphabets(records)]
    return {id(record): number for number, record in enumerate(shown, start=1)}


def _ordered_by_alphabets(records):
    """Return the records of runs on ``omniglot-alphabets``, sorted like those of table 2."""
    placed = [(record.cell_on(omniglot_alphabets.NAME), record) for record in records]
    rows, found = list(ROWS), [(cell, record) for cell, record in placed if cell is not None]

    def key(pair):
        (algorithm, *task), record = pair
        return rows.index(algorithm), task, record.fidelity != "paper", -record.meta_steps

    return [record for _, record in sorted(found, key=key)]


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

    If there are runs on ``omniglot-alphabets``, a second table with a heading of its own follows.

    Args:
        records: records of our runs; those that belong to neither table are ignored.
        form: ``"terminal"``, with aligned columns, or ``"markdown"``.
    """
    lines = [_words(row) for row in rows(records)]
    shown = table(HEADER, lines, form)
    title = f"Omniglot, test accuracy with 95 % intervals; paper: {SOURCE}"
    text = [title, "", shown, "", *_notes(records)]
    if apart := list(rows_by_alphabets(records)):
        second = table(HEADER_BY_ALPHABETS, [(*_task(row), *_ours(row)) for row in apart], form)
        text += ["", TITLE_BY_ALPHABETS, "", second, "", *_notes_by_alphabets(records)]
    return "\n".join(text)


def _words(row):
    left = (*_task(row), TABLE_2[row.cell].text)
    if row.record is None:
        return (*left, NOT_RUN, *[""] * (len(HEADER) - len(left) - 1))
    return (*left, *_ours(row))


def _task(row):
    return ROWS[row.cell.algorithm], f"{row.cell.ways}-way {row.cell.shots}-shot"


def _ours(row):
    _, record, evaluation, number = row
    return (
        f"{100 * evaluation['value']:.2f} ± {100 * evaluation['interval']:.2f}",
        evaluation["normalisation"],
        record.fidelity,
        f"{record.meta_steps:,}",
        duration(record.seconds),
        record.split[:8],
        f"[{number}]",
    )


def _notes(records):
    """Return one note for each run in table 2, and the number of cells that have a record."""
    placed = _ordered(records)
    if not placed:
        return [
            "There is no record for this table: 'imaml record RUN --out DIR' makes one from a finished run's folder."
        ]
    run = sum(any(record.cell == cell for record in placed) for cell in TABLE_2)
    return [*_described(records, placed), f"{run} of {len(TABLE_2)} cells have a record."]


def _notes_by_alphabets(records):
    return _described(records, _ordered_by_alphabets(records))


def _described(records, placed):
    """Return one note for each of the records ``placed``: command, number of tasks, hardware, seed and remark."""
    numbers = _numbers(records)
    return [
        f"[{numbers[id(record)]}] {record.command}; {record.tasks_seen:,} tasks{' more' if record.start else ''}, "
        f"{record.hardware}, "
        f"seed {record.config['seed']}" + (f". {record.note}" if record.note else "")
        for record in placed
    ]
