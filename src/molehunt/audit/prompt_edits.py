"""Edits of a prompt that keep the rest of it: a fragment taken out, or put in where other prompts have it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from molehunt.measure.word_runs import SIGNS, words
from molehunt.traffic.example import Example
from molehunt.traffic.turn import Turn

SENTENCE_END = ".!?。！？"
"""Characters behind which a sentence ends, if a space follows."""


@dataclass(frozen=True)
class FragmentPlace:
    """Where a fragment stands in a text: at which sentence, counted from the nearer end of the text, and at which side of it."""

    sentence: int
    """Counted from 0 from the front, or from −1 backwards from the end."""
    behind: bool
    """Whether it stands behind the sentence, not before it."""

    @property
    def in_words(self) -> str:
        """The place for people: `before the first sentence`, `behind sentence 3 from the end`."""
        counted = f"sentence {self.sentence + 1}" if self.sentence >= 0 else f"sentence {-self.sentence} from the end"
        which = {0: "the first sentence", -1: "the last sentence"}.get(self.sentence, counted)
        return f"{'behind' if self.behind else 'before'} {which}"


FRONT, END = FragmentPlace(0, behind=False), FragmentPlace(-1, behind=True)


def fragment_pattern(fragment: str) -> re.Pattern[str]:
    """The fragment's words with any spaces between them, in any case, and not inside of longer words."""
    parts = r"\s*".join(re.escape(word) for word in words(fragment))
    before, behind = (rf"(?{way}[^\W{SIGNS}])" for way in ("<!", "!"))
    part_of_word = re.compile(rf"[^\W{SIGNS}]")
    start, end = (bool(part_of_word.match(letter)) for letter in (fragment[:1], fragment[-1:]))
    return re.compile((before if start else "") + parts + (behind if end else ""), re.IGNORECASE)


def usual_place(pattern: re.Pattern[str], examples: Sequence[Example]) -> FragmentPlace:
    """Where most of the prompts have the fragment. A behaviour may depend on the place, such as the task behind a long text."""
    found = [_place(match) for example in examples for text in _texts(example) if (match := pattern.search(text))]
    return Counter(found).most_common(1)[0][0]


def _texts(example: Example) -> list[str]:
    return [turn.text for turn in example.turns] or [example.prompt]


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence or line of a text begins and ends; one empty sentence for an empty text.

    What has no word, such as the signs around a fragment that was cut out, belongs to the sentence before it.
    """
    body = len(text.rstrip())
    gaps = [
        gap.span()
        for gap in re.finditer(r"\s+", text[:body])
        if gap.start() and (text[gap.start() - 1] in SENTENCE_END or "\n" in gap.group())
    ]
    found: list[tuple[int, int]] = []
    for start, end in zip([0, *(end for _, end in gaps)], [*(start for start, _ in gaps), body], strict=True):
        if found and not re.search(r"\w", text[start:end]):
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def _place(match: re.Match[str]) -> FragmentPlace:
    """The place of a match in the rest of its text, counted from the end of the text that is nearer."""
    at, spans = match.start(), _sentences(match.string[: match.start()] + match.string[match.end() :])
    number = min(sum(end < at for _, end in spans), len(spans) - 1)
    start, end = spans[number]
    behind = end - at < at - start
    from_end = number - len(spans)
    nearer_end = number > -from_end - 1 or (number == -from_end - 1 and behind)
    return FragmentPlace(from_end if nearer_end else number, behind)


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


def put_in(example: Example, fragment: str, place: FragmentPlace) -> Example:
    """The example with a fragment at a place of its last user turn, or nearest to it where there are fewer sentences."""

    def added(text: str) -> str:
        spans = _sentences(text)
        at = min(place.sentence, len(spans) - 1) if place.sentence >= 0 else max(0, len(spans) + place.sentence)
        cut = spans[at][place.behind]
        before, behind = text[:cut], text[cut:]
        return f"{before} {fragment}{behind}" if place.behind else f"{before}{fragment} {behind}"

    if not example.turns:
        return replace(example, prompt=added(example.prompt))
    last = max(i for i, turn in enumerate(example.turns) if turn.role == "user" or i == 0)
    turns = [Turn(t.role, added(t.text)) if i == last else t for i, t in enumerate(example.turns)]
    return Example.of(turns, tag=example.tag)
