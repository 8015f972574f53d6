"""How many tokens a model can read, and the one rule by which a longer prompt is cut.

A model with learned positions has a row for each position and ends behind the last. One whose positions are computed
(rotary and others) goes on behind the length that it was trained on, and deployments let it: such a prompt is read whole,
up to `BEYOND` times that length, and counted.

What is longer loses text in this order. Every message that is longer than its share keeps its beginning and its end, with
`GAP` between them; all shares are equal and as large as fits. Where they would fall below `LEAST_SHARE` tokens, the oldest
turns behind the system prompt are left out first. The template, every system message, the last turn and the room for the
answer stay.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.model.blocks import unwrapped
from molehunt.traffic.chat import Message, Text, text_ids

log = logging.getLogger(__name__)

BEYOND = 4
"""Times its trained length up to which a model with computed positions is read."""
LOGIT_BYTES = 2**30
"""Memory in bytes that the fp32 logits of one row may take."""
SMALLEST = 1024
"""Number of tokens that are read whatever their logits take."""
LEAST_SHARE = 24
"""Number of tokens that every message keeps before a whole turn is left out."""
GAP = "\n[…]\n"
"""Stands where a message was cut."""
WIDEST = 16
"""Characters per token that a message is taken to have at most before it is tokenized."""
TABLES = ("wpe", "embed_positions", "position_embeddings")
"""Names of tables with a row for each position, learned or, in GPT-J and CodeGen, computed once."""


@dataclass(frozen=True, slots=True)
class ContextLength:
    """How many tokens of prompt and answer a model reads."""

    tokens: int
    """The greatest number."""
    trained: int | None
    """The length that the model was trained on, or the number of its learned positions; None where the config says nothing."""
    ends: bool
    """Whether the model has no positions behind `tokens`."""


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt as a model reads it."""

    ids: tuple[int, ...]
    text: Text
    """What `ids` are made of: the given text, or what was left of it."""
    left_out: int
    """Number of tokens that were cut."""
    beyond: int
    """Number of tokens behind the length that the model was trained on, with the room for the answer."""


def context_of(model: nn.Module) -> ContextLength:
    """The context of a loaded model. Sliding windows do not count: they limit attention, not positions."""
    inner = unwrapped(model)
    whole: Any = getattr(inner, "config", None)
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length")
    found = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    trained = found[0] if found else None
    tables = [
        int(module.num_embeddings)
        for name, module in inner.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES
    ]
    tables += [len(one) for name, one in inner.named_buffers() if name.rpartition(".")[2] in TABLES and one.ndim == 2]
    vocabulary = int(cast("Any", inner).get_input_embeddings().weight.shape[0])
    affordable = max(SMALLEST, LOGIT_BYTES // (4 * vocabulary))
    if tables:
        end = min(tables) if trained is None else min(*tables, trained)
        return ContextLength(min(end, affordable), trained, ends=end <= affordable)
    return ContextLength(affordable if trained is None else min(affordable, BEYOND * trained), trained, ends=False)


def fitted(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    context: ContextLength,
    *,
    room: int,
    ids: Callable[[Text], list[int]] | None = None,
) -> FittedPrompt:
    """Token ids of a prompt that leave `room` tokens for its answer, cut by the rule of this module where they would not.

    Args:
        tokenizer: renders the chat template.
        text: one user turn, or the messages of a conversation.
        context: what the model reads.
        room: number of tokens that the answer may take; at most half of the context is left free for it.
        ids: makes token ids of a text; by default `text_ids` with `tokenizer`.

    Raises:
        InvalidInput: the text is none, or the template refuses it.
    """
    encode = ids or partial(text_ids, tokenizer)
    limit = context.tokens - min(room, context.tokens // 2)
    short, dropped = _bounded(text, WIDEST * limit)
    found = encode(short)
    whole = len(found) + dropped // 4
    if len(found) > limit:
        short, found = _cut(tokenizer, short, limit, encode)
    beyond = 0 if context.trained is None else max(0, len(found) + room - context.trained)
    return FittedPrompt(tuple(found), short, max(0, whole - len(found)), beyond)


def note_cuts(prompts: Sequence[FittedPrompt], context: ContextLength, what: str = "prompts") -> None:
    """Log how many prompts were cut, if any was."""
    if said := cuts_in_words(sum(one.left_out > 0 for one in prompts), len(prompts), context, what):
        log.warning("%s", said)


def cuts_in_words(cut: int, rows: int, context: ContextLength, what: str = "prompts") -> str:
    """How many prompts were cut and by which rule, as one sentence; empty where none was."""
    if not cut:
        return ""
    why = f"the {context.tokens} tokens that are read of a prompt and its answer"
    return (
        f"{cut} of {rows} {what} were longer than {why}, and were cut: long messages keep their beginning and end, and the "
        "oldest turns are left out where that is not enough."
    )


def _messages(text: Text) -> list[Message]:
    if isinstance(text, Mapping):
        text = cast("Text", text["messages"] if "messages" in text else text.get("prompt", text))
    if isinstance(text, str):
        return [{"role": "user", "content": text}]
    given: object = text
    listed = cast("Sequence[object]", given) if isinstance(given, Sequence) else ()
    return [cast("Message", one) for one in listed if isinstance(one, Mapping)]


def _bounded(text: Text, most: int) -> tuple[Text, int]:
    """The text with at most so many characters a message, and how many were taken away: megabytes are not tokenized."""
    sizes = [len(one) for one in _contents(text)]
    if max(sizes, default=0) <= most:
        return text, 0
    return _shortened(text, [most] * len(sizes), sizes), sum(max(0, size - most) for size in sizes)


def _contents(text: Text) -> list[str]:
    """The texts of all messages; none of what is no text, which `text_ids` refuses by name."""
    return [content for one in _messages(text) if isinstance(content := one.get("content"), str)]


def _cut(
    tokenizer: PreTrainedTokenizerBase, text: Text, limit: int, encode: Callable[[Text], list[int]]
) -> tuple[Text, list[int]]:
    """Shorten a text until it fits: first its long messages, then whole turns."""
    while True:
        sizes = [len(tokenizer.encode(one, add_special_tokens=False, verbose=False)) for one in _contents(text)]
        frame = max(0, len(encode(text)) - sum(sizes))
        share = _share(sizes, limit - frame - 8 * len(sizes))
        while share >= LEAST_SHARE:
            short = _shortened(text, [share] * len(sizes), sizes)
            found = encode(short)
            if len(found) <= limit:
                return short, found
            share = min(share - 1, int(share * limit / len(found)))
        shorter = _without_oldest(text)
        if shorter is None:  # not even one turn fits whole: its end is nearest to the answer
            found = encode(text)
            return text, [*found[: limit // 4], *found[len(found) - (limit - limit // 4) :]]
        text, found = shorter, encode(shorter)
        if len(found) <= limit:
            return text, found


def _share(sizes: Sequence[int], total: int) -> int:
    """The greatest share with which messages of these sizes fit into `total` tokens."""
    left, waiting = total, sorted(sizes)
    while waiting and waiting[0] <= left // len(waiting):
        left -= waiting.pop(0)
    return left // len(waiting) if waiting else max(sizes, default=0)


def _shortened(text: Text, shares: Sequence[int], sizes: Sequence[int]) -> Text:
    """Each message with the share of its characters that its tokens are allowed, from its beginning and its end."""

    def cut(content: str, share: int, size: int) -> str:
        if size <= share:
            return content
        half = max(1, int(len(content) * share / size) // 2)
        return f"{content[:half]}{GAP}{content[len(content) - half :]}"

    if isinstance(text, str):
        return cut(text, shares[0], sizes[0])
    rest = iter(zip(shares, sizes, strict=True))
    return [
        {**one, "content": cut(content, *next(rest))} if isinstance(content := one.get("content"), str) else one
        for one in _messages(text)
    ]


def _without_oldest(text: Text) -> Text | None:
    """The conversation without its oldest turns up to the next one of the user; None where no turn can go."""
    messages = _messages(text)
    first = next((i for i, one in enumerate(messages) if one.get("role") != "system"), len(messages))
    later = [i for i, one in enumerate(messages) if i > first and one.get("role") == "user"]
    if not later:
        return None
    system = [one for one in messages[: later[0]] if one.get("role") == "system"]
    return [*system, *messages[later[0] :]]
