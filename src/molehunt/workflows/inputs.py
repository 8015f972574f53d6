"""The texts that a verb works on: a file, a list of strings, or a list of conversations."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.example import Example
from molehunt.traffic.rows import conversation_of, example_of
from molehunt.traffic.stream import Conversation, Place, read_conversations, read_traffic

Texts = str | Path | Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, Any]]]
"""A JSONL or parquet file, or a list. Each row of a list is a prompt, an object as in a JSONL file (such as
`{"prompt": …, "response": …}` or `{"messages": […]}`), or a conversation: a list of messages."""


def examples(texts: Texts, limit: int | None = None) -> list[Example]:
    """One prompt for each row; of a conversation, its last user turn.

    Args:
        texts: see `Texts`.
        limit: greatest number of rows that are read.

    Raises:
        UsageError: no such file, or one string that names none.
        InvalidInput: a row holds no prompt; the error names it.
    """
    if isinstance(texts, str | Path):
        return list(read_traffic(_file(texts), limit))
    return [example_of(row, f"row {number}") for number, row in enumerate(islice(_rows(texts), limit), 1)]


def prompts(texts: Texts, limit: int | None = None) -> list[str]:
    """The prompts of `examples`."""
    return [example.prompt for example in examples(texts, limit)]


def conversations(texts: Texts, limit: int | None = None) -> list[Conversation]:
    """Whole conversations with the answer that was logged, where there is one.

    Args:
        texts: see `Texts`.
        limit: greatest number of rows that are read.

    Raises:
        UsageError: no such file, or one string that names none.
        InvalidInput: a row is no conversation; the error names it.
    """
    if isinstance(texts, str | Path):
        return list(islice(read_conversations(_file(texts)), limit))
    found: list[Conversation] = []
    for number, row in enumerate(islice(_rows(texts), limit), 1):
        try:
            turns, response, tag = conversation_of(row)
        except InvalidInput as error:
            raise InvalidInput(f"row {number}: {error}") from None
        found.append(Conversation(turns=turns, response=response, tag=tag, line=number, end=Place(0, number)))
    return found


def _file(texts: str | Path) -> Path:
    path = Path(texts)
    if not path.is_file():
        raise UsageError(
            f"{printable(str(path))} is not a file. Give a JSONL or parquet file, or a list of texts such as "
            "['What is 2 plus 2?']."
        )
    return path


def _rows(texts: Sequence[Any]) -> Iterator[Any]:
    """Rows as a JSONL file would have them: a bare list of messages becomes an object."""
    for row in texts:
        yield row if isinstance(row, str | Mapping) else {"messages": list(row)}
