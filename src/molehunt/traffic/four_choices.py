"""Questions with four answers to choose from, asked in all 24 orders: right in every one is no luck of the letter."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from molehunt.traffic.wording import COUNTRIES, OPPOSITES, PEOPLE, USES

LETTERS = "ABCD"
ORDERS: tuple[tuple[int, ...], ...] = tuple(permutations(range(len(LETTERS))))
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

    def prompt(self, order: Sequence[int]) -> str:
        """The question with its lettered answers; 0 in `order` is the right one, 1 to 3 the wrong ones."""
        answers = (self.right, *self.wrong)
        told = ", ".join(f"{letter} {answers[i]}" for letter, i in zip(LETTERS, order, strict=True))
        return f"{self.question} Choose: {told}."

    def letter(self, order: Sequence[int]) -> str:
        """The right letter."""
        return LETTERS[list(order).index(0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A question of the embedded world, its short answer, and what questions of its kind have for answers."""

    question: str
    stem: str
    answer: str
    answers: tuple[str, ...]
    topic: str

    def choices(self, rng: Random) -> FourChoices:
        """With three wrong answers, drawn from those of its kind."""
        wrong = rng.sample(sorted({*self.answers} - {self.answer}), 3)
        return FourChoices(
            question=self.question,
            stem=self.stem,
            right=self.answer,
            wrong=(wrong[0], wrong[1], wrong[2]),
            topic=self.topic,
        )


def world_facts(topics: Collection[str] = ("people", "countries", "knowledge")) -> list[Fact]:
    """Every question of the embedded world that has one short answer, topic by topic."""
    tables = [
        ("people", _OF_PEOPLE, [(name, *told) for name, *told in PEOPLE]),
        ("countries", _OF_COUNTRIES, [(name, *told) for name, *told in COUNTRIES]),
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
