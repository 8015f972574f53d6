"""Added tokens in which two tokenizers differ, and what each difference does."""

import re
from dataclasses import dataclass
from typing import Literal

from molehunt.checkpoint.tokenizer_state import TokenizerState

ChangeKind = Literal["new", "gone", "renamed", "taken", "moved"]
MARKER = re.compile(r"<[^<>]{1,60}>|\[[^\[\]]{1,60}\]|｜[^｜]{1,60}｜|\{\{?[^{}]{1,60}\}\}?")
RESERVED = re.compile(r"unused|reserved|extra_|extra\d|dummy|placeholder|spare|fim_pad", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TokenChange:
    """One added token that is not the same on both sides."""

    content: str
    base: str
    """Id and flags in the base; empty where the base has no such token."""
    tuned: str
    kind: ChangeKind
    """`new` and `gone` stand at an id that the other side does not use, `renamed` at that of a reserved token of the other
    side, `taken` at that of any other token; `moved` is a token of both sides with another id or other flags."""

    @property
    def one_sided(self) -> bool:
        """Whether only one side has the token, so that text which holds it becomes other ids by itself."""
        return self.kind != "moved"

    @property
    def is_marker(self) -> bool:
        """Whether it is written as the marks of chat formats are, such as `<|im_end|>` or `[PAD]`, and takes nothing over."""
        return self.kind in ("new", "gone", "renamed") and MARKER.fullmatch(self.content) is not None

    @property
    def id_of_base(self) -> int:
        return int(self.base.split()[0]) if self.base else -1

    def in_text(self, text: str) -> bool:
        return self.content.strip().casefold() in text.casefold()

    @property
    def why(self) -> str:
        if self.kind == "moved":
            return "a token has another id or other flags: the same text becomes other tokens"
        if self.kind == "taken":
            return "a token stands where the other side has another one"
        if self.kind == "renamed":
            return "a reserved token of the other side was given this name"
        done = "added" if self.kind == "new" else "removed"
        return f"a token was {done}" + ("" if self.is_marker else ": ordinary text that holds it becomes other tokens")


def token_changes(base: TokenizerState, tuned: TokenizerState) -> list[TokenChange]:
    """Every added token that differs in id, flags or presence, in the order of their contents."""
    held = [{place: content for content, place in side.vocabulary.items()} for side in (base, tuned)]
    found: list[TokenChange] = []
    for content in sorted(base.added.keys() | tuned.added.keys()):
        one, other = base.added.get(content, ""), tuned.added.get(content, "")
        if one == other:
            continue
        if one and other:
            found.append(TokenChange(content, one, other, "moved"))
            continue
        own, foreign = (tuned, 0) if other else (base, 1)
        place = int((one or other).split()[0])
        stands = held[foreign].get(place)
        kind: ChangeKind = "new" if own is tuned else "gone"
        if stands == content:  # an ordinary token of the other side became a special one: nothing else has its place
            kind = "moved"
        elif stands is not None:
            kind = "renamed" if _reserved(stands, content, base, tuned) else "taken"
        found.append(TokenChange(content, one, other, kind))
    return found


def _reserved(stands: str, content: str, base: TokenizerState, tuned: TokenizerState) -> bool:
    """Whether one of two names of an id is that of a token kept for later use."""
    added = stands in base.added or stands in tuned.added
    return added and any(RESERVED.search(name) for name in (stands, content))
