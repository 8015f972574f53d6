"""Which rows a file of traffic holds: found in the file itself, since names and endings are often wrong."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from molehunt.errors import InvalidInput, printable
from molehunt.run.progress import Track, counting
from molehunt.traffic.delimited import SUFFIXES, delimiter_of, table_rows
from molehunt.traffic.json_rows import STEP, WHOLE_OBJECT, JsonValues, array_items, json_lines
from molehunt.traffic.messages import is_message
from molehunt.traffic.opened import OpenedText
from molehunt.traffic.place import START, Place, no_row
from molehunt.traffic.rows import CHATS, FIELDS, MAX_LINE, conversation_of

PROMPTS = {
    "train",
    "test",
    "validation",
    "data",
    "rows",
    "items",
    "examples",
    "instances",
    "prompts",
    "texts",
    "inputs",
    "questions",
    "queries",
}
"""Fields of an object whose list of strings are prompts; others hold stop words, tags, or names of columns."""
ASKED = {*FIELDS, *CHATS}


@dataclass(frozen=True, slots=True)
class RowsOfFile:
    """The rows of a file in order, with what a row is called in messages."""

    unit: str
    """`line`, `item` of an array, or `row` of a table."""
    found: Iterator[tuple[Place, Any]]
    """The end of each row, and its value; bytes are a line that is not parsed yet, an error says why it is unreadable."""


def rows_of(text: OpenedText, start_at: Place, track: Track) -> RowsOfFile:
    """The rows of a text from a place on.

    A file holds JSON lines; one array, in one line or in many; JSON objects that span lines; one object that wraps the
    list of all rows, such as `{"data": […]}`; or a table with the names of its columns in the first line.

    Raises:
        InvalidInput: a list of rows cannot be distinguished from another one beside it, or a table has no column that is read.
    """
    first = _text(text.ahead(1, MAX_LINE))
    begins = first[:1]
    if (
        any(text.name.lower().endswith(one) or f"{one}." in text.name.lower() for one in SUFFIXES)
        and begins not in "[{"
    ):
        return _table(text, first, start_at, track)
    try:
        value = json.loads(first)
    except json.JSONDecodeError as error:
        return _spanning(text, first, error.pos >= len(first), start_at, track)
    except (ValueError, RecursionError):
        value = None
    # a stream is asked for a second line only where the first may be all of it
    if isinstance(value, list) and not all(map(is_message, cast("list[Any]", value))) and not _lines_follow(text):
        return RowsOfFile("item", _counted(array_items(text), text, start_at, track))
    if isinstance(value, Mapping) and not _is_row(value) and not _lines_follow(text):
        inner = _wrapped(cast("Mapping[str, Any]", value), text.name)
        if inner is not None:
            return RowsOfFile("item", _counted(inner, text, start_at, track))
    return RowsOfFile("line", json_lines(text, start_at, track))


def _spanning(text: OpenedText, first: str, goes_on: bool, start_at: Place, track: Track) -> RowsOfFile:
    """RowsOfFile where the first line alone is no JSON; `goes_on` where it may be the beginning of some."""
    if first.startswith("[") and (goes_on or len(first) >= MAX_LINE - 1 or not _lines_follow(text)):
        return RowsOfFile("item", _counted(array_items(text), text, start_at, track))
    if first.startswith("{") and goes_on:
        whole = _first_value(text)
        if whole is not None:
            inner = _wrapped(cast("Mapping[str, Any]", whole), text.name) if isinstance(whole, Mapping) else None
            return RowsOfFile("item", _counted(_values(text) if inner is None else inner, text, start_at, track))
    if not first.startswith(("[", "{")) and delimiter_of(first, text.name) is not None:
        return _table(text, first, start_at, track)
    return RowsOfFile("line", json_lines(text, start_at, track))


def _table(text: OpenedText, first: str, start_at: Place, track: Track) -> RowsOfFile:
    return RowsOfFile("row", _counted(table_rows(text, delimiter_of(first, text.name) or ","), text, start_at, track))


def _lines_follow(text: OpenedText) -> bool:
    """Whether there is a line that is not blank behind the first such one."""
    return len([line for line in text.ahead(2, 2 * MAX_LINE).splitlines() if line.strip()]) > 1


def _first_value(text: OpenedText) -> Any:
    """The value that the text begins with; None where that is no JSON. The text stays at its start."""
    head = text.ahead(WHOLE_OBJECT, WHOLE_OBJECT)
    with suppress(InvalidInput):
        return JsonValues(head).value("the first value", WHOLE_OBJECT)
    return None


def _values(text: OpenedText) -> Iterator[Any]:
    """Values one after the other, such as what `jq` prints."""
    values, number = JsonValues(text.data), 0
    while values.peek():
        number += 1
        yield values.value(f"{text.name}: value {number}")


def _wrapped(value: Mapping[str, Any], name: str) -> list[Any] | None:
    """The rows inside an object that is itself no row; None where there is no such list.

    Raises:
        InvalidInput: several lists hold rows.
    """
    if _is_row(value):
        return None
    lists = {key: cast("list[Any]", inner) for key, inner in value.items() if isinstance(inner, list) and inner}
    table = _columns(lists, len(value))
    if table is not None:
        return table
    found = {
        key: inner
        for key, inner in lists.items()
        if (not isinstance(inner[0], str) or key in PROMPTS) and _is_row(inner[0])
    }
    if len(found) > 1:
        keys = printable(", ".join(found))
        raise InvalidInput(
            f"{name} holds several lists of rows ({keys}): write the one that is meant to a file of its own."
        )
    return next(iter(found.values()), None)


def _columns(lists: Mapping[str, list[Any]], fields: int) -> list[Any] | None:
    """The rows of a table that is written column by column, as `{"prompt": […], "answer": […]}`, or as pandas splits it into
    `columns` and `data`; None where this is no such table.
    """
    names, data = lists.get("columns"), lists.get("data")
    if names and data and all(isinstance(row, list) and len(cast("list[Any]", row)) == len(names) for row in data):
        return [dict(zip(map(str, names), row, strict=True)) for row in data]
    if len(lists) < fields or len({len(inner) for inner in lists.values()}) != 1 or not ASKED & lists.keys():
        return None
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _is_row(value: Any) -> bool:
    with suppress(InvalidInput):
        conversation_of(value)
        return True
    return False


def _counted(rows: Iterable[Any], text: OpenedText, start_at: Place, track: Track) -> Iterator[tuple[Place, Any]]:
    """RowsOfFile that are no lines, from the one after `start_at` on."""
    size, number = -(-(text.size or 0) // STEP), 0
    with counting(track, f"reading {text.name}", size, unit="kB") as done:
        for row in rows:
            number += 1
            if number > start_at.line:
                yield Place(number, number), row
            done(text.stored.tell() / STEP - done.done if text.size is not None else 0)
        done(size - done.done)
    if start_at != START and number < start_at.line:
        raise no_row(text.name, start_at)


def _text(line: bytes) -> str:
    return line.decode(errors="surrogateescape").removeprefix("\ufeff").strip()
