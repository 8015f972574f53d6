"""One message of a conversation, and the names by which logs call its author."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molehunt.errors import InvalidInput, printable

AUTHORS = ("system", "user", "assistant", "tool")
"""Names of the roles of messages."""
ALIASES = {
    **dict.fromkeys(("developer", "system_prompt"), "system"),
    **dict.fromkeys(("human", "prompter", "customer", "question"), "user"),
    **dict.fromkeys(
        ("gpt", "bot", "model", "chatbot", "ai", "chatgpt", "bing", "bard", "claude", "agent"), "assistant"
    ),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # of LLaMA-Factory: a call is what the model wrote
    **dict.fromkeys(("function", "function_response", "tool_response", "observation", "ipython"), "tool"),
}
"""What other formats call a role: ShareGPT, OpenAssistant, Gemini, Cohere, LLaMA-Factory, Llama 3."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, before any chat template. Raises InvalidInput for an unknown role."""

    role: str
    """One of system, user, assistant and tool."""
    text: str

    def __post_init__(self) -> None:
        if self.role not in AUTHORS:
            raise InvalidInput(f"the role {printable(self.role, 40)!r} is none of {', '.join(AUTHORS)}")


def role_of(name: str) -> str:
    """The role that a log calls `name`; a name that no format uses stays as it is, for `Turn` to refuse."""
    plain = name.strip().lower()
    return plain if plain in AUTHORS else ALIASES.get(plain, name)


def shown_text(asked: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """What a model is asked, for a reader: the text of one user turn, or each message of a conversation with its role."""
    if isinstance(asked, str):
        return asked
    if isinstance(asked, Mapping):
        return shown_text(asked["messages"] if "messages" in asked else str(asked.get("prompt", "")))
    return "\n".join(f"[{one.get('role')}] {one.get('content')}" for one in asked)


def plain_text(turns: Iterable[Turn]) -> str:
    """The texts of all turns, one below the other: what statistics of words read."""
    return "\n".join(turn.text for turn in turns)
