"""The texts that a verb works on: a file, a stream, a list of strings, or a list of conversations.

Rows that cannot be read are left out, counted, and named on stderr and in what the verb writes; where most of a file
cannot be read, it is refused. Verbs that compare rows one by one, or take answers for right ones, stop at the first such row.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.chat import Text
from molehunt.traffic.example import Example
from molehunt.traffic.left_out import ReadRows, RowCount
from molehunt.traffic.messages import in_words
from molehunt.traffic.opened import is_readable, name_of
from molehunt.traffic.place import BadLines, Place
from molehunt.traffic.rows import conversation_of, form_of
from molehunt.traffic.stream import Conversation, OnBad, read_conversations, refuse_unreadable

log = logging.getLogger(__name__)

Texts = str | Path | Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, Any]]]
"""A file (JSONL, JSON, CSV or parquet; `-` for standard input), or a list. Each row of a list is a prompt, an object as in a
JSONL file (such as `{"prompt": …, "response": …}` or `{"messages": […]}`), or a conversation: a list of messages."""


def read_rows(texts: Texts, limit: int | None = None, *, on_bad: OnBad = "skip") -> ReadRows:
    """The whole conversation of each row, and what could not be read, which is logged.

    Args:
        texts: see `Texts`.
        limit: greatest number of rows that are read.
        on_bad: whether to stop at the first row that cannot be read, or to leave it out.

    Raises:
        UsageError: no such file, or one string that names none.
        InvalidInput: most rows cannot be read, or one and `on_bad` is "stop"; the error names it and shows it.
    """
    count = RowCount(name_of(Path(texts)) if isinstance(texts, str | Path) else "the list")
    rows = tuple(row.example for row in count.counting(_read(texts, limit, on_bad, count.bad)))
    refuse_unreadable(len(rows), count.bad, count.name)
    found = ReadRows(rows, count.bad, count.name, count.forms, limited=len(rows) == limit)
    if found.left_out:
        log.warning("%s", found.left_out)
    return found


def examples(texts: Texts, limit: int | None = None, *, on_bad: OnBad = "skip") -> list[Example]:
    """The rows of `read_rows`. Arguments and errors as there."""
    return list(read_rows(texts, limit, on_bad=on_bad).rows)


def prompts(texts: Texts, limit: int | None = None, *, on_bad: OnBad = "skip") -> list[Text]:
    """What the rows of `read_rows` ask, as chat templates take it: one user turn, or the messages of a conversation."""
    return [example.asked for example in examples(texts, limit, on_bad=on_bad)]


def conversations(texts: Texts, limit: int | None = None) -> list[Conversation]:
    """Whole conversations with the answer that was logged, where there is one; the first bad row is an error.

    Args:
        texts: see `Texts`.
        limit: greatest number of rows that are read.

    Raises:
        UsageError: no such file, or one string that names none.
        InvalidInput: a row is no conversation; the error names it.
    """
    return list(_read(texts, limit, "stop", BadLines()))


def _read(texts: Texts, limit: int | None, on_bad: OnBad, bad: BadLines) -> Iterator[Conversation]:
    found = (
        read_conversations(_file(texts), on_bad=on_bad, bad=bad)
        if isinstance(texts, str | Path)
        else _listed(texts, on_bad, bad)
    )
    return islice(found, limit)


def _listed(texts: Sequence[Any], on_bad: OnBad, bad: BadLines) -> Iterator[Conversation]:
    for number, row in enumerate(texts, 1):
        try:  # a bare list of messages is an object as a JSONL file would have it
            turns, response, tag = conversation_of(row if isinstance(row, str | Mapping) else {"messages": list(row)})
        except (InvalidInput, TypeError) as error:
            why = str(error) if isinstance(error, InvalidInput) else f"{in_words(row)}; text is expected"
            if on_bad == "stop":
                raise InvalidInput(f"row {number}: {why}") from None
            bad.add(number, why, unit="row", row=printable(repr(row), 200))
            continue
        yield Conversation(
            turns=turns, response=response, tag=tag, line=number, end=Place(0, number), form=form_of(row)
        )


def _file(texts: str | Path) -> Path:
    path = Path(texts)
    try:
        there = is_readable(path)
    except (OSError, ValueError):  # a text is given in place of a name, and is too long for one or holds a zero byte
        there = False
    if not there:
        raise UsageError(
            f"{printable(str(path))} is not a file. Give a JSONL, JSON, CSV or parquet file, - for standard input, or a "
            "list of texts such as ['What is 2 plus 2?']."
        )
    return path
