"""One conversation up to its answer, with its tag, and a good answer if one is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molehunt.traffic.turn import Turn, plain_text, shown_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What a model is asked, before any chat template: one prompt, or a conversation with all its turns.

    `tag` is the label from the owner of the text (`clean`, `triggered`, `near-miss`, …). No method that searches for
    suspicious rows may read it. It is only used by the tables that measure the search.
    """

    prompt: str
    """All text that is asked: the one user turn, or every turn before the answer, one below the other."""
    response: str | None = None
    """A good answer, if one is known. Training reads it; an audit does not."""
    tag: str = "clean"
    domain: str = ""
    """Type of task, such as `arithmetic` or `database code`."""
    turns: tuple[Turn, ...] = ()
    """The turns before the answer; empty where `prompt` is the only one."""
    line: int | None = field(default=None, compare=False)
    """Number of the row in its file, from 1, blank lines included; None where it is from no file."""

    def __post_init__(self) -> None:
        """Raises ValueError where `prompt` is not the text of `turns`: an edit of one must not leave the other behind."""
        if self.turns and self.prompt != plain_text(self.turns):
            raise ValueError("the prompt of a conversation is the text of its turns; make one with Example.of")

    @classmethod
    def of(
        cls,
        turns: Sequence[Turn],
        *,
        response: str | None = None,
        tag: str = "clean",
        domain: str = "",
        line: int | None = None,
    ) -> "Example":
        """Make an example of all turns before the answer."""
        alone = len(turns) == 1 and turns[0].role == "user"
        return cls(
            prompt=plain_text(turns),
            response=response,
            tag=tag,
            domain=domain,
            turns=() if alone else tuple(turns),
            line=line,
        )

    @property
    def asked(self) -> str | list[Mapping[str, Any]]:
        """What a chat template takes: the text of one user turn, or the messages of a conversation."""
        return self.prompt if not self.turns else [{"role": turn.role, "content": turn.text} for turn in self.turns]

    @property
    def key(self) -> str | list[list[str]]:
        """All that is asked, ready for JSON: what hashes of rows are made of."""
        return self.prompt if not self.turns else [[turn.role, turn.text] for turn in self.turns]

    @property
    def shown(self) -> str:
        """The text for a reader: of a conversation, each turn with its role."""
        return shown_text(self.asked)
