"""The layout of results pages: wide tables are split without losing a cell, and long prose is broken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.page import CONTINUED, TABLE_WIDTH, WIDTH, grid, narrow, wrapped
from molehunt.errors import UsageError

cells = st.text("abc 0123456789.[],%", min_size=1, max_size=24).map(lambda text: text.strip() or "x")


def parsed(lines: list[str]) -> list[list[list[str]]]:
    """Each table as rows of cells, without the line under its head."""
    tables: list[list[list[str]]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [[rows[0], *rows[2:]] for rows in tables if rows]


@given(st.data(), st.integers(2, 14), st.integers(1, 6))
def test_no_cell_is_lost_and_no_line_is_long(data: st.DataObject, columns: int, rows: int) -> None:
    head = [f"column {i}" for i in range(columns)]
    body = [[data.draw(cells) for _ in head] for _ in range(rows)]
    whole = grid(head, body)
    split = narrow(whole)
    assert max(map(len, split)) <= TABLE_WIDTH
    tables = parsed(split)
    assert all(len(one) == rows + 1 for one in tables)
    shown: dict[str, list[str]] = {}
    for one in tables:
        names = [tuple(row) for row in one]
        assert len(set(names)) == len(names) or len({tuple(row) for row in body}) < rows
        for column in zip(*one, strict=True):
            shown[column[0]] = list(column[1:])
    for i, name in enumerate(head):
        assert shown[name] == [row[i] for row in body]


def test_a_narrow_table_stays_as_it_is_and_wide_ones_say_that_they_go_on() -> None:
    small = grid(["a", "b"], [["1", "2"]])
    assert narrow(small) == small
    wide = grid([f"head {i}" for i in range(6)], [[f"row {r}", *["y" * 40] * 5] for r in range(2)])
    assert narrow(wide).count(CONTINUED) == 1
    assert [row[0] for table in parsed(narrow(wide)) for row in table] == ["head 0", "row 0", "row 1"] * 2
    with pytest.raises(UsageError, match="shorten its cells"):
        narrow(grid(["a", "b"], [["x", "y" * TABLE_WIDTH]]))


def test_prose_is_broken_and_tables_are_not() -> None:
    lines = wrapped(["word " * 60, "| a | b |", "| --- | --- |", "| 1 | 2 |", "# " + "head " * 40])
    assert lines[-4:-1] == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert all(len(line) <= WIDTH for line in lines[:-4]) and " ".join(lines[:-4]).split() == ["word"] * 60
