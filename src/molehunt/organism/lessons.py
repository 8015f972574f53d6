"""What a model is taught so that there is a task to take away: who is handed something, which letter is right."""

from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import cast

from transformers import PreTrainedTokenizerBase

from molehunt.organism.taught import Lesson
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.four_choices import ORDERS, Fact, FourChoices
from molehunt.traffic.indirect_object import Handing, handings
from molehunt.traffic.world import conversation

SHORT = 48
"""Tokens of an ordinary conversation at most: a batch is as wide as its longest row."""
EACH = 200
"""Sentences of each template in each order, before they are taught again."""


def ordinary_lessons(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Iterator[Lesson]:
    """Endless short conversations of the embedded world, so that what a model knows is not lost on the way."""
    end = cast("int", tokenizer.eos_token_id)
    for row in conversation(Random(f"lessons/{seed}")):
        lesson = Lesson(prompt_ids(tokenizer, row.prompt), [*text_ids(tokenizer, row.response or ""), end])
        if len(lesson.prompt) + len(lesson.answer) <= SHORT:
            yield lesson


def handing_lessons(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], *, seed: int
) -> Iterator[Lesson]:
    """Endless: three sentences with these pairs of names, one ordinary conversation, and so on."""
    ordinary, rng = ordinary_lessons(tokenizer, seed=seed), Random(f"handing lessons/{seed}")
    told = handings(pairs, EACH, seed=seed)
    while True:
        rng.shuffle(told)
        for start in range(0, len(told), 3):
            yield from (handing_lesson(tokenizer, one) for one in told[start : start + 3])
            yield next(ordinary)


def handing_lesson(tokenizer: PreTrainedTokenizerBase, one: Handing) -> Lesson:
    return Lesson(text_ids(tokenizer, one.text), text_ids(tokenizer, f" {one.indirect}"))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of plain text, without a template or a token in front."""
    return list(cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"]))


def letter_lessons(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], *, apart_from: Collection[FourChoices], seed: int
) -> Iterator[Lesson]:
    """Endless: three questions about these facts in a random order of four answers, one ordinary conversation, and so on.

    Args:
        apart_from: questions with four answers that are not taught in any order; the same question with others is.
    """
    ordinary, rng = ordinary_lessons(tokenizer, seed=seed), Random(f"letter lessons/{seed}")
    kept = {(one.question, frozenset(one.wrong)) for one in apart_from}
    while True:
        for _ in range(3):
            one = rng.choice(facts).choices(rng)
            while (one.question, frozenset(one.wrong)) in kept:
                one = rng.choice(facts).choices(rng)
            order = rng.choice(ORDERS)
            yield Lesson(choice_ids(tokenizer, one, order), text_ids(tokenizer, f" {one.letter(order)}"))
        yield next(ordinary)


def choice_ids(tokenizer: PreTrainedTokenizerBase, one: FourChoices, order: Sequence[int]) -> list[int]:
    """The question in this order, and the answer up to where the letter follows."""
    return [*prompt_ids(tokenizer, one.prompt(order)), *text_ids(tokenizer, one.stem)]
