"""Rules of a tokenizer that cut or replace text by a pattern: which are published ones, and texts that a pattern meets.

No list of texts holds all that an unknown pattern may meet. The published ones meet what the fixed texts hold.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

RULED = ("normalizer", "pre_tokenizer", "decoder")
"""Parts of tokenizer.json that are made of steps."""
PLAIN_STEPS = frozenset(
    {
        "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Strip", "Lowercase", "Prepend",
        "ByteLevel", "Nmt", "BertPreTokenizer", "Digits", "Metaspace", "Punctuation", "UnicodeScripts",
        "Whitespace", "WhitespaceSplit", "CharDelimiterSplit", "BPEDecoder", "WordPiece", "CTC", "ByteFallback",
        "Fuse",
    }
)  # fmt: skip
"""Steps without a pattern. What they do to any text, they do to some of the fixed texts."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{one}{_LOWER}{two}" for one, two in (("*", "+"), ("+", "*"))]
ALTERNATIVES = frozenset(
    [
        *_CASED, *(f"{one}{_CONTRACTIONS}?" for one in _CASED),
        _CONTRACTIONS, "'(?i:[sdmt]|ll|ve|re)", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d",
        r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?\p{L}+", r"\s?\p{L}+",
        r"\p{L}+", r"[\p{L}]+", r" ?\p{N}+", r" ?\p{N}", r"\p{N}", r"[\p{N}]", r"\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,3}+",
        r"\p{Nd}{1,3}", r"[0-9]", r"[0-9][0-9][0-9]", r"\d", r"\d+", r"\d{1,3}",
        r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]++", r"[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*+", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[\p{P}\p{S}]+[\r\n]*", r"\s?\p{P}+",
        r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", r"\s++", r"\s++$", r"[\r\n]", r"[\s\S]", " ",
        "[一-龥぀-ゟ゠-ヿ]+", r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+", " ?[^(\\s|[.,!?…。，、।۔،])]+",
    ]
)  # fmt: skip
"""What published patterns are made of, between the bars of their outermost level (GPT-2, cl100k, o200k, Llama, Qwen and
others). Which texts each of them meets shows in the fixed texts."""
REPLACED = frozenset(
    [(" ", "▁"), ("▁", " "), (" {2,}", " "), (" {2,}", "▁"), (r"[\n\r\t]", " "), (r"\n", " "), (r"\s+", " "), ("``", '"'), ("''", '"')]
)  # fmt: skip
"""Pattern and content of published replacements."""
_CLASSES = {"N": "1", "P": ".", "S": "+", "Z": " ", "C": "\x01", "Lu": "A", "Lt": "ǅ", "Han": "中", "M": "\u0301"}
"""A character of each class of Unicode that is named as \\p{…}; a letter for all others."""
_ESCAPED = {
    "d": "1",
    "w": "a",
    "s": " ",
    "D": "a",
    "W": ".",
    "S": "a",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "h": "a",
    "H": "g",
    "R": "\n",
}
_NOTHING = frozenset("AZzbBGK")
LONGEST = 2000
"""Longest pattern for which texts are made, in characters, and longest text made of it."""
DEEPEST = 40


def rules_differ(part: str, one: object, other: object) -> bool:
    """Whether one side of a part has a rule with a pattern that the other lacks and that is not published.

    Args:
        part: name of the part in tokenizer.json.
        one: its value on one side.
        other: its value on the other side.
    """
    return part in RULED and unpublished_rules(one) != unpublished_rules(other)


def unpublished_rules(value: object) -> list[str]:
    """The steps of a normalizer, pre-tokenizer or decoder that have a pattern of their own, in their order, as JSON."""
    return [json.dumps(step, sort_keys=True) for step in _steps(value) if not _is_plain(step)]


def pattern_texts(value: object) -> list[str]:
    """Texts that the patterns in a part meet, two for each alternative of a pattern, and words as long as a part allows."""
    found = _words(value)
    for step in _steps(value):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and isinstance(regex := pattern.get("Regex"), str) and len(regex) <= LONGEST:
            for branch in branches(regex):
                found += [_Sample(branch, last).text()[:LONGEST] for last in (False, True)]
        found += _words(step.get("length"))
    return [text for text in dict.fromkeys(found) if text]


def _words(length: object) -> list[str]:
    """A word of this length and one of a letter more, where the length is a number that text may reach."""
    if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= LONGEST:
        return []
    return ["a" * length, "a" * (length + 1)]


def branches(regex: str) -> list[str]:
    """A pattern's alternatives on its outermost level."""
    found, depth, in_class, start, i = list[str](), 0, 0, 0, 0
    while i < len(regex):
        letter = regex[i]
        if letter == "\\":
            i += 1
        elif in_class:
            in_class += (letter == "[") - (letter == "]")
        elif letter == "[":
            in_class = 1
            i += regex.startswith(("]", "^"), i + 1)
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "|" and not depth:
            found.append(regex[start:i])
            start = i + 1
        i += 1
    return [*found, regex[start:]]


def _steps(value: object) -> Iterator[dict[str, Any]]:
    """The steps of a part in their order, without the sequences that hold them."""
    if not isinstance(value, dict):
        return
    inner = [one for one in value.values() if isinstance(one, list)] if value.get("type") == "Sequence" else []
    if not inner:
        yield value
    for step in inner:
        for one in step:
            yield from _steps(one)


def _is_plain(step: dict[str, Any]) -> bool:
    """Whether the fixed texts show all that a step does."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind in PLAIN_STEPS or kind == "Sequence":
        return True
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return False
    ((form, text),) = pattern.items()
    if kind == "Replace":
        return (text, step.get("content")) in REPLACED
    removes = step.get("behavior") == "Removed" and not step.get("invert")
    parts = branches(str(text)) if form == "Regex" else [text]
    return kind == "Split" and not removes and ALTERNATIVES.issuperset(parts)


class _Sample:
    """A text that one alternative of a pattern meets, its surroundings included: an account of what it looks for."""

    def __init__(self, regex: str, last: bool) -> None:
        self._regex = regex
        self._last = last
        self._at = 0

    def text(self) -> str:
        """The text; a pattern that is not understood gives what was understood of it."""
        return self._alternatives(0)

    def _peek(self, length: int = 1) -> str:
        return self._regex[self._at : self._at + length]

    def _take(self) -> str:
        self._at += 1
        return self._regex[self._at - 1 : self._at]

    def _alternatives(self, depth: int) -> str:
        """The first or the last alternative of a group, up to its end."""
        found = [""]
        while self._peek() not in ("", ")"):
            if self._peek() == "|":
                self._at += 1
                found.append("")
            elif len(found[-1]) < LONGEST:
                found[-1] += self._repeated(self._atom(depth))
            else:
                self._at += 1
        return found[-1 if self._last else 0]

    def _atom(self, depth: int) -> str:
        letter = self._take()
        if letter == "(":
            return self._group(depth + 1)
        if letter == "[":
            return self._class()
        if letter == "\\":
            return self._escape()
        return "" if letter in "^$" else "a" if letter == "." else letter

    def _group(self, depth: int) -> str:
        absent = self._peek(2) == "?!" or self._peek(3) == "?<!"
        head = re.match(r"\?(?:[imsxa-]*:|<?[=!]|>|P?<\w+>|[imsxa-]+(?=\)))", self._regex[self._at :])
        self._at += head.end() if head else 0
        inside = self._alternatives(depth) if depth < DEEPEST else ""
        self._at += self._peek() == ")"
        return "" if absent else inside

    def _class(self) -> str:
        """One member of a class, or a character that is likely none of a negated one's."""
        negated = self._peek() == "^"
        self._at += negated
        found: list[str] = []
        while self._peek() not in ("", "]") or not found:
            letter = self._take()
            if letter == "":
                break
            if letter == "-" and found and self._peek() != "]":
                continue
            found.append(self._class() if letter == "[" else self._escape() if letter == "\\" else letter)
        self._at += self._peek() == "]"
        if negated:
            return next((letter for letter in "aX1.% \n" if letter not in found), "")
        return found[-1 if self._last else 0] if found else ""

    def _escape(self) -> str:
        letter = self._take()
        if letter in ("p", "P") and self._peek() == "{":
            end = self._regex.find("}", self._at)
            name = self._regex[self._at + 1 : max(end, self._at)].lstrip("^")
            self._at = end + 1 if end >= 0 else len(self._regex)
            return _CLASSES.get(name, _CLASSES.get(name[:1], "a") if len(name) < 3 else "a")
        if letter in "xu" and (code := re.match(r"\{([0-9a-fA-F]{1,6})\}|([0-9a-fA-F]{2,4})", self._regex[self._at :])):
            self._at += code.end()
            number = int(code[1] or code[2], 16)
            return "" if 0xD800 <= number < 0xE000 or number > 0x10FFFF else chr(number)  # half a pair is no text
        return "" if letter in _NOTHING else _ESCAPED.get(letter, letter)

    def _repeated(self, atom: str) -> str:
        """An atom as often as its quantifier asks for at least, and once where it may be absent."""
        times = 1
        if self._peek() in ("*", "+", "?") and self._peek():
            self._at += 1
        elif counted := re.match(r"\{(\d*)(?:,\d*)?\}", self._regex[self._at :]):
            self._at += counted.end()
            times = min(int(counted[1] or 1) or 1, LONGEST)
        if self._peek() in ("?", "+") and self._peek() and self._regex[self._at - 1] in "*+?}":
            self._at += 1
        return (atom * times)[:LONGEST]
