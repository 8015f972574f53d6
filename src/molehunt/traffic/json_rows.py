"""Rows of a JSON file: one a line, or the items of an array, or values one after the other that span lines."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Any

from molehunt.errors import InvalidInput, printable
from molehunt.run.progress import Track, counting, silent
from molehunt.traffic.opened import OpenedText, Readable
from molehunt.traffic.place import START, Place, no_row
from molehunt.traffic.rows import MAX_LINE

STEP = 1_000
"""Number of bytes of the file per step of the progress: one kB."""
PIECE = 1_000_000
"""Number of bytes that are read at a time."""
WHOLE_OBJECT = 64_000_000
"""Greatest number of characters of an object that wraps the list of all rows: it is read at once."""


def json_lines(text: OpenedText, start_at: Place, track: Track) -> Iterator[tuple[Place, bytes]]:
    """Each line that is not blank, with its end. A line that is too long is cut after `MAX_LINE` + 1 bytes."""
    data, size = text.data, -(-(text.size or 0) // STEP)
    offset, line = _sought(text, start_at), start_at.line
    at: Callable[[], float] = (lambda: text.stored.tell()) if text.size is not None else (lambda: 0)
    shown = track if text.size is not None else silent
    with counting(shown, f"reading {text.name}", size, unit="kB", start=int(at()) // STEP if offset else 0) as done:
        while head := data.readline(MAX_LINE + 1):
            offset, line, part = offset + len(head), line + 1, head
            while not part.endswith(b"\n") and (part := data.readline(PIECE)):
                offset += len(part)  # the rest of a line that is too long is skipped, a piece at a time
            done(at() / STEP - done.done if text.size is not None else 0)
            if is_giant(head) or head.strip():
                yield Place(offset, line), head
        done(size - done.done)


def is_giant(line: bytes) -> bool:
    """Whether this is the beginning of a line that is too long."""
    return len(line) > MAX_LINE and not line.endswith(b"\n")


def parsed_line(line: bytes) -> Any:
    """The value of one line. Raises InvalidInput where it is too long or no JSON."""
    if is_giant(line):
        raise InvalidInput(f"longer than {MAX_LINE // 10**6} MB")
    text = line.decode(errors="surrogateescape").removeprefix("\ufeff").strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput(f"not JSON: {printable(text[:61], 60)!r}") from None


def array_items(text: OpenedText) -> Iterator[Any]:
    """The items of an array, one in memory at a time.

    Raises:
        InvalidInput: an item is no JSON or too long, the array is cut off, or something follows it.
    """
    values, number = JsonValues(text.data), 0
    if values.next_is("["):
        more = not values.next_is("]")
        while more:
            number += 1
            yield values.value(f"{text.name} item {number}")
            more = values.next_is(",")
            if not more and not values.next_is("]"):
                raise InvalidInput(f"{text.name} is cut off or broken behind item {number} of its array.")
    if values.peek():
        raise InvalidInput(f"{text.name} goes on behind its array of {number} items; expected one array.")


class JsonValues:
    """Takes one JSON value after the other from a text, and reads no more of it than that needs."""

    def __init__(self, source: Readable | bytes) -> None:
        self._source, self._decode = (
            io.BytesIO(source) if isinstance(source, bytes) else source,
            JSONDecoder().raw_decode,
        )
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._buffer, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            rest = self._buffer[self._at :].lstrip(" \t\r\n\ufeff")
            self._at = len(self._buffer) - len(rest)
            if rest or self._ended:
                return rest[:1]
            self._more()

    def next_is(self, character: str) -> bool:
        """Whether the next character is this one, which is then taken."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self, what: str, limit: int = MAX_LINE) -> Any:
        """Take the next value. Raises InvalidInput where it is no JSON, longer than `limit`, or cut off."""
        self.peek()
        while True:
            try:
                found, end = self._decode(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:  # the digits of a number may go on
                    self._at = end
                    return found
            except JSONDecodeError:
                if self._ended or len(self._buffer) - self._at > limit:
                    shown = printable(self._buffer[self._at : self._at + 61], 60)
                    raise InvalidInput(f"{what} is not JSON, or cut off: {shown!r}") from None
            except (ValueError, RecursionError):  # a number of too many digits, or lists in lists in lists
                raise InvalidInput(f"{what} is no JSON that can be read") from None
            if len(self._buffer) - self._at > limit:
                raise InvalidInput(f"{what} is longer than {limit // 10**6} MB")
            self._more()

    def _more(self) -> None:
        part = self._source.read1(max(PIECE, len(self._buffer) - self._at))
        self._buffer = self._buffer[self._at :] + self._utf8.decode(part, final=not part)
        self._at, self._ended = 0, not part


def _sought(text: OpenedText, start_at: Place) -> int:
    """Move to a row's first byte and return its offset."""
    if start_at == START:
        return 0
    before, data = b"", text.data
    if start_at.offset > 0:
        if text.seeks:
            data.seek(start_at.offset - 1)
        else:
            left = start_at.offset - 1
            while left and (part := data.read(min(left, PIECE))):
                left -= len(part)
        before = data.readline(PIECE)
    # the newline of the row before; or its last byte, where the file ended without one and may have grown since
    if not before or len(before.rstrip(b"\r\n")) > 1:
        raise no_row(text.name, start_at)
    return start_at.offset - 1 + len(before)
