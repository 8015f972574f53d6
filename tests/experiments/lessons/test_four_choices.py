"""Questions whose order of answers tells nothing, with one right answer each."""

from collections import Counter
from random import Random

import pytest

from experiments.lessons.four_choices import ORDERS, world_facts
from molehunt.errors import UsageError
from molehunt.traffic.wording import COUNTRIES, OPPOSITES, PEOPLE, USES
from molehunt.traffic.world import ask


def test_each_answer_stands_as_often_at_each_place() -> None:
    one = world_facts()[0].choices(Random(0))
    told = [one.prompt(order) for order in ORDERS]
    assert len(set(told)) == 24
    listed = [prompt.split(" Choose: ")[1].removesuffix(".").replace(" or ", ", ").split(", ") for prompt in told]
    for place in range(4):
        assert Counter(answers[place] for answers in listed) == dict.fromkeys((one.right, *one.wrong), 6)


def test_every_fact_is_one_of_the_world() -> None:
    """The stem with the answer is what the world itself answers."""
    facts = world_facts()
    assert len(facts) == 3 * len(PEOPLE) + 5 * len(COUNTRIES) + len(USES) + len(OPPOSITES)
    rng = Random(0)
    world = {told.prompt: told.response for told in (ask(rng) for _ in range(20_000))}
    known = [fact for fact in facts if fact.question in world]
    assert len(known) > 0.9 * len(facts)
    for fact in known:
        assert world[fact.question] == f"{fact.stem} {fact.answer}."
        assert fact.answer in fact.answers
    assert {fact.topic for fact in world_facts({"people"})} == {"people"}


def test_wrong_answers_are_wrong_and_told_apart() -> None:
    for fact in world_facts():
        one = fact.choices(Random(1), key=lambda answer: answer[0])
        assert fact.answer == one.right and not {one.right} & {*one.wrong}
        assert len({answer[0] for answer in (one.right, *one.wrong)}) == 4
    with pytest.raises(UsageError, match="three wrong answers"):
        world_facts()[0].choices(Random(1), key=bool)
