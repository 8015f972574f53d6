"""Rows of a table: CSV and its relatives, with the names of the columns in the first line.

Tables of prompts are published this way, too: AdvBench has the columns `goal` and `target`; HarmBench has `Behavior` and a
`ContextString` that some behaviours refer to; JailbreakBench has `Goal`. Sources: Zou et al., arXiv 2307.15043; Mazeika et
al., arXiv 2402.04249; Chao et al., arXiv 2404.01318.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from molehunt.errors import InvalidInput, printable
from molehunt.traffic.opened import OpenedText
from molehunt.traffic.rows import CHATS, COLUMN_ADVICE, FIELDS, KEPT, MAX_LINE, READ

SUFFIXES = (".csv", ".tsv")
DELIMITERS = (",", "\t", ";", "|")


def delimiter_of(first: str, name: str) -> str | None:
    """What separates the columns of a table that begins with this line; None where it is no table.

    A line is the head of a table where one of its cells names a column that is read, or where the file's name says so.
    """
    rated = [(sum(cell in (*FIELDS, *CHATS, "chosen") for cell in _cells(first, one)), one) for one in DELIMITERS]
    best, delimiter = max(rated, key=lambda one: one[0])
    if best:
        return delimiter
    suffixes = name.lower().split(".")[1:]
    return "\t" if "tsv" in suffixes else "," if "csv" in suffixes else None


def table_rows(text: OpenedText, delimiter: str) -> Iterator[dict[str, Any] | InvalidInput]:
    """Each row as an object without its empty cells, or why it cannot be read.

    Raises:
        InvalidInput: no column is read, or one of them stands there twice.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    rows = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    written: list[str] = []
    with suppress(StopIteration, csv.Error):
        written = [cell.strip() for cell in next(rows)]
    head = [cell.lower() for cell in written]
    read = [name for name in head if name in READ]
    if not read:
        raise no_column(text.name, written)
    double = next((name for name in read if head.count(name) > 1), None)
    if double is not None:
        raise InvalidInput(f"{text.name} has the column {double} twice: {printable(', '.join(written))}.")
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield InvalidInput(f"lines {first} to {rows.line_num} are no CSV: {printable(str(error))}")
            continue
        if row is None:
            return
        if not row:
            continue
        if len(row) != len(head):
            yield InvalidInput(f"it has {len(row)} of {len(head)} columns (line {rows.line_num}): cut off, or edited")
            continue
        yield {name: cell for name, cell in zip(head, row, strict=True) if cell.strip() and name in KEPT}


def no_column(name: str, columns: Sequence[str]) -> InvalidInput:
    """The error for a table without a column that is read; the columns are named as they are written."""
    return InvalidInput(
        f"{name} begins with the columns {printable(', '.join(columns)) or 'nothing'}, and none of them is read.\n"
        f"{COLUMN_ADVICE}"
    )


def _lines(text: OpenedText) -> Iterator[str]:
    """The lines of the table. A byte that is no UTF-8 becomes a half surrogate, and its row is refused by name."""
    begun = False
    while line := text.data.readline(MAX_LINE + 1):
        found = line.decode(errors="surrogateescape")
        yield found if begun else found.removeprefix("\ufeff")
        begun = True


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []
