"""Parses one row of traffic from JSON: its prompt, its answer, and the roles of its messages."""

from collections.abc import Mapping
from typing import Any, cast

from molehunt.errors import InvalidInput, printable
from molehunt.traffic.example import Example
from molehunt.traffic.roles import Turn

FIELDS = ("prompt", "text", "instruction", "input")
ANSWERS = ("response", "completion", "answer")
MAX_CHARS = 8000
"""Number of characters at which `read_traffic` cuts longer prompts."""
MAX_LINE = 8_000_000
"""Greatest number of bytes of a line, and of characters of a conversation, that `read_conversations` reads."""


def example_of(row: Any, where: str) -> Example:
    """The prompt of one row, its answer where it has one, and its tag; long texts are cut at `MAX_CHARS`.

    Args:
        row: a string, or an object with a prompt or messages.
        where: name of the row in an error, such as `prompts.jsonl row 3`.

    Raises:
        InvalidInput: the row is none of these.
    """
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


def conversation_of(row: Any) -> tuple[tuple[Turn, ...], str | None, str]:
    """The turns of one row, its logged answer where it has one, and its tag; nothing is cut.

    Raises:
        InvalidInput: the row is neither a string nor an object with messages or a prompt, or it is longer than `MAX_LINE`.
    """
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
        fields = part if isinstance(part, Mapping) else {"type": type(part).__name__}
        if fields.get("type", "text") != "text" or not isinstance(fields.get("text"), str):
            raise InvalidInput(
                f"part {number} of its {name} is {printable(str(fields.get('type')), 40)}; expected text"
            )
        texts.append(_unicode(fields["text"]))
    return "\n".join(texts)


def _unicode(text: str) -> str:
    """`text` with each half of a surrogate pair replaced: JSON may contain one, and no tokenizer accepts it."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
