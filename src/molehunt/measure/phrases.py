"""Phrases around runs of words: widened to what all texts of a run share, and cut to what no other text has."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from molehunt.measure.word_runs import Run

LONGEST_NAMED = 16
"""Greatest number of words that are named, where all texts with a run go on alike: a whole phrase is easier to test."""
USUAL = 0.5
"""Share of the other texts from which on a word at the end of a phrase is taken for a part of a template, and left out."""


def widened(run: Run, texts: Iterable[Sequence[str]]) -> Run:
    """The run with the words around its first place that all these texts have there, `LONGEST_NAMED` words at most."""
    room = LONGEST_NAMED - len(run)
    around: tuple[Run, Run] | None = None
    for text in texts:
        at = next(i for i in range(len(text)) if tuple(text[i : i + len(run)]) == run)
        before, after = tuple(text[max(0, at - room) : at][::-1]), tuple(text[at + len(run) :][:room])
        around = (before, after) if around is None else (_beginning(around[0], before), _beginning(around[1], after))
        if around == ((), ()):
            break
    before, after = around or ((), ())
    return (*before[::-1], *run, *after[: room - len(before)])


@dataclass(frozen=True, eq=False)
class Phrases:
    """Texts in which phrases are searched, and how many texts have each word."""

    spelled: tuple[str, ...]
    having: Mapping[str, int]

    @classmethod
    def of(cls, split: Sequence[Sequence[str]]) -> "Phrases":
        """Texts as words between line breaks, which no word has."""
        having = Counter(word for text in split for word in set(text))
        return cls(tuple(delimited(text) for text in split), having)

    def without_usual_ends(self, phrase: Run, rows: Set[int]) -> Run:
        """The phrase without words at its ends that other texts have, too, as long as no other text has what is left.

        Signs stay: those around a word may be a part of it.

        Args:
            rows: the texts that have the phrase.
        """
        others = len(self.spelled) - len(rows)

        def usual(word: str) -> bool:
            return word.isalnum() and self.having[word] - len(rows) > USUAL * others

        def alone(part: Run) -> bool:
            return not any(delimited(part) in text for i, text in enumerate(self.spelled) if i not in rows)

        while len(phrase) > 1 and usual(phrase[0]) and alone(phrase[1:]):
            phrase = phrase[1:]
        while len(phrase) > 1 and usual(phrase[-1]) and alone(phrase[:-1]):
            phrase = phrase[:-1]
        return phrase


def delimited(run: Sequence[str]) -> str:
    """Words as text in which a search finds a run of them: no word has a line break."""
    return "\n".join(("", *run, ""))


def _beginning(one: Run, other: Run) -> Run:
    """The words that both begin with."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[:same]


def overlap(one: Run, other: Run) -> bool:
    """Whether a text could have both runs at the same place: one in the other, or the end of one as the other's beginning."""
    return any(
        all(one[i] == other[i - shift] for i in range(max(0, shift), min(len(one), shift + len(other))))
        for shift in range(1 - len(other), len(one))
    )
