"""Reads traffic from a file: JSON lines, plain or gzipped, or parquet. Files may have any size."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.local import WorkShard
from molehunt.run.progress import Track, counting, silent
from molehunt.traffic.example import Example
from molehunt.traffic.roles import Turn
from molehunt.traffic.rows import ANSWERS, FIELDS, MAX_LINE, conversation_of, example_of

COLUMNS = ("messages", *FIELDS, *ANSWERS, "tag")
"""Names of the columns that are read from a parquet file."""
FIRST_BAD = 5
"""Number of bad lines whose reason is stored."""
PIECE = 1_000_000
"""Number of bytes that are read at a time from a line that is too long."""
STEP = 1_000
"""Number of bytes of the file per step of the progress: one kB."""


class Place(NamedTuple):
    """The end of one row of a file, which is the start of the next."""

    offset: int = 0
    """Number of unpacked bytes before it; in a parquet file, number of rows."""
    line: int = 0
    """Number of lines before it; in a parquet file, number of rows."""


BATCH = 64
"""Number of rows of a parquet file that are unpacked at a time."""
START = Place()
WHOLE = WorkShard()


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One row of a log: the input of a model, and its answer if it was logged."""

    turns: tuple[Turn, ...]
    """The turns before the answer: at least one, and not shortened."""
    response: str | None
    """The logged answer; None if there is none."""
    tag: str
    """The owner's label of the row, for tables. No method that searches for suspicious rows reads it."""
    line: int
    """Line number from 1, with blank lines included; in a parquet file, the row number."""
    end: Place
    """Start of the next row: pass it as `start_at` to continue reading later."""


@dataclass(slots=True)
class BadLines:
    """The lines that a reader skipped: their number, and the first few of them."""

    count: int = 0
    first: list[str] = field(default_factory=list[str])
    """Reasons of the first `FIRST_BAD` bad lines, such as `line 3: not JSON: '{'`."""

    def add(self, line: int, why: str) -> None:
        self.count += 1
        if len(self.first) < FIRST_BAD:
            self.first.append(f"line {line}: {why}")


def read_conversations(
    path: Path,
    *,
    on_bad: Literal["stop", "skip"] = "stop",
    bad: BadLines | None = None,
    start_at: Place = START,
    shard: WorkShard = WHOLE,
    track: Track = silent,
) -> Iterator[Conversation]:
    """Yield the conversations of a log (.jsonl, .jsonl.gz, .parquet) in order, with one line in memory at a time.

    A row is a string, or an object with `messages` of the roles system, user, assistant and tool, or with a prompt, text,
    instruction or input, which becomes one user turn. The logged answer is the response, completion or answer, or else
    a last assistant message. Content in parts is joined by newlines; a part that is not text makes the row a bad row.
    Tool calls are not read. Half of a surrogate pair becomes U+FFFD.

    Args:
        path: the file.
        on_bad: whether to stop at the first row that has another form or is longer than `MAX_LINE`, or to skip such rows.
        bad: records the rows that are skipped.
        start_at: the `end` of the last row that was read before.
        shard: the share of the lines to read.
        track: shows kB of the file (rows of a parquet file).

    Raises:
        UsageError: the file does not exist, parquet needs its extra, or no row begins at `start_at`.
        InvalidInput: a row is bad and `on_bad` is "stop" (the error names the line), or a gzip or parquet file is broken.
    """
    if not path.is_file():
        raise UsageError(f"{printable(str(path))} is not a file; a log is a JSONL, JSONL.gz or parquet file")
    rows = _parquet_rows(path, start_at, track) if path.suffix == ".parquet" else _lines(path, start_at, track)
    for end, raw in rows:
        if not shard.mine(end.line - 1):
            continue
        try:
            turns, response, tag = conversation_of(_parsed(raw))
        except InvalidInput as error:
            if on_bad == "stop":
                raise InvalidInput(
                    f"{printable(path.name)} line {end.line}: {error}.\nEach line must be one object such as "
                    '{"messages": [{"role": "user", "content": "What is 2 plus 2?"}]}; bad ones can be skipped.'
                ) from None
            if bad is not None:
                bad.add(end.line, str(error))
            continue
        yield Conversation(turns=turns, response=response, tag=tag, line=end.line, end=end)


def read_traffic(path: Path, limit: int | None = None) -> Iterator[Example]:
    """Yield the rows of a JSONL or parquet file, in order, at most `limit`.

    A row is a string, or an object with one of the fields prompt, text, instruction or input, or with `messages` in the
    chat form (the last user turn is taken). The example also has the response, completion or answer, or else an
    assistant message that ends a chat, and the `tag`. An audit reads neither of them.

    Raises:
        UsageError: the file does not exist, or parquet needs its extra.
        InvalidInput: a row has another form; the error names it.
    """
    if not path.is_file():
        raise UsageError(f"{printable(str(path))} is not a file; give a JSONL or parquet file of prompts")
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    for number, row in rows:
        if limit is not None and number > limit:
            return
        yield example_of(row, f"{printable(path.name)} row {number}")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            number += 1
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise InvalidInput(
                    f"{printable(path.name)} line {line_number} is not JSON: {printable(line.strip(), 60)!r}.\n"
                    'Each line must be one object such as {"prompt": "What is 2 plus 2?"}.'
                ) from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    for end, row in _parquet_rows(path, START, silent):
        yield end.line, row


def _lines(path: Path, start_at: Place, track: Track) -> Iterator[tuple[Place, bytes]]:
    """Each line that is not blank, with its end. A line that is too long is cut after `MAX_LINE` + 1 bytes."""
    size = -(-path.stat().st_size // STEP)
    try:
        with path.open("rb") as stored, _unpacked(stored, path) as file:
            offset, line = _sought(file, start_at, path), start_at.line
            start = stored.tell() // STEP
            with counting(track, f"reading {printable(path.name)}", size, unit="kB", start=start) as done:
                while head := file.readline(MAX_LINE + 1):
                    offset, line, part = offset + len(head), line + 1, head
                    while not part.endswith(b"\n") and (part := file.readline(PIECE)):
                        offset += len(part)  # the rest of a line that is too long is skipped, a piece at a time
                    done(stored.tell() / STEP - done.done)
                    if _giant(head) or head.strip():
                        yield Place(offset, line), head
                done(size - done.done)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInput(f"{printable(path.name)} is cut off or no gzip file: {printable(str(error))}") from error


def _unpacked(stored: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored


def _sought(file: io.BufferedIOBase, start_at: Place, path: Path) -> int:
    """Move to a row's first byte and return its offset."""
    if start_at == START:
        return 0
    before = b""
    if start_at.offset > 0:
        file.seek(start_at.offset - 1)
        before = file.readline(PIECE)
    # the newline of the row before; or its last byte, where the file ended without one and may have grown since
    if not before or len(before.rstrip(b"\r\n")) > 1:
        raise _no_row(path, start_at)
    return start_at.offset - 1 + len(before)


def _no_row(path: Path, start_at: Place) -> UsageError:
    return UsageError(
        f"no row of {printable(path.name)} begins at {start_at.offset} (line {start_at.line + 1}): it is another file "
        "than the one that was read so far, or was cut.\nRead it from its start."
    )


def _giant(line: bytes) -> bool:
    return len(line) > MAX_LINE and not line.endswith(b"\n")


def _parsed(raw: Any) -> Any:
    if not isinstance(raw, bytes):
        return raw
    if _giant(raw):
        raise InvalidInput(f"longer than {MAX_LINE // 10**6} MB")
    text = raw.decode(errors="replace").removeprefix("\ufeff").strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput(f"not JSON: {printable(text[:61], 60)!r}") from None


def _parquet_rows(path: Path, start_at: Place, track: Track) -> Iterator[tuple[Place, Any]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            "reading parquet needs an extra: pip install 'molehunt[parquet]', or convert the file to JSONL"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        if not 0 <= start_at.line <= file.metadata.num_rows:
            raise _no_row(path, start_at)
        names = [name for name in file.schema_arrow.names if name in COLUMNS]
        end = 0
        all_rows = file.metadata.num_rows
        with counting(track, f"reading {printable(path.name)}", all_rows, start=start_at.line) as done:
            for group in range(file.num_row_groups):
                line, end = end, end + file.metadata.row_group(group).num_rows
                if end <= start_at.line:
                    continue
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=names):
                    for row in batch.to_pylist():
                        line += 1
                        if line > start_at.line:
                            yield Place(line, line), row
                            done(1)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise InvalidInput(f"{printable(path.name)} is no whole parquet file: {printable(str(error))}") from error
