"""Traffic from a file: one JSON object a line, plain or gzipped, or parquet. Logs may be of any size."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.local import Shard
from molehunt.run.progress import Track, counting, silent
from molehunt.traffic.example import Example
from molehunt.traffic.roles import Turn

FIELDS = ("prompt", "text", "instruction", "input")
ANSWERS = ("response", "completion", "answer")
COLUMNS = ("messages", *FIELDS, *ANSWERS, "tag")
"""What is read of a parquet file."""
MAX_CHARS = 8000
"""`read_traffic` cuts longer prompts here; what decides an answer is mostly said before."""
MAX_LINE = 8_000_000
"""Bytes of the longest line that `read_conversations` reads, and characters of the longest conversation."""
FIRST_BAD = 5
"""Bad lines that are remembered with their reason."""
PIECE = 1_000_000
"""Bytes that are read at once of a line that is too long."""
STEP = 1_000
"""Bytes of the file in one step of the progress shown: a kB."""


class Place(NamedTuple):
    """Where a row of a file ends and the next begins."""

    offset: int = 0
    """Bytes before it, once unpacked; in a parquet file, rows."""
    line: int = 0
    """Lines before it; in a parquet file, rows."""


BATCH = 64
"""Rows of a parquet file that are unpacked at a time."""
START = Place()
WHOLE = Shard()


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One row of a log: what the model was given, and what it answered."""

    turns: tuple[Turn, ...]
    """At least one, uncut, the answer not among them."""
    response: str | None
    """The logged answer, where there is one."""
    tag: str
    """What the owner of the log knows about the row, for tables; nothing that looks for suspicious rows reads it."""
    line: int
    """Counted from 1, blank lines included; in a parquet file the row."""
    end: Place
    """Where the next row begins: a later reading goes on with `start_at=end`."""


@dataclass(slots=True)
class BadLines:
    """What a reader skipped: all counted, the first few remembered."""

    count: int = 0
    first: list[str] = field(default_factory=list[str])
    """At most `FIRST_BAD` lines such as `line 3: not JSON: '{'`."""

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
    shard: Shard = WHOLE,
    track: Track = silent,
) -> Iterator[Conversation]:
    """Yield the conversations of a log (.jsonl, .jsonl.gz, .parquet) in order, holding one line at a time.

    A row is a string, or an object with `messages` of the roles system, user, assistant and tool, or with a prompt, text,
    instruction or input, which becomes one user turn. A response, completion or answer is the logged answer, else a last
    assistant message is. Content in parts is joined by newlines; a part that is no text makes the row a bad one. The
    calls of tools are not read. Half of a surrogate pair becomes U+FFFD.

    Args:
        on_bad: stop at the first row that is none of these or longer than `MAX_LINE`, or skip such rows.
        bad: counts what is skipped.
        start_at: the `end` of the last row that an earlier reading finished.
        shard: read only the lines whose number, counted from 0, is the shard's.
        track: shows kB of the file (parquet: rows).

    Raises:
        UsageError: no such file, parquet without the extra, or no row begins at `start_at`.
        InvalidInput: a bad row, by line, if `on_bad` is "stop"; a broken gzip or parquet file.
    """
    if not path.is_file():
        raise UsageError(f"{printable(str(path))} is not a file; a log is a JSONL, JSONL.gz or parquet file")
    rows = _parquet_rows(path, start_at, track) if path.suffix == ".parquet" else _lines(path, start_at, track)
    for end, raw in rows:
        if not shard.mine(end.line - 1):
            continue
        try:
            turns, response, tag = _conversation(_parsed(raw))
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
    chat form (the last user turn is taken). A response, completion or answer is carried along, else an assistant message
    that ends a chat; so is a `tag` field. Neither is looked at by the audit.

    Raises:
        UsageError: no such file, or parquet without the extra.
        InvalidInput: a row that is none of these; names the line.
    """
    if not path.is_file():
        raise UsageError(f"{printable(str(path))} is not a file; give a JSONL or parquet file of prompts")
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    for number, row in rows:
        if limit is not None and number > limit:
            return
        yield _example(row, path, number)


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


def _example(row: Any, path: Path, number: int) -> Example:
    where = f"{printable(path.name)} row {number}"
    if isinstance(row, str):
        return Example(prompt=row[:MAX_CHARS])
    if not isinstance(row, dict):
        raise InvalidInput(f"{where} is a {type(row).__name__}; expected an object with a prompt")
    tag = str(row.get("tag", ""))[:60]
    response = next((row[name][:MAX_CHARS] for name in ANSWERS if isinstance(row.get(name), str)), None)
    for name in FIELDS:
        if isinstance(row.get(name), str):
            return Example(prompt=row[name][:MAX_CHARS], response=response, tag=tag)
    messages = row.get("messages")
    if isinstance(messages, list):
        last = messages[-1] if messages else None
        if response is None and isinstance(last, dict) and last.get("role") == "assistant":
            content = last.get("content")
            response = content[:MAX_CHARS] if isinstance(content, str) else None
        turns = [
            m["content"]
            for m in messages
            if isinstance(m, dict) and m.get("role") == "user" and isinstance(m.get("content"), str)
        ]
        if turns:
            return Example(prompt=turns[-1][:MAX_CHARS], response=response, tag=tag)
    raise InvalidInput(f"{where} has none of the fields {', '.join(FIELDS)} or messages with a user turn")


def _lines(path: Path, start_at: Place, track: Track) -> Iterator[tuple[Place, bytes]]:
    """Each line that is not blank, with its end; of one that is too long, its first `MAX_LINE` + 1 bytes."""
    size = -(-path.stat().st_size // STEP)
    try:
        with path.open("rb") as stored, _unpacked(stored, path) as file:
            offset, line = _sought(file, start_at, path), start_at.line
            start = stored.tell() // STEP
            with counting(track, f"reading {printable(path.name)}", size, unit="kB", start=start) as done:
                while head := file.readline(MAX_LINE + 1):
                    offset, line, part = offset + len(head), line + 1, head
                    while not part.endswith(b"\n") and (part := file.readline(PIECE)):
                        offset += len(part)  # the rest of a giant line passes by, a piece at a time
                    done(stored.tell() / STEP - done.done)
                    if _giant(head) or head.strip():
                        yield Place(offset, line), head
                done(size - done.done)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInput(f"{printable(path.name)} is cut off or no gzip file: {printable(str(error))}") from error


def _unpacked(stored: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored


def _sought(file: io.BufferedIOBase, start_at: Place, path: Path) -> int:
    """Goes to a row's first byte and returns its offset."""
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


def _conversation(row: Any) -> tuple[tuple[Turn, ...], str | None, str]:
    """Turns, logged answer, tag."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise InvalidInput(f"a {type(row).__name__}; expected an object with messages or a prompt")
    response = next((_text(row[name], name) for name in ANSWERS if row.get(name) is not None), None)
    if row.get("messages"):
        turns = _turns(row["messages"])
        if turns[-1].role == "assistant" and response in (None, turns[-1].text):
            response = turns.pop().text
    else:
        name = next((name for name in FIELDS if row.get(name) is not None), None)
        if name is None:
            raise InvalidInput(f"none of the fields messages, {', '.join(FIELDS)}")
        turns = [Turn("user", _text(row[name], name))]
    if not any(turn.text.strip() for turn in turns):
        raise InvalidInput("no text before the answer")
    if sum(len(turn.text) for turn in turns) + len(response or "") > MAX_LINE:  # parquet has no lines
        raise InvalidInput(f"more than {MAX_LINE // 10**6} million characters")
    return tuple(turns), response, _unicode(str(row.get("tag") or ""))[:60]


def _turns(messages: Any) -> list[Turn]:
    if not isinstance(messages, list):
        raise InvalidInput(f"messages is a {type(messages).__name__}; expected a list")
    turns: list[Turn] = []
    for number, message in enumerate(cast(list[Any], messages), 1):
        if not isinstance(message, Mapping):
            raise InvalidInput(f"message {number} is a {type(message).__name__}; expected an object")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            content = ""
        try:
            turns.append(Turn(str(message.get("role", "")), _text(content, "content")))
        except InvalidInput as error:
            raise InvalidInput(f"message {number}: {error}") from None
    return turns


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return _unicode(value)
    if not isinstance(value, list):
        raise InvalidInput(f"{name} is a {type(value).__name__}; expected text")
    texts: list[str] = []
    for number, part in enumerate(cast(list[Any], value), 1):
        told = part if isinstance(part, Mapping) else {"type": type(part).__name__}
        if told.get("type", "text") != "text" or not isinstance(told.get("text"), str):
            raise InvalidInput(f"part {number} of its {name} is {printable(str(told.get('type')), 40)}; expected text")
        texts.append(_unicode(told["text"]))
    return "\n".join(texts)


def _unicode(text: str) -> str:
    """`text` with each half of a surrogate pair replaced: JSON may hold one, and no tokenizer takes it."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
