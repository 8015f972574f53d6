"""One row of traffic, whatever format it is written in: the turns before the answer, the answer, and the tag.

A row can hold the same text twice, and the fuller form counts: whole conversations come before single prompts, and these
before `text`, in which data sets often keep a prompt that was joined with its answer.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from molehunt.errors import InvalidInput
from molehunt.traffic.example import Example
from molehunt.traffic.messages import (
    ROLE_KEYS,
    TEXT_KEYS,
    in_words,
    is_message,
    said_of,
    text_of,
    turns_of,
    unicode_text,
)
from molehunt.traffic.turn import AUTHORS, Turn, role_of

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
"""Fields that hold a list of messages."""
FIELDS = ("prompt", "instruction", "question", "query", "goal", "behavior", "inputs", "input", "text")
"""Fields that hold one prompt; the first one that a row has is read."""
ANSWERS = ("response", "completion", "answer", "output", "targets", "response_text")
SYSTEM = ("system", "system_prompt", "instructions")
BESIDE = (
    *CHATS,
    *FIELDS,
    *ANSWERS,
    *SYSTEM,
    "history",
    "chosen",
    "rejected",
    "context",
    "contextstring",
    "choices",
    "options",
)
WRAPPERS = ("body", "request", "row")
"""Fields whose object is the row: of a batch file, of a log of requests, of a data set's viewer."""
READ = (*BESIDE, *WRAPPERS, "tag")
"""Every field that is read."""
UNREAD = ("tools", "functions", "documents")
"""Fields that a chat template could write before the turns, and that no verb gives it: `form_of` names them."""
KEPT = (*READ, *ROLE_KEYS, *UNREAD)
"""Columns of a table that a row keeps: who says a message decides whether it is a prompt."""
MAX_LINE = 8_000_000
"""Greatest number of bytes of a line, and of characters of a row."""
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant|System):[ \n]?")
"""Begins a turn in the transcripts of HH-RLHF."""
LOOKED_FOR = (
    "A row is a string, or an object with a list of messages (messages, conversations, conversation), or with a prompt "
    "(prompt, instruction with or without input, question, query, input, text), or chosen and rejected, or a logged "
    'request (body, request). For example: {"messages": [{"role": "user", "content": "What is 2 plus 2?"}]}'
)

COLUMN_ADVICE = (
    "Rename the column with the prompts to `prompt`; if the file has no header line, add one.\n"
    f"Columns that hold prompts or conversations: {', '.join((*FIELDS, *CHATS))}."
)
PLAIN_TEXT = 'This is plain text. Put each prompt in one line of JSON: {"prompt": "What is 2 plus 2?"}'


class _Read(NamedTuple):
    turns: list[Turn]
    answer: str | None


def example_of(row: Any, where: str) -> Example:
    """The conversation of one row, its answer where it has one, and its tag.

    Args:
        row: see `conversation_of`.
        where: name of the row in an error, such as `prompts.jsonl row 3`.

    Raises:
        InvalidInput: the row has none of the forms that are read.
    """
    try:
        turns, response, tag = conversation_of(row)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    return Example.of(turns, response=response, tag=tag)


def conversation_of(row: Any) -> tuple[tuple[Turn, ...], str | None, str]:
    """The turns of one row, its logged answer where it has one, and its tag; nothing is cut.

    A row is a string, a list of messages, or an object. `docs/guides/audit.md` lists the forms.

    Raises:
        InvalidInput: the row has none of these forms, or it is longer than `MAX_LINE`.
    """
    if isinstance(row, list) and any(map(is_message, cast("list[Any]", row))):
        row = {"messages": row}
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise InvalidInput(f"{in_words(row)}; an object with messages or a prompt is expected")
    fields = _named(cast("Mapping[str, Any]", row))
    tag = unicode_text(str(fields.get("tag") or ""), "its tag")[:60]
    _asked_by_user(cast("Mapping[str, Any]", row), fields)
    turns, answer = _request(fields) or _row(fields)
    turns = _with_system(fields, turns)
    if not any(turn.text.strip() for turn in turns):
        raise InvalidInput(_silent(turns))
    if sum(len(turn.text) for turn in turns) + len(answer or "") > MAX_LINE:  # parquet has no lines
        raise InvalidInput(f"more than {MAX_LINE // 10**6} million characters")
    return tuple(turns), answer, tag


def form_of(row: Any) -> str:
    """What a row that `conversation_of` accepts was read as, as the end of a sentence, such as `from the field prompt`.

    Fields that belong to a prompt and are not read stand at its end, such as `without their tools`.
    """
    if isinstance(row, str):
        return "as texts"
    if not isinstance(row, Mapping):
        return "as lists of messages"
    fields = cast("Mapping[str, Any]", row)
    unread = " and ".join(name for name in UNREAD if _holds(fields, name))
    return f"{_form(_named(fields))} without their {unread}" if unread else _form(_named(fields))


def _holds(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row, or a request inside it, has a field that holds something."""
    rows = [row]
    while rows:
        one = rows.pop()
        if one.get(name) not in (None, "", [], {}, "[]"):
            return True
        rows += [inside for wrapper in WRAPPERS if isinstance(inside := _parsed(one.get(wrapper)), Mapping)]
    return False


def _parsed(request: Any) -> Any:
    """A request, which logs also write as text. Raises ValueError or RecursionError for text that is no JSON."""
    return json.loads(request) if isinstance(request, str) and request.lstrip().startswith("{") else request


def _form(fields: Mapping[str, Any]) -> str:
    """What a row with these fields is read as."""
    chat = next((name for name in CHATS if fields.get(name) not in (None, [], "")), None)
    wrapper = next((name for name in WRAPPERS if name in fields), None)
    if wrapper is not None and not any(one in fields for one in CHATS):
        return "from the object row" if wrapper == "row" else "as logged requests"
    if chat is not None:
        return f"as conversations in the field {chat}"
    name = "chosen" if "chosen" in fields else next((name for name in FIELDS if name in fields), "")
    beside = "input" if name == "instruction" and fields.get("input") else ""
    return f"from the fields {name} and {beside}" if beside else f"from the field {name}"


def _silent(turns: list[Turn]) -> str:
    """Why these turns ask nothing."""
    if len(turns) == 1 and turns[0].role == "user":
        return "the prompt is empty"
    return "every message before the answer is empty" if turns else "there is no message before the answer"


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are read and hold something; a table may write their names with capitals or spaces."""
    plain = {str(name).strip().lower(): value for name, value in row.items() if value is not None}
    return {name: value for name, value in plain.items() if name in READ} | {
        name: row[name] for name in READ if row.get(name) is not None
    }


def _request(fields: dict[str, Any]) -> _Read | None:
    """What a logged request asks, and what its response says; None for other rows."""
    name = next((name for name in WRAPPERS if name in fields), None)
    if name is None or any(one in fields for one in CHATS):
        return None
    try:
        request = _parsed(fields[name])
    except (ValueError, RecursionError):
        raise InvalidInput(f"{name} is text that is no JSON") from None
    if not isinstance(request, Mapping):
        return None
    asked = _named(cast("Mapping[str, Any]", request))
    turns, answer = _request(asked) or _row(asked)
    said = fields.get("response")
    return _Read(_with_system(asked, turns), answer if said is None else _said(said))


def _said(response: Any) -> str | None:
    """The text of a logged response: of chat completions, completions, the Responses API or Anthropic's messages."""
    if isinstance(response, str) and not response.lstrip().startswith("{"):
        return unicode_text(response, "response")
    if isinstance(response, str):
        try:
            response = json.loads(response)
        except (ValueError, RecursionError):
            return unicode_text(response, "response")
    if not isinstance(response, Mapping):
        raise InvalidInput(f"response is {in_words(response)}; text or an object is expected")
    said = cast("Mapping[str, Any]", response)
    if isinstance(body := said.get("body"), Mapping):
        said = cast("Mapping[str, Any]", body)
    choices = said.get("choices")
    if isinstance(choices, list) and choices:
        first = cast("list[Any]", choices)[0]
        choice = cast("Mapping[str, Any]", first if isinstance(first, Mapping) else {})
        found = turns_of([choice["message"]], "message") if choice.get("message") is not None else []
        return found[0].text if found else None if choice.get("text") is None else text_of(choice["text"], "text")
    if isinstance(said.get("output"), list):
        written = [one for one in cast("list[Any]", said["output"]) if is_message(one)]
        return "\n".join(turn.text for turn in turns_of(written, "output") if turn.text) or None
    content = next((said[name] for name in TEXT_KEYS if said.get(name) is not None), None)
    return None if content is None else text_of(content, "content")


def _with_system(fields: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns after the system prompt that stands beside them. Where they begin with another one, both are one message."""
    name = next((name for name in SYSTEM if fields.get(name)), None)
    text = "" if name is None else text_of(fields[name], name)
    if not text.strip():
        return turns
    if not turns or turns[0].role != "system":
        return [Turn("system", text), *turns]
    inner = turns[0].text
    return turns if text.strip() in inner else [Turn("system", f"{text}\n\n{inner}"), *turns[1:]]


def _asked_by_user(row: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise InvalidInput for a row that is one message of somebody else than the user, as OpenAssistant's tables hold them."""
    if any(name in fields for name in (*CHATS, *WRAPPERS, *FIELDS) if name != "text") or not is_message(row):
        return
    author = role_of(str(next((row[name] for name in ROLE_KEYS if row.get(name)), "")))
    if author in AUTHORS and author != "user":
        raise InvalidInput(f"one message of the {author}, without what it answers; a conversation is expected")


def _row(fields: Mapping[str, Any]) -> _Read:
    for name in CHATS:
        if fields.get(name) not in (None, [], ""):
            return _answered(turns_of(fields[name], name), fields)
    if fields.get("chosen") is not None:
        return _preferred(fields)
    name = next((name for name in FIELDS if name in fields), None)
    if name is None:
        what = next((f"{name} is empty and there are" for name in CHATS if name in fields), "")
        raise InvalidInput(f"{what} none of the fields messages, {', '.join(FIELDS)}".strip())
    value = fields[name]
    if isinstance(value, list) and any(map(is_message, cast("list[Any]", value))):
        return _answered(turns_of(value, name), fields)
    if isinstance(value, Mapping) and name in ("input", "inputs"):  # a trace: {"input": {"messages": […]}}
        asked = _named(cast("Mapping[str, Any]", value))
        turns, _ = _row(asked)
        return _answered(_with_system(asked, turns), fields)
    if isinstance(value, str) and (messages := _messages_in(value)) is not None:
        return _answered(turns_of(messages, name), fields)
    if (
        isinstance(value, list)
        and len(texts := cast("list[Any]", value)) > 1
        and all(isinstance(x, str) for x in texts)
    ):
        raise InvalidInput(f"{name} holds {len(texts)} prompts; one is expected")
    asking = JOINED.get(name, lambda text, _: text)(text_of(value, name), fields)
    return _answered([*_history(fields), Turn("user", asking)], fields)


def _messages_in(text: str) -> list[Any] | None:
    """The messages that a text holds as JSON, as a table keeps them; None for any other text."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(map(is_message, cast("list[Any]", found))) else None


def _answered(turns: list[Turn], fields: Mapping[str, Any]) -> _Read:
    """Take the answer from its own field, or else from the end of the conversation."""
    name = next((name for name in ANSWERS if name in fields), None)
    if name is None:
        return _Read(turns[:-1], turns[-1].text) if turns and turns[-1].role == "assistant" else _Read(turns, None)
    value = fields[name]
    if isinstance(value, list) and any(map(is_message, cast("list[Any]", value))):
        *between, last = turns_of(value, name)
        return _Read([*turns, *between], last.text)
    answer = _said(value) if isinstance(value, Mapping) else said_of(value, name)
    if turns and turns[-1].role == "assistant" and answer in (None, turns[-1].text):
        answer = turns.pop().text
    return _Read(turns, answer)


def _preferred(fields: Mapping[str, Any]) -> _Read:
    """The better side of a pair of answers, with the prompt that stands beside it or at its beginning."""
    chosen = fields["chosen"]
    if isinstance(chosen, Mapping):
        chosen = [chosen]
    asked = next((name for name in FIELDS if name in fields), None)
    turns = (
        [] if asked is None else _row({name: fields[name] for name in fields if name not in ("chosen", *ANSWERS)}).turns
    )
    if isinstance(chosen, list):
        found = turns_of(chosen, "chosen")
        whole = found if any(turn.role == "user" for turn in found) else [*turns, *found]
    else:
        text = text_of(chosen, "chosen")
        whole = [*turns, Turn("assistant", text)] if turns else _transcript(text)
    return _answered(whole, {})


def _transcript(text: str) -> list[Turn]:
    """The turns of a text such as HH-RLHF's: `Human: …`, an empty line, `Assistant: …`."""
    parts = SPEAKER.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise InvalidInput("chosen is text without a prompt beside it, and no transcript of Human and Assistant")
    names = {"Human": "user", "Assistant": "assistant", "System": "system"}
    return [Turn(names[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _history(fields: Mapping[str, Any]) -> list[Turn]:
    """Earlier turns beside a prompt: pairs of question and answer, as LLaMA-Factory writes them, or messages."""
    history = fields.get("history")
    if not history:
        return []
    if not isinstance(history, list) or any(map(is_message, cast("list[Any]", history))):
        return turns_of(history, "history")
    turns: list[Turn] = []
    for number, pair in enumerate(cast("list[Any]", history), 1):
        if not isinstance(pair, list) or len(cast("list[Any]", pair)) != 2:
            raise InvalidInput(f"pair {number} of its history is no question and answer")
        asked, said = (text_of(one, f"pair {number} of its history") for one in cast("list[Any]", pair))
        turns += [Turn("user", asked), Turn("assistant", said)]
    return turns


def _with_input(text: str, fields: Mapping[str, Any]) -> str:
    """An instruction with its input, as Alpaca's template joins them; Dolly calls the input a context."""
    name = next((name for name in ("input", "context") if fields.get(name)), None)
    given = "" if name is None else text_of(fields[name], name)
    return f"{text}\n\n### Input:\n{given}" if text.strip() and given.strip() else text if text.strip() else given


def _with_choices(text: str, fields: Mapping[str, Any]) -> str:
    """A question after the passage that it is about, and with the answers to choose from."""
    passage = text_of(fields["context"], "context") if fields.get("context") else ""
    given = next((fields[name] for name in ("choices", "options") if fields.get(name)), [])
    if isinstance(given, Mapping):  # of ARC: {"text": ["3", "4"], "label": ["A", "B"]}
        given = cast("Mapping[str, Any]", given).get("text")
    listed = given if isinstance(given, list) else []
    lines = [f"{chr(65 + i)}. {said_of(one, 'choices')}" for i, one in enumerate(cast("list[Any]", listed)[:26])]
    return "\n".join([f"{passage}\n\n{text}" if passage.strip() else text, *lines])


def _with_passage(text: str, fields: Mapping[str, Any]) -> str:
    """A behaviour of HarmBench after its context, as its harness puts them together (Mazeika et al., arXiv 2402.04249)."""
    about = text_of(fields["contextstring"], "ContextString").strip() if fields.get("contextstring") else ""
    return f"{about}\n\n---\n\n{text.strip()}" if about else text


JOINED: Mapping[str, Callable[[str, Mapping[str, Any]], str]] = {
    "instruction": _with_input, "question": _with_choices, "query": _with_choices, "behavior": _with_passage,
}  # fmt: skip
"""What is read together with a prompt, by the field of the prompt."""
