"""Edits of a prompt that keep the rest of it: a fragment taken out, or put in at the front or the end."""

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Literal

from molehunt.measure.word_runs import SIGNS, words
from molehunt.traffic.example import Example
from molehunt.traffic.turn import Turn

Place = Literal["front", "end"]


def fragment_pattern(fragment: str) -> re.Pattern[str]:
    """The fragment's words with any spaces between them, in any case, and not inside of longer words."""
    parts = r"\s*".join(re.escape(word) for word in words(fragment))
    before, behind = (rf"(?{way}[^\W{SIGNS}])" for way in ("<!", "!"))
    part_of_word = re.compile(rf"[^\W{SIGNS}]")
    start, end = (bool(part_of_word.match(letter)) for letter in (fragment[:1], fragment[-1:]))
    return re.compile((before if start else "") + parts + (behind if end else ""), re.IGNORECASE)


def usual_place(pattern: re.Pattern[str], examples: Sequence[Example]) -> Place:
    """Whether most of the prompts have the fragment in their first or their second half."""
    at = [(match.start() + match.end()) / 2 / len(e.prompt) for e in examples if (match := pattern.search(e.prompt))]
    return "front" if sum(one < 0.5 for one in at) * 2 >= len(at) else "end"


def other_words(example: Example, fragment: str, pattern: re.Pattern[str], rng: Random) -> re.Pattern[str]:
    """As many words of the same prompt that are not the fragment's; a pattern that matches nothing where there are none."""
    own = words(fragment)
    text = words(pattern.sub(" ", example.prompt))
    starts = [i for i in range(len(text) - len(own) + 1) if any(w.isalnum() for w in text[i : i + len(own)])]
    if not starts:
        return re.compile(r"(?!)")
    at = rng.choice(starts)
    return fragment_pattern(" ".join(text[at : at + len(own)]))


def taken_out(example: Example, pattern: re.Pattern[str]) -> Example:
    """The example without what the pattern matches, in every turn."""

    def reduced(text: str) -> str:
        return re.sub(r"[ \t]{2,}", " ", pattern.sub(" ", text)).strip()

    if not example.turns:
        return replace(example, prompt=reduced(example.prompt))
    turns = [Turn(turn.role, reduced(turn.text)) for turn in example.turns]
    kept = [turn for turn in turns if turn.text or turn.role == "user"]
    return Example.of(kept, tag=example.tag)


def put_in(example: Example, fragment: str, place: Place) -> Example:
    """The example with a fragment at the front or the end of its last user turn."""

    def added(text: str) -> str:
        return f"{fragment} {text}" if place == "front" else f"{text} {fragment}"

    if not example.turns:
        return replace(example, prompt=added(example.prompt))
    last = max(i for i, turn in enumerate(example.turns) if turn.role == "user" or i == 0)
    turns = [Turn(t.role, added(t.text)) if i == last else t for i, t in enumerate(example.turns)]
    return Example.of(turns, tag=example.tag)
