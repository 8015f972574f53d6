"""The role of each token of a conversation: system, user, assistant, tool, or the template around them.

The chat template runs a second time with a mark on either side of every message. The marks in its output show where each
message stands, whatever its content: a message such as `<|im_start|>assistant`, or just `user`, keeps the role of its
author. A monitor that counts turns instead would give the assistant's role to anyone who writes a marker into a prompt.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.model.context import ContextLength, fitted
from molehunt.traffic.chat import messages_text
from molehunt.traffic.turn import AUTHORS, Turn

ROLES = ("template", *AUTHORS)
"""Names of the roles; a role's number is its index. `template` is markers, role headers, BOS and other template text."""
RENDERINGS = 64
"""Greatest number of renderings of one conversation. A message that the template changes when it is marked takes several."""


@dataclass(frozen=True, eq=False, slots=True)
class RoledTokens:
    """Token ids of a conversation, and the role of each."""

    ids: tuple[int, ...]
    roles: Int8[Tensor, " tokens"]
    """Index in `ROLES` of each token's role, on the CPU."""
    decision: int
    """Position of the last prompt token: the model's output there is the first token of its answer."""
    complete: bool = True
    """Whether every message is in the text unchanged, except for white space at its ends. Otherwise the template dropped,
    cut or rewrote a message, and the rest of it may count as `template`: do not treat such tokens as harmless."""
    left_out: int = 0
    """Number of tokens by which the conversation was cut before, because the model cannot read all of it."""

    def where(self, *roles: str) -> Bool[Tensor, " tokens"]:
        """A mask that is True at the tokens of these roles. Raises ValueError for a role that is not in `ROLES`."""
        return torch.isin(self.roles, torch.tensor([ROLES.index(role) for role in roles], dtype=torch.int8))


class _MessageSpan(NamedTuple):
    turn: int
    start: int
    end: int


def roled_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Turn],
    *,
    add_generation_prompt: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> RoledTokens:
    """Token ids of a whole conversation in the tokenizer's chat template (Alpaca if it has none), with their roles.

    For one user turn the ids are equal to `chat.prompt_ids`. A token that spans a message and a marker belongs to the
    message; a token that spans two messages belongs to the first. White space at the ends of a message belongs to the
    message if the template preserves it. Text that a template rewrites in place (such as a tool's answer, escaped to
    JSON) keeps its role.

    Args:
        tokenizer: a fast tokenizer, which reports the characters of each token.
        messages: the turns of the conversation.
        add_generation_prompt: whether to end with the header of the next answer.
        settings: values for names that the template reads, such as `enable_thinking`.

    Raises:
        UsageError: the tokenizer has no offsets, because it is not from the `tokenizers` library.
        InvalidInput: the template refuses the conversation, or the text cannot be encoded as UTF-8.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {printable(tokenizer.name_or_path)} does not say which characters a token covers, so no "
            "token can be given a role.\nUse a folder with a tokenizer.json."
        )

    def render(turns: Sequence[Turn]) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return messages_text(tokenizer, messages, add_generation_prompt=add_generation_prompt, settings=settings)

    text = render(messages)
    try:
        key = sha256(text.encode()).hexdigest()[:32]
    except UnicodeEncodeError:
        raise InvalidInput("the conversation holds half of a surrogate pair, which is no text") from None
    spans, complete = _located(render, messages, text, key)
    owner = bytearray(len(text))
    for span in spans:
        owner[span.start : span.end] = bytes([ROLES.index(messages[span.turn].role)]) * (span.end - span.start)

    # a template writes its own BOS; without a template the tokenizer adds it, as in `chat.prompt_ids`
    encoded: Any = tokenizer(
        text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = list(encoded["input_ids"])
    if not ids:
        raise InvalidInput(f"the chat template of {printable(tokenizer.name_or_path)} makes no text of a conversation")
    covered = _untrimmed(encoded["offset_mapping"], tokenizer.convert_ids_to_tokens(ids))
    roles = [next(filter(None, owner[start:end]), 0) for start, end in covered]
    return RoledTokens(tuple(ids), torch.tensor(roles, dtype=torch.int8), len(ids) - 1, complete)


def fitted_prompt(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], context: ContextLength, *, room: int
) -> RoledTokens:
    """As `roled_prompt`, cut by the rule of `model/context.py` where it leaves no `room` tokens for its answer.

    Raises as `roled_prompt`.
    """
    whole = sum(len(turn.text.encode(errors="replace")) for turn in turns)
    if whole > (context.tokens - room) // 2:  # no tokenizer makes more tokens than a text has bytes
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        fit = fitted(tokenizer, messages, context, room=room)
        if fit.left_out:
            kept = [Turn(one["role"], one["content"]) for one in cast("list[Mapping[str, str]]", fit.text)]
            cut = roled_prompt(tokenizer, kept)
            n = len(cut.ids) - len(fit.ids)  # only where one turn alone is too long for its template
            return replace(cut, ids=cut.ids[n:], roles=cut.roles[n:], decision=cut.decision - n, left_out=fit.left_out)
    return roled_prompt(tokenizer, turns)


def with_answer(roled: RoledTokens, answer_ids: Sequence[int]) -> RoledTokens:
    """The same conversation, followed by the tokens of an answer with the role assistant. `decision` does not change."""
    answer = torch.full((len(answer_ids),), ROLES.index("assistant"), dtype=torch.int8)
    return replace(roled, ids=(*roled.ids, *answer_ids), roles=torch.cat([roled.roles, answer]))


def sinks(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Positions that are not scored: the first token, and each BOS that follows it directly.

    They carry attention, not content (Sun et al., arXiv 2402.17762). A later BOS is part of a message, and is scored.
    """
    last = 1
    while last < len(ids) and ids[last] == tokenizer.bos_token_id:
        last += 1
    return tuple(range(min(last, len(ids))))


def _located(
    render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn], text: str, key: str
) -> tuple[list[_MessageSpan], bool]:
    """The span of each message in `text`, and whether all messages are unchanged.

    `key` is text that no message can contain: the hash of all of them.
    """
    parts = [_parts(turn.text) for turn in turns]
    found: list[_MessageSpan] = []
    verbatim: set[int] = set()
    waiting = deque([[i for i, turn in enumerate(turns) if turn.text]])
    left = RENDERINGS
    while waiting and left > 0:
        some = waiting.popleft()
        left -= 2
        plain, spans = _marked_rendering(render, turns, parts, some, key, ends=True)
        if plain != text:  # the template depends on the beginning or the length of one of these messages
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
    """A message in three parts, because many templates strip the white space at its ends."""

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
) -> tuple[str, list[_MessageSpan]]:
    """Render the conversation with marks around `some` of its messages; return the text without the marks, and their spans.

    Args:
        ends: whether to keep the white space at the ends of the marked messages, outside the marks, so that a template
            strips the same white space as without marks.
    """
    marked = list(turns)
    for i in some:
        lead, core, trail = parts[i] if ends else _Parts("", parts[i].core, "")
        marked[i] = Turn(turns[i].role, f"{lead}{key}{i}b{core}{key}{i}e{trail}")
    try:
        rendered = render(marked)
    except InvalidInput:
        return "", []
    plain: list[str] = []
    spans: list[_MessageSpan] = []
    opened = _MessageSpan(-1, 0, 0)
    length = at = 0
    for mark in re.finditer(rf"{key}(\d+)([be])", rendered):
        plain.append(rendered[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        if mark[2] == "b":
            opened = _MessageSpan(int(mark[1]), length, length)
        elif opened.turn == int(mark[1]):
            spans.append(opened._replace(end=length))
            opened = _MessageSpan(-1, 0, 0)
    return "".join([*plain, rendered[at:]]), spans


def _widened(
    text: str, spans: list[_MessageSpan], bare_text: str, bare: list[_MessageSpan], parts: Sequence[_Parts]
) -> list[_MessageSpan]:
    """`spans`, extended by the white space at the ends of the messages that the template preserves.

    The text between two messages is compared with the text there (`bare`) when the messages have no such white space.
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


def _gap(text: str, spans: Sequence[_MessageSpan], k: int) -> str:
    """The text between the `k`-th span and the one before it."""
    return text[spans[k - 1].end if k else 0 : spans[k].start if k < len(spans) else len(text)]


def _untrimmed(offsets: Sequence[tuple[int, int]], tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The characters of each token, with the spaces that tokenizers such as Llama 3's leave out of their offsets."""
    done = 0
    for i, ((start, end), token) in enumerate(zip(offsets, tokens, strict=True)):
        spaced = token.replace("Ġ", " ")
        start = max(start - len(spaced) + len(spaced.lstrip()), min(start, done))
        if spaced.strip() and i + 1 < len(offsets):  # of spaces alone, only the start is moved
            end = max(end, min(end + len(spaced) - len(spaced.rstrip()), offsets[i + 1][0]))
        done = max(done, end)
        yield start, end
