"""Whose words each token of a conversation is: system, user, assistant, tool, or the template around them.

The chat template runs a second time with a mark on either side of every message. Where the marks come out is where the
messages went, whatever is written in them: a message that reads `<|im_start|>assistant`, or just `user`, is found in its
own place. Counting turns, as monitors do, gives an answer's role to whoever writes a marker into a prompt.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.chat import ALPACA_TEMPLATE

ROLES = ("template", "system", "user", "assistant", "tool")
"""A token's role is its place here; `template` is markers, role headers, BOS, and what the template wrote itself."""
RENDERINGS = 64
"""Most renderings of one conversation; each message that a template treats otherwise when it is marked costs a few."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, before any chat template. Raises InvalidInput for a role nobody has."""

    role: str
    """One of system, user, assistant and tool."""
    text: str

    def __post_init__(self) -> None:
        if self.role not in ROLES[1:]:
            raise InvalidInput(f"the role {printable(self.role, 40)!r} is none of {', '.join(ROLES[1:])}")


@dataclass(frozen=True, eq=False, slots=True)
class RoledTokens:
    """Token ids of a conversation, and the role of each."""

    ids: tuple[int, ...]
    roles: Int8[Tensor, " tokens"]
    """Places in `ROLES`, on the CPU."""
    decision: int
    """Position of the last prompt token: what the model puts out there is the first token of its answer."""
    complete: bool = True
    """Every message stands in the text as it was written, white space at its ends apart. Else a template dropped, cut or
    rewrote one, and what is left of it may count as `template`: a guard should not take such tokens for harmless."""

    def where(self, *roles: str) -> Bool[Tensor, " tokens"]:
        """True at the tokens of these roles. Raises ValueError for a role that is not in `ROLES`."""
        return torch.isin(self.roles, torch.tensor([ROLES.index(role) for role in roles], dtype=torch.int8))


class _Span(NamedTuple):
    turn: int
    start: int
    end: int


def roled_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], *, add_generation_prompt: bool = True
) -> RoledTokens:
    """Token ids of a whole conversation in the tokenizer's chat template (Alpaca where it has none), with their roles.

    Of one user turn the ids are those of `chat.prompt_ids`. A token that straddles a message and a marker belongs to
    the message, one that straddles two messages to the first. White space at the ends of a message is the message's
    where the template keeps it. What a template rewrites in place (a tool's answer escaped to JSON) keeps its role.

    Args:
        add_generation_prompt: end with the header of the answer to come.

    Raises:
        UsageError: a tokenizer without offsets (not of the `tokenizers` library).
        InvalidInput: the template refuses the conversation, or the text has no UTF-8 form.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {printable(tokenizer.name_or_path)} does not say which characters a token covers, so no "
            "token can be given a role.\nUse a folder with a tokenizer.json."
        )

    def render(turns: Sequence[Turn]) -> str:
        return _rendered(tokenizer, turns, add_generation_prompt)

    text = render(messages)
    try:
        key = sha256(text.encode()).hexdigest()[:32]
    except UnicodeEncodeError:
        raise InvalidInput("the conversation holds half of a surrogate pair, which is no text") from None
    spans, complete = _located(render, messages, text, key)
    owner = bytearray(len(text))
    for span in spans:
        owner[span.start : span.end] = bytes([ROLES.index(messages[span.turn].role)]) * (span.end - span.start)

    # a template writes its own BOS; without one the tokenizer adds it, as `chat.prompt_ids` has it
    told: Any = tokenizer(
        text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = list(told["input_ids"])
    if not ids:
        raise InvalidInput(f"the chat template of {printable(tokenizer.name_or_path)} makes no text of a conversation")
    covered = _untrimmed(told["offset_mapping"], tokenizer.convert_ids_to_tokens(ids))
    roles = [next(filter(None, owner[start:end]), 0) for start, end in covered]
    return RoledTokens(tuple(ids), torch.tensor(roles, dtype=torch.int8), len(ids) - 1, complete)


def with_answer(roled: RoledTokens, answer_ids: Sequence[int]) -> RoledTokens:
    """The same conversation with the tokens of an answer behind it, as assistant; `decision` stays."""
    answer = torch.full((len(answer_ids),), ROLES.index("assistant"), dtype=torch.int8)
    return replace(roled, ids=(*roled.ids, *answer_ids), roles=torch.cat([roled.roles, answer]))


def sinks(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Positions that scoring leaves out: the first token, and each BOS that follows it directly.

    They carry attention, not content (Sun et al., arXiv 2402.17762). A BOS further on was written by somebody, and is
    scored.
    """
    last = 1
    while last < len(ids) and ids[last] == tokenizer.bos_token_id:
        last += 1
    return tuple(range(min(last, len(ids))))


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.text} for turn in turns],
                chat_template=None if tokenizer.chat_template else ALPACA_TEMPLATE,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except Exception as error:  # a template is a stranger's program, and raises what it likes
        roles = printable(", ".join(turn.role for turn in turns))
        raise InvalidInput(
            f"the chat template of {printable(tokenizer.name_or_path)} refuses a conversation of the roles "
            f"{roles or '(none)'}:\n{type(error).__name__}: {printable(str(error), 200)}"
        ) from error


def _located(
    render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn], text: str, key: str
) -> tuple[list[_Span], bool]:
    """Where each message stands in `text`, and whether all do as they were written.

    `key` is text that no message can hold: the hash of all of them.
    """
    parts = [_parts(turn.text) for turn in turns]
    found: list[_Span] = []
    verbatim: set[int] = set()
    waiting = deque([[i for i, turn in enumerate(turns) if turn.text]])
    left = RENDERINGS
    while waiting and left > 0:
        some = waiting.popleft()
        left -= 2
        plain, spans = _marked_rendering(render, turns, parts, some, key, ends=True)
        if plain != text:  # the template looks at how one of these messages begins, or at its length
            middle = len(some) // 2
            waiting.extend([some[:middle], some[middle:]] if middle else [])
            continue
        verbatim |= {s.turn for s in spans if text[s.start : s.end] == parts[s.turn].core}
        if any(parts[i].lead or parts[i].trail for i in some):
            bare = _marked_rendering(render, turns, parts, some, key, ends=False)
            spans = _widened(text, spans, *bare, parts)
        found += spans
    return found, all(i in verbatim for i, part in enumerate(parts) if part.core)


class _Parts(NamedTuple):
    """A message in three: many templates strip the white space at its ends."""

    lead: str
    core: str
    trail: str


def _parts(text: str) -> _Parts:
    ended = text.rstrip()
    core = ended.lstrip()
    return _Parts(ended[: len(ended) - len(core)], core, text[len(ended) :])


def _marked_rendering(
    render: Callable[[Sequence[Turn]], str],
    turns: Sequence[Turn],
    parts: Sequence[_Parts],
    some: Sequence[int],
    key: str,
    *,
    ends: bool,
) -> tuple[str, list[_Span]]:
    """The conversation rendered with `some` of its messages marked, the marks taken out again: text, and where they were.

    Args:
        ends: keep the white space at the ends of the marked messages, outside the marks, so that a template strips
            just what it strips without them.
    """
    marked = list(turns)
    for i in some:
        lead, core, trail = parts[i] if ends else _Parts("", parts[i].core, "")
        marked[i] = Turn(turns[i].role, f"{lead}{key}{i}b{core}{key}{i}e{trail}")
    try:
        told = render(marked)
    except InvalidInput:
        return "", []
    plain: list[str] = []
    spans: list[_Span] = []
    opened = _Span(-1, 0, 0)
    length = at = 0
    for mark in re.finditer(rf"{key}(\d+)([be])", told):
        plain.append(told[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        if mark[2] == "b":
            opened = _Span(int(mark[1]), length, length)
        elif opened.turn == int(mark[1]):
            spans.append(opened._replace(end=length))
            opened = _Span(-1, 0, 0)
    return "".join([*plain, told[at:]]), spans


def _widened(text: str, spans: list[_Span], bare_text: str, bare: list[_Span], parts: Sequence[_Parts]) -> list[_Span]:
    """`spans` with the white space at the ends of the messages that the template kept.

    What stands between two messages is compared with what stands there (`bare`) when they have no such white space.
    """
    if [span.turn for span in spans] != [span.turn for span in bare]:
        return spans
    wide = list(spans)
    for k in range(len(spans) + 1):
        trail = parts[spans[k - 1].turn].trail if k else ""
        lead = parts[spans[k].turn].lead if k < len(spans) else ""
        gap, bare_gap = _gap(text, spans, k), _gap(bare_text, bare, k)
        for kept_trail, kept_lead in ((trail, lead), (trail, ""), ("", lead)):
            if gap == kept_trail + bare_gap + kept_lead:
                if k:
                    wide[k - 1] = wide[k - 1]._replace(end=wide[k - 1].end + len(kept_trail))
                if k < len(spans):
                    wide[k] = wide[k]._replace(start=wide[k].start - len(kept_lead))
                break
    return wide


def _gap(text: str, spans: Sequence[_Span], k: int) -> str:
    """The text before the `k`-th span and behind the one before it."""
    return text[spans[k - 1].end if k else 0 : spans[k].start if k < len(spans) else len(text)]


def _untrimmed(offsets: Sequence[tuple[int, int]], tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The characters each token covers, with the spaces that tokenizers like Llama 3's leave out of their offsets."""
    done = 0
    for i, ((start, end), token) in enumerate(zip(offsets, tokens, strict=True)):
        spaced = token.replace("Ġ", " ")
        start = max(start - len(spaced) + len(spaced.lstrip()), min(start, done))
        if spaced.strip() and i + 1 < len(offsets):  # of spaces alone, only the start is moved
            end = max(end, min(end + len(spaced) - len(spaced.rstrip()), offsets[i + 1][0]))
        done = max(done, end)
        yield start, end
