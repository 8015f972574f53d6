"""Prompts from the CSV tables of AdvBench, HarmBench and JailbreakBench. Give your own copy; only its prompts are read.

AdvBench has the columns `goal` and `target`. HarmBench has `Behavior`, a `ContextString` that some behaviours refer to,
and a category. JailbreakBench has `Goal`; its `Behavior` is only a name. Targets and labels are ignored. Sources:
Zou et al., arXiv 2307.15043; Mazeika et al., arXiv 2402.04249, whose harness puts the context first; Chao et al., arXiv
2404.01318.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.example import Example
from molehunt.traffic.rows import MAX_CHARS

MAX_BYTES = 64_000_000
"""Greatest number of bytes of a file. HarmBench with all its contexts has 1 MB."""
PROMPTS = ("goal", "Goal", "Behavior")
"""Names of the column with the prompt; the first one that a table has is read."""
CONTEXT = "ContextString"


def read_behaviours(path: Path, limit: int | None = None) -> Iterator[Example]:
    """Yield the prompts of a table, in order, at most `limit`; those longer than `MAX_CHARS` are cut there.

    Raises:
        UsageError: no such file.
        InvalidInput: the file is not UTF-8 or is too large; it has none of `PROMPTS`, or one of its columns twice; or it
            has no row, or a row without a prompt or with another number of columns. The error names the row.
    """
    if not path.is_file():
        raise UsageError(
            f"{printable(str(path))} is not a file; give the CSV of AdvBench, HarmBench or JailbreakBench."
        )
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    name, number = printable(path.name), 0
    try:
        head = [column.strip() for column in next(rows, [])]
        prompt, context = _columns(head, name)
        for row in rows:
            if not row:
                continue
            number += 1
            if limit is not None and number > limit:
                return
            if len(row) != len(head) or not row[prompt].strip():
                what = "no prompt" if len(row) == len(head) else f"{len(row)} of {len(head)} columns"
                raise InvalidInput(
                    f"{name} row {number} (line {rows.line_num}) has {what}: it is cut off or was edited."
                )
            about = "" if context is None else row[context].strip()
            text = f"{about}\n\n---\n\n{row[prompt].strip()}" if about else row[prompt].strip()
            yield Example(prompt=text[:MAX_CHARS], tag="")
    except csv.Error as error:
        raise InvalidInput(f"{name} line {rows.line_num} is no CSV: {printable(str(error))}.") from None
    if not number:
        raise InvalidInput(f"{name} has a head and no row.")


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InvalidInput(f"{printable(path.name)} has {size / 1e6:.0f} MB; a table of prompts has at most 64.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{printable(path.name)} is no UTF-8 text (byte {error.start}).") from None


def _columns(head: list[str], name: str) -> tuple[int, int | None]:
    """Column numbers of the prompt and of its context."""
    found = next((column for column in PROMPTS if column in head), None)
    if found is None or max(map(head.count, (found, CONTEXT))) > 1:
        raise InvalidInput(
            f"{name} begins with the columns {printable(', '.join(head)) or 'nothing'}; a table of prompts has one `goal` "
            "(AdvBench, JailbreakBench) or `Behavior` (HarmBench), once."
        )
    return head.index(found), head.index(CONTEXT) if CONTEXT in head else None
