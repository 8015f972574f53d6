"""Traffic from a file: one JSON object a line, or parquet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.example import Example

FIELDS = ("prompt", "text", "instruction", "input")
MAX_CHARS = 8000
"""Longer prompts are cut here; what decides an answer is mostly said before."""


def read_traffic(path: Path, limit: int | None = None) -> Iterator[Example]:
    """Yield the rows of a JSONL or parquet file, in order, at most `limit`.

    A row is a string, or an object with one of the fields prompt, text, instruction or input, or with `messages` in the
    chat form (the last user turn is taken). A `tag` field is carried along and never looked at by the audit.

    Raises:
        UsageError: no such file, or parquet without the extra.
        InvalidInput: a row that is none of these; names the line.
    """
    if not path.is_file():
        raise UsageError(f"{printable(str(path))} is not a file; --traffic takes a JSONL or parquet file of prompts")
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
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            "reading parquet needs an extra: pip install 'molehunt[parquet]', or convert the file to JSONL"
        ) from None
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _example(row: Any, path: Path, number: int) -> Example:
    where = f"{printable(path.name)} row {number}"
    if isinstance(row, str):
        return Example(prompt=row[:MAX_CHARS])
    if not isinstance(row, dict):
        raise InvalidInput(f"{where} is a {type(row).__name__}; expected an object with a prompt")
    tag = str(row.get("tag", ""))[:60]
    for name in FIELDS:
        if isinstance(row.get(name), str):
            return Example(prompt=row[name][:MAX_CHARS], tag=tag)
    messages = row.get("messages")
    if isinstance(messages, list):
        turns = [
            m["content"]
            for m in messages
            if isinstance(m, dict) and m.get("role") == "user" and isinstance(m.get("content"), str)
        ]
        if turns:
            return Example(prompt=turns[-1][:MAX_CHARS], tag=tag)
    raise InvalidInput(f"{where} has none of the fields {', '.join(FIELDS)} or messages with a user turn")
