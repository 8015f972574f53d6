"""The one reader of traffic: conversations from a file or a stream, in whatever format, encoding and packing it has."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.counting import counted
from molehunt.run.local import WorkShard
from molehunt.run.progress import Track, silent
from molehunt.traffic.example import Example
from molehunt.traffic.json_rows import parsed_line
from molehunt.traffic.layout import RowsOfFile, rows_of
from molehunt.traffic.opened import STDIN, is_readable, name_of, opened
from molehunt.traffic.parquet_rows import MAGIC, parquet_rows
from molehunt.traffic.place import START, BadLines, Place
from molehunt.traffic.rows import LOOKED_FOR, PLAIN_TEXT, conversation_of, form_of
from molehunt.traffic.turn import Turn

OnBad = Literal["stop", "skip"]
"""What is done at a row that cannot be read."""
READABLE_SHARE = 0.5
"""Share of the rows that must be readable: below it, the file is another one than its reader takes it for."""
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
    """Line number from 1, with blank lines included; where a row is no line, the number of the row."""
    end: Place
    """Start of the next row: pass it as `start_at` to continue reading later."""
    form: str = field(default="", compare=False)
    """What the row was read as, such as `from the field prompt`; see `rows.form_of`."""

    @property
    def example(self) -> Example:
        """The same as an example."""
        return Example.of(self.turns, response=self.response, tag=self.tag, line=self.line)


def read_conversations(
    path: Path,
    *,
    on_bad: OnBad = "stop",
    bad: BadLines | None = None,
    start_at: Place = START,
    shard: WorkShard = WHOLE,
    track: Track = silent,
) -> Iterator[Conversation]:
    """Yield the conversations of a file in order, with one row in memory at a time.

    A file holds JSON lines, a JSON array, or a table (CSV, TSV, parquet), in any Unicode encoding, plain or packed (gzip,
    zstd, bzip2, xz): what it holds counts, not its name. `-` is standard input. `rows.conversation_of` says what a row is.
    The logged answer is the response, completion, answer or output, or else a last assistant message. Calls of tools are
    not read.

    Args:
        path: the file or stream.
        on_bad: whether to stop at the first row that cannot be read or is longer than `MAX_LINE`, or to leave it out.
        bad: records the rows that are left out.
        start_at: the `end` of the last row that was read before.
        shard: the share of the rows to read.
        track: shows kB of the file (rows of a parquet file).

    Raises:
        UsageError: the file does not exist, its format needs an extra, or no row begins at `start_at`.
        InvalidInput: a row is bad and `on_bad` is "stop" (the error names the line), or the file is broken.
    """
    with _rows(path, start_at, track) as rows:
        for end, raw in rows.found:
            if not shard.mine(end.line - 1):
                continue
            try:
                value = _value(raw)
                turns, response, tag = conversation_of(value)
            except InvalidInput as error:
                shown = printable(raw.decode(errors="replace").strip() if isinstance(raw, bytes) else str(raw), 200)
                if on_bad == "stop":
                    raise InvalidInput(
                        f"{name_of(path)} {rows.unit} {end.line}: {error}.\nThis row is {shown}\n{advice(str(error), shown)}"
                    ) from None
                if bad is not None:
                    bad.add(end.line, str(error), unit=rows.unit, row=shown)
                continue
            yield Conversation(turns=turns, response=response, tag=tag, line=end.line, end=end, form=form_of(value))


def read_traffic(
    path: Path, limit: int | None = None, *, on_bad: OnBad = "stop", bad: BadLines | None = None
) -> Iterator[Example]:
    """Yield the rows of a file as examples, in order, at most `limit`. Arguments and errors as `read_conversations`."""
    return (row.example for row in islice(read_conversations(path, on_bad=on_bad, bad=bad), limit))


def refuse_unreadable(read: int, bad: BadLines, name: str) -> None:
    """Raises InvalidInput where fewer than `READABLE_SHARE` of the rows could be read, with the first row and what was looked for."""
    if bad.count and read < READABLE_SHARE * (read + bad.count):
        raise InvalidInput(
            f"{name}: {bad.count} of {counted(read + bad.count, 'row')} cannot be read ({bad.first[0]}).\n"
            f"That row is {bad.example}\n{advice(bad.first[0], bad.example)}"
        )


def advice(why: str, row: str) -> str:
    """What to do about a row that cannot be read: lines of plain text need one change, other rows one of many forms."""
    plain = "not JSON" in why and not row.lstrip().startswith(("{", "[", '"'))
    return PLAIN_TEXT if plain else LOOKED_FOR


@contextmanager
def _rows(path: Path, start_at: Place, track: Track) -> Generator[RowsOfFile, None, None]:
    if not is_readable(path):
        raise UsageError(
            f"{printable(str(path))} is not a file; give a JSONL, JSON, CSV or parquet file, or - for a stream"
        )
    if str(path) != STDIN and path.is_file() and (path.suffix == ".parquet" or _begins(path) == MAGIC):
        yield RowsOfFile("row", parquet_rows(path, start_at, track))
        return
    with opened(path) as text:
        yield rows_of(text, start_at, track)


def _begins(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError:
        return b""  # `opened` says what is wrong


def _value(raw: Any) -> Any:
    """The value of one row. Raises InvalidInput where there is none."""
    if isinstance(raw, InvalidInput):
        raise raw
    return parsed_line(raw) if isinstance(raw, bytes) else raw
