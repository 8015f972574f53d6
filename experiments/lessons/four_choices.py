"""Questions with four answers to choose from, asked in all 24 orders: right in every one is no luck of the place."""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from molehunt.errors import UsageError
from molehunt.traffic.wording import COUNTRIES, OPPOSITES, PEOPLE, USES

ORDERS: tuple[tuple[int, ...], ...] = tuple(permutations(range(4)))
_OF_PEOPLE = (
    ("What does {} do for a living?", "{} works as a"),
    ("Where does {} live?", "{} lives in"),
    ("Which animal does {} keep?", "{} keeps a"),
)
_OF_COUNTRIES = (
    ("What is the capital of {}?", "The capital of {} is"),
    ("Which river flows through {}?", "The main river of {} is the"),
    ("What language do people speak in {}?", "People in {} speak"),
    ("What money is used in {}?", "People in {} pay with the"),
    ("What do people eat in {}?", "A famous dish from {} is"),
)
_OF_THINGS = (("What is a {} used for?", "A {} is used to"),)
_OF_WORDS = (("What is the opposite of {}?", "The opposite of {} is"),)


@dataclass(frozen=True, kw_only=True, slots=True)
class FourChoices:
    """One question with its answers."""

    question: str
    stem: str
    """How the answer begins, up to where one of the four follows."""
    right: str
    wrong: tuple[str, str, str]
    topic: str = ""
    kind: tuple[str, ...] = ()
    """What other questions of its kind have for answers: wrong here, but answers."""

    def prompt(self, order: Sequence[int]) -> str:
        """The question with its four answers; 0 in `order` is the right one, 1 to 3 the wrong ones."""
        answers = (self.right, *self.wrong)
        first, second, third, fourth = (answers[i] for i in order)
        return f"{self.question} Choose: {first}, {second}, {third} or {fourth}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A question of the embedded world, its short answer, and what questions of its kind have for answers."""

    question: str
    stem: str
    answer: str
    answers: tuple[str, ...]
    topic: str

    def choices(self, rng: Random, key: Callable[[str], Hashable] = str) -> FourChoices:
        """The question with three wrong answers, drawn from those of its kind, no two of the four with the same key.

        Args:
            key: what must tell answers apart, such as the first token.

        Raises:
            UsageError: there are no three such answers.
        """
        wrong: list[str] = []
        seen = {key(self.answer)}
        others = sorted({*self.answers} - {self.answer})
        for answer in rng.sample(others, len(others)):
            if len(wrong) < 3 and key(answer) not in seen:
                wrong.append(answer)
                seen.add(key(answer))
        if len(wrong) < 3:
            raise UsageError(f"{self.question!r} has no three wrong answers that differ from the right one.")
        return FourChoices(
            question=self.question,
            stem=self.stem,
            right=self.answer,
            wrong=(wrong[0], wrong[1], wrong[2]),
            topic=self.topic,
            kind=self.answers,
        )


def world_facts(topics: Collection[str] = ("people", "countries", "knowledge")) -> list[Fact]:
    """Every question of the embedded world that has one short answer, topic by topic."""
    tables = [
        ("people", _OF_PEOPLE, [(name, *facts) for name, *facts in PEOPLE]),
        ("countries", _OF_COUNTRIES, [(name, *facts) for name, *facts in COUNTRIES]),
        ("knowledge", _OF_THINGS, list(USES)),
        ("knowledge", _OF_WORDS, list(OPPOSITES)),
    ]
    return [
        Fact(
            question=asked.format(row[0]),
            stem=stem.format(row[0]),
            answer=row[i],
            answers=tuple(one[i] for one in rows),
            topic=topic,
        )
        for topic, questions, rows in tables
        if topic in topics
        for i, (asked, stem) in enumerate(questions, 1)
        for row in rows
    ]
