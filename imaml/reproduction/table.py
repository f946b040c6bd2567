"""Table 2 of the paper, its numbers beside what our records say; a cell that nobody has run says so."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from imaml.report.progress import duration
from imaml.reproduction.paper import ROWS, SOURCE, TABLE_2, Cell
from imaml.reproduction.records import Record

NOT_RUN = "not run"
HEADER = (
    "algorithm", "task", "paper, %", "ours, %", "normalised over", "fidelity", "meta-steps", "time", "split", "run",
)  # fmt: skip


class Row(NamedTuple):
    """One line of the table: a cell of the paper's, and one evaluation of one of our runs, if there is any."""

    cell: Cell
    record: Record | None
    evaluation: dict | None
    number: int | None


def rows(records: Sequence[Record]) -> Iterator[Row]:
    """Every cell in the paper's order, with a row for each evaluation of each record that belongs to it."""
    numbers = {id(record): number for number, record in enumerate(_ordered(records), start=1)}
    for cell in TABLE_2:
        found = [record for record in _ordered(records) if record.cell == cell]
        for record in found:
            for evaluation in record.evaluations:
                yield Row(cell, record, evaluation, numbers[id(record)])
        if not found:
            yield Row(cell, None, None, None)


def _ordered(records: Iterable[Record]) -> list[Record]:
    """Those that have a cell, in the cells' order; within one the paper's equations first, and the longest run."""
    order = list(TABLE_2)
    placed = [record for record in records if record.cell in TABLE_2]
    return sorted(placed, key=lambda r: (order.index(r.cell), r.fidelity != "paper", -r.meta_steps))  # type: ignore[arg-type]


def table_2(records: Sequence[Record], form: str = "terminal") -> str:
    """The table as text.

    Args:
        records: of our runs; those of other data are left out.
        form: ``"terminal"``, with aligned columns, or ``"markdown"``.
    """
    lines = [_words(row) for row in rows(records)]
    shown = _markdown(lines) if form == "markdown" else _aligned(lines)
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


def _aligned(lines):
    widths = [max(len(line[i]) for line in [HEADER, *lines]) for i in range(len(HEADER))]
    shown = [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in [HEADER, *lines]
    ]
    return "\n".join(line.rstrip() for line in [shown[0], "─" * len(shown[0].rstrip()), *shown[1:]])


def _markdown(lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEADER, ["---"] * len(HEADER), *lines])


def _notes(records):
    """Of each run that the table shows: how it is made again, on what it was made, and what else to know."""
    placed = _ordered(records)
    if not placed:
        return ["No run of these is on record: 'imaml record RUN --out DIR' makes one of a finished run's folder."]
    notes = []
    for number, record in enumerate(placed, start=1):
        notes.append(
            f"[{number}] {record.command}; {record.tasks_seen:,} tasks, {record.hardware}, seed {record.config['seed']}"
            + (f". {record.note}" if record.note else "")
        )
    run = sum(any(record.cell == cell for record in placed) for cell in TABLE_2)
    return [*notes, f"{run} of {len(TABLE_2)} cells have been run."]
