"""Parses the messages of a conversation, as the formats of chat libraries, request logs and data sets write them."""

import json
from collections.abc import Mapping
from typing import Any, cast

from molehunt.errors import InvalidInput, printable
from molehunt.traffic.turn import Turn, role_of

ROLE_KEYS, TEXT_KEYS = ("role", "from", "author"), ("content", "value", "text")
TEXT_PARTS = ("text", "input_text", "output_text")
SILENT_PARTS = ("tool_use", "tool_call", "thinking", "redacted_thinking", "reasoning")
"""Types of part that hold no text of the conversation: calls of tools are not read, and thoughts are not sent again."""


def turns_of(messages: Any, name: str) -> list[Turn]:
    """The turns of a list of messages, or of the JSON text of one: a table holds lists as text.

    Raises:
        InvalidInput: this is no list of messages, or one of them has an unknown role or content that is no text.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise InvalidInput(f"{name} is text that is no JSON: {printable(messages, 40)!r}") from None
    if not isinstance(messages, list):
        raise InvalidInput(f"{name} is {in_words(messages)}; a list is expected")
    turns: list[Turn] = []
    listed = cast(list[Any], messages)
    for number, message in enumerate(listed, 1):
        try:
            one = _turn(message)
        except InvalidInput as error:
            raise InvalidInput(f"message {number}{error}") from None
        if one is None and number < len(listed):
            raise InvalidInput(f"message {number}: content is {in_words(None)}; text is expected")
        turns += [] if one is None else [one]
    return turns


def in_words(value: object) -> str:
    """What kind of JSON value this is, for a message: `a number (5)`, `null`, `a list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({printable(str(value), 20)})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def is_message(value: object) -> bool:
    """Whether this object is one message, and not a part of its content."""
    if not isinstance(value, Mapping):
        return False
    message = cast("Mapping[str, Any]", value)
    return _first(message, ROLE_KEYS) is not None or message.get("type") in ("function_call", "function_call_output")


def text_of(value: Any, name: str) -> str:
    """Text, or the texts of content in parts, one below the other.

    Raises:
        InvalidInput: this is no text, a part of it is not, or it holds half of a surrogate pair.
    """
    if isinstance(value, str):
        return unicode_text(value, name)
    if isinstance(value, Mapping) and isinstance(fields := cast("Mapping[str, Any]", value).get("parts"), list):
        value = cast("Any", fields)  # of ChatGPT's export: {"content_type": "text", "parts": ["…"]}
    if not isinstance(value, list):
        raise InvalidInput(f"{name} is {in_words(value)}; text is expected")
    texts = [_part(part, number, name) for number, part in enumerate(cast(list[Any], value), 1)]
    return "\n".join(text for text in texts if text is not None)


def said_of(value: Any, name: str) -> str:
    """As `text_of`, for answers: they are often numbers, or true and false, which are taken as they are written."""
    return str(value) if isinstance(value, bool | int | float) else text_of(value, name)


def unicode_text(text: str, name: str = "text") -> str:
    """`text` with both halves of each surrogate pair joined. Raises InvalidInput for a half: no tokenizer accepts it."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise InvalidInput(f"{name} holds half of a surrogate pair, or a byte that is no UTF-8") from None


def _turn(message: Any) -> Turn | None:
    """One turn; None for an answer without content, such as the open place at the end of a conversation."""
    if not isinstance(message, Mapping):
        raise InvalidInput(f" is {in_words(message)}; an object is expected")
    fields = cast("Mapping[str, Any]", message)
    kind = fields.get("type")
    try:
        if kind == "function_call":
            return Turn("assistant", "")
        if kind == "function_call_output":
            return Turn("tool", text_of(fields.get("output"), "output"))
        role = _first(fields, ROLE_KEYS)
        if isinstance(role, Mapping):
            role = cast("Mapping[str, Any]", role).get("role")
        author = role_of(str(role or ""))
        content = _first(fields, TEXT_KEYS)
        if content is None and (fields.get("tool_calls") or fields.get("function_call")):
            content = ""
        if content is None and author == "assistant":
            return None
        return Turn(author, text_of(content, "content"))
    except InvalidInput as error:
        raise InvalidInput(f": {error}") from None


def _part(part: Any, number: int, name: str) -> str | None:
    if isinstance(part, str):
        return unicode_text(part, name)
    fields = cast("Mapping[str, Any]", part if isinstance(part, Mapping) else {"type": in_words(part)})
    kind = fields.get("type") or "text"
    if kind in SILENT_PARTS:
        return None
    if kind == "tool_result":
        return text_of(fields.get("content") or "", f"part {number} of its {name}")
    text = fields.get("refusal") if kind == "refusal" else fields.get("text")
    if not (kind in TEXT_PARTS or kind == "refusal") or not isinstance(text, str):
        raise InvalidInput(f"part {number} of its {name} is {printable(str(kind), 40)}; text is expected")
    return unicode_text(text, name)


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these fields that is there: a table of mixed messages has every field, and None in most."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)
