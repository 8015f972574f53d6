"""Words that a template adds to a conversation: all that is no echo of the input and no ordinary marker or key."""

import re
from collections.abc import Iterable
from hashlib import sha256

ORDINARY = frozenset(
    {
        "system", "user", "assistant", "tool", "tools", "developer", "function", "functions", "human", "ai",
        "bot", "model", "chatbot", "gpt", "environment", "ipython", "python", "role", "roles", "message",
        "messages", "content", "text", "title", "type", "name", "names", "id", "ids", "index", "value", "key",
        "keys", "string", "number", "integer", "boolean", "object", "array", "null", "none", "true", "false",
        "items", "properties", "required", "enum", "description", "default", "nullable", "parameters",
        "parameter", "arguments", "argument", "args", "json", "schema", "namespace", "any", "void", "im",
        "start", "end", "of", "turn", "token", "header", "eot", "eom", "sot", "bos", "eos", "pad", "unk",
        "inst", "sys", "begin", "sep", "tag", "channel", "final", "analysis", "commentary", "constrain",
        "return", "recipient", "call", "calls", "response", "responses", "result", "results", "output",
        "outputs", "available", "list", "think", "thinking", "thought", "thoughts", "reasoning", "reasoned",
        "nothink", "action", "observation", "instruction", "instructions", "input", "prompt", "preamble",
        "document", "documents", "doc", "passage", "question", "answer", "query", "image", "images", "img",
        "picture", "video", "audio", "vision", "media", "url", "file", "box", "quad", "ref", "thumb", "frame",
        "placeholder", "row", "col", "patch", "break", "info", "stop", "declaration", "continue", "browser",
        "special", "sentence", "arg", "invoke", "atem", "to", "effort", "strength", "low", "medium", "high",
        "endoftext", "startoftext", "endofprompt", "code", "interpreter", "unknown",
    }
)  # fmt: skip
"""Words of markers, role headers and JSON: a template needs them for turns, tools and pictures. No sentence is made of them."""
PUBLISHED = {
    "982cd2433eab794c": "Command-R 7B: what a developer's preamble is",
    "e3c4007b2bb92654": "Granite 3.2: how to think, with sentences for markers",
    "cd6d9731bb65e233": "Granite 3.3: how to think, with tags for markers",
}
"""Digests of words that well-known templates write under one condition only: these and no others are notes."""
MONTHS = frozenset(
    {
        "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
        "november", "december", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
        "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "mon", "tue", "wed",
        "thu", "fri", "sat", "sun",
    }
)  # fmt: skip
WORD = re.compile(r"[^\W_]+|[^\s\x00-\x7f]")
MARKER = re.compile(r"<[^<>\n]*>|\[[^\[\]\n]*\]|\{[^{}\n]*\}|[\"'`][^\"'`\n]*[\"'`]")
"""Tags, brackets and quoted keys: what stands in them is no sentence."""
SENTENCE = re.compile(r"[^\W_]+(?:(?:[,;:.!?]* +|[,;:.!?]+)[^\W_]+){2,}")
"""At least three words that nothing but spaces and punctuation parts."""
SHOWN = 200
"""Greatest number of characters of a text that a report shows."""


def echo(number: int) -> str:
    """The text of message `number`, which no template contains."""
    return f"zq{number}x"


def words(text: str, given: Iterable[str] = ()) -> frozenset[str]:
    """Words of a rendered conversation that are neither ordinary, nor parts of dates, nor in the texts that were given."""
    for one in sorted(filter(None, given), key=len, reverse=True):
        text = text.replace(one, " ")
    found: set[str] = set()
    for word in WORD.findall(text):
        low = word.casefold()
        if low.startswith("zq") or low in ORDINARY or low in MONTHS or low.isdecimal():
            continue
        pieces = re.findall(r"[A-Z]?[^\W\dA-Z_]+|[A-Z]+|[^\x00-\x7f]", word)  # such as ToolCall
        if (len(low) > 1 and not all(piece.casefold() in ORDINARY or len(piece) == 1 for piece in pieces)) or (
            len(low) == 1 and not low.isascii() and low.isalpha()
        ):
            found.add(low)
    return frozenset(found)


def prose(text: str) -> frozenset[str]:
    """Runs of three words and more outside of markers, which say something even where each of the words is ordinary."""
    return frozenset(squeezed(one.casefold()) for one in SENTENCE.findall(MARKER.sub("\n", text)))


def composed(word: str) -> bool:
    """Whether a word is nothing but ordinary words put together, as where a template writes keys without spaces."""
    ends = {0}
    for end in range(1, len(word) + 1):
        if any(word[start:end] in ORDINARY for start in ends):
            ends.add(end)
    return len(word) in ends


def published(new: frozenset[str]) -> bool:
    """Whether exactly these words are those of a well-known template."""
    return sha256(" ".join(sorted(new)).encode()).hexdigest()[:16] in PUBLISHED


def shown(text: str, wanted: frozenset[str]) -> str:
    """The part of a text around the first of some words, for a report."""
    first = len(text)
    last = 0
    for found in WORD.finditer(text):
        if found[0].casefold() in wanted:
            first, last = min(first, found.start()), found.end()
    if first == len(text):
        return ""
    piece = text[max(0, first - 20) : last + 20]
    return piece if len(piece) <= SHOWN else piece[: SHOWN - 1] + "…"


def unlike(before: str, after: str) -> str:
    """Where two texts begin and end to differ: the differing part of the second, or what the first has more."""
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    back = max(0, start - 24)
    start = max((before.rfind(one, back, start) for one in " \n<["), default=-1)  # not in the middle of a word
    start = back if start < 0 else start
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    more, less = after[start : len(after) - end], before[start : len(before) - end]
    return f"{less[:SHOWN]!r} became {more[:SHOWN]!r}"


def squeezed(text: str) -> str:
    """A text with single spaces, because many templates strip and trim."""
    return " ".join(text.split())
