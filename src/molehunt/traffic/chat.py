"""From a prompt to the input of a model: in the tokenizer's chat template, or in Alpaca markers if it has none.

Templates run in the sandbox of `checkpoint.template_sandbox` with its limits, and never in that of transformers, which
has none; the text is the same. To a template that asks for it, the day is `checkpoint.chat_template.TODAY`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from molehunt.checkpoint.chat_template import DEFAULT, JINJA, program
from molehunt.errors import InvalidInput, printable

TOKENS = "template_tokens"
"""Attribute of a tokenizer that holds the special tokens for its template, where another folder than its own brings it."""
ALPACA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}\n\n"
    "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""The Alpaca markers as a chat template, without the preamble sentence."""


def render_alpaca(prompt: str, response: str | None = None) -> str:
    """`prompt` in the Alpaca markers, up to where the answer starts or with the answer."""
    return f"### Instruction:\n{prompt}\n\n### Response:\n{response or ''}"


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """One user turn in the chat template, up to where the answer starts. Raises InvalidInput if the template refuses it."""
    if not tokenizer.chat_template:
        return render_alpaca(prompt)
    return messages_text(tokenizer, [{"role": "user", "content": prompt}])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of one user turn, ready for the answer to be generated.

    The last id is the decision position: the model's output there is the first token of its answer.
    """
    text = prompt_text(tokenizer, prompt)
    encoded = tokenizer(
        text, add_special_tokens=not tokenizer.chat_template, verbose=False
    )  # a template writes its own
    return list(encoded["input_ids"])  # pyright: ignore[reportArgumentType]


Message = Mapping[str, Any]
"""One message of a conversation as chat libraries write it: `{"role": "user", "content": "…"}`."""
Text = str | Message | Sequence[Message]
"""Input of a model: the text of one user turn, or the messages of a whole conversation; or an object that holds one of them
under `prompt` or `messages`."""


def text_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Token ids of one user turn or of a whole conversation, up to where the answer starts.

    Args:
        tokenizer: renders the chat template; Alpaca markers are used if it has none.
        text: a string is one user turn; a sequence of messages is a conversation that ends before the answer.

    Raises:
        InvalidInput: the text is none of these, a message lacks its role or content, or the template refuses the conversation.
    """
    if isinstance(text, Mapping):
        text = cast("Text", text["messages"] if "messages" in text else text.get("prompt", text))
    if isinstance(text, str):
        return prompt_ids(tokenizer, text)
    messages = _messages(text)
    encoded = tokenizer(
        messages_text(tokenizer, messages), add_special_tokens=not tokenizer.chat_template, verbose=False
    )
    return list(encoded["input_ids"])  # pyright: ignore[reportArgumentType]


def rendered(tokenizer: PreTrainedTokenizerBase, text: Text) -> str:
    """One user turn or a whole conversation in the chat template, up to where the answer starts. Raises as `text_ids`."""
    if isinstance(text, Mapping):
        text = cast("Text", text["messages"] if "messages" in text else text.get("prompt", text))
    return prompt_text(tokenizer, text) if isinstance(text, str) else messages_text(tokenizer, _messages(text))


def _messages(text: object) -> list[Message]:
    """The messages of a conversation. Raises InvalidInput for anything else."""
    if isinstance(text, Sequence) and not isinstance(text, str):
        messages = list(cast("Sequence[object]", text))
        if all(isinstance(message, Mapping) for message in messages):
            return cast("list[Message]", messages)
    name = type(text).__name__
    kind = "None" if text is None else f"{printable(repr(text), 80)}, {'an' if name[0] in 'aeiou' else 'a'} {name}"
    raise InvalidInput(
        f"a text is a string or a list of messages, such as [{{'role': 'user', 'content': 'Hello'}}]; this is {kind}"
    )


def messages_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """A conversation in the tokenizer's chat template, or in the Alpaca markers if it has none.

    `settings` are values for names that the template reads, such as `enable_thinking`.

    Raises:
        InvalidInput: a message lacks its role or content, or the template refuses the conversation.
    """
    turns = [dict(message) for message in messages]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn.get("role"), str) or not _has_content(turn):
            raise InvalidInput(
                f"message {number} is {printable(repr(turn), 80)}; a message has a role and a content, "
                'such as {"role": "user", "content": "What is 2 plus 2?"}.'
            )
    template = default_template(tokenizer)
    try:
        if not turns:
            raise ValueError("there is no message")
        tokens = getattr(tokenizer, TOKENS, None)
        if tokens is None:
            tokens = tokenizer.special_tokens_map
        made = program(template or ALPACA_TEMPLATE)
        values: dict[str, Any] = {**(settings or {}), "add_generation_prompt": add_generation_prompt}
        return made.text(turns, tokens, **values)
    except Exception as error:  # a template is an untrusted program, and may raise any exception
        roles = printable(", ".join(turn["role"] for turn in turns))
        raise InvalidInput(
            f"the chat template of {printable(tokenizer.name_or_path)} refuses a conversation of the roles "
            f"{roles or '(none)'}:\n{type(error).__name__}: {printable(str(error), 200)}"
        ) from error


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that a tokenizer uses, or None if it has none. Raises InvalidInput if it has only named ones."""
    found: object = tokenizer.chat_template
    if isinstance(found, Mapping):
        named = cast("Mapping[str, str]", found)
        if DEFAULT not in named:
            raise InvalidInput(
                f"{printable(tokenizer.name_or_path)} has the chat templates {printable(', '.join(named), 80)}, and none "
                f"that is called {DEFAULT}: nobody can know which one is meant.\nSave the right one as {JINJA}."
            )
        return named[DEFAULT]
    return found if isinstance(found, str) and found else None


def _has_content(turn: Message) -> bool:
    """Whether a message holds text, parts, or a call of a tool in their place."""
    content: object = turn.get("content")
    if isinstance(content, list):
        return all(isinstance(part, str | Mapping) for part in cast("list[object]", content))
    return isinstance(content, str) or (content is None and bool(turn.get("tool_calls")))


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text | Sequence[int],
    encode: Callable[[Text], list[int]] | None = None,
) -> list[int]:
    """Token ids of a prompt that is token ids already, or a text or conversation: `encode` makes them, by default `text_ids`."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
        return list(cast("Sequence[int]", prompt))
    return text_ids(tokenizer, cast("Text", prompt)) if encode is None else encode(cast("Text", prompt))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str | Sequence[int]) -> list[int]:
    """Token ids of an answer that is text, without special tokens, or token ids already."""
    return tokenizer.encode(answer, add_special_tokens=False) if isinstance(answer, str) else list(answer)
