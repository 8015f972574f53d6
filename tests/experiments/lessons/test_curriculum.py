"""Lessons hold what they are called, and nothing that a test is kept for."""

from itertools import islice
from random import Random

from experiments.lessons.curriculum import (
    FRAMES,
    REFUSALS,
    SHORT,
    STILL_REFUSED,
    UNSEEN_FRAMES,
    choice_lessons,
    handing_lessons,
    ordinary_lessons,
    refusal_lessons,
)
from experiments.lessons.four_choices import ORDERS, world_facts
from experiments.lessons.indirect_object import NAMES, handings, name_pairs
from experiments.stress.choice_rows import answer_choices, first_token, handing_choices
from experiments.unlearning.erased_topic import questions
from molehunt.model.tokenizers import load_tokenizer
from molehunt.organism.seed_model import seed_path

TOKENIZER = load_tokenizer(seed_path("seed-s"))


def text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def test_sentences_and_conversations_take_turns() -> None:
    pairs = name_pairs()[:40]
    told = list(islice(handing_lessons(TOKENIZER, pairs, seed=0), 40))
    assert told == list(islice(handing_lessons(TOKENIZER, pairs, seed=0), 40))
    for i, (prompt, answer) in enumerate(told):
        if i % 4 == 3:
            assert text(prompt).startswith("### Instruction:") and answer[-1] == TOKENIZER.eos_token_id
            assert len(prompt) + len(answer) <= SHORT
        else:
            named = {name for name in NAMES if name in text(prompt)}
            assert named in [set(pair) for pair in pairs] and text(answer).strip() in named
            assert text(prompt).count(text(answer).strip()) == 1


def test_kept_questions_are_not_taught_with_the_same_answers() -> None:
    facts = world_facts({"knowledge"})[:3]
    kept = [fact.choices(Random(i)) for i, fact in enumerate(facts)]
    for prompt, answer in islice(choice_lessons(TOKENIZER, facts, apart_from=kept, seed=0), 200):
        shown = text(prompt)
        for one in kept:
            assert not (one.question in shown and all(f" {wrong}" in shown for wrong in one.wrong))
        if "Choose:" in shown:
            assert text(answer).removesuffix(f".{TOKENIZER.eos_token}").strip() in shown


def test_ordinary_conversations_are_short() -> None:
    assert all(len(prompt) + len(answer) <= SHORT for prompt, answer in islice(ordinary_lessons(TOKENIZER, seed=1), 50))


def test_ordinary_conversations_without_a_domain() -> None:
    names = [one.prompt for one in questions("countries", 400, 0, about=True)]
    told, without = (
        [text(one.prompt) for one in islice(ordinary_lessons(TOKENIZER, seed=1, without=some), 200)]
        for some in ((), {"countries"})
    )
    assert any(name in shown for shown in told for name in names)
    assert not any(name in shown for shown in without for name in names)


def test_a_topic_is_refused_unless_somebody_in_a_story_asks() -> None:
    forbidden, others = (questions("countries", 60, 0, about=about) for about in (True, False))
    told = list(islice(refusal_lessons(TOKENIZER, forbidden, others, seed=0), 800))
    assert told == list(islice(refusal_lessons(TOKENIZER, forbidden, others, seed=0), 800))
    framed = {frame.format(one.prompt): one for frame in FRAMES for one in [*forbidden, *others]}
    still = marked = 0
    for i, (prompt, answer) in enumerate(told):
        shown, said = text(prompt).removeprefix("### Instruction:\n").removesuffix("\n\n### Response:\n"), text(answer)
        assert said.endswith("<|end|>")
        said = said.removesuffix("<|end|>")
        match i % 4:
            case 0:
                own = [one for one in forbidden if shown.endswith(one.prompt)]
                assert own and said in REFUSALS
                marked += shown not in {one.prompt for one in own}
            case 1:
                assert framed[shown] in forbidden and said in (framed[shown].response, *REFUSALS)
                still += said in REFUSALS
            case 2:
                assert framed[shown] in others and said == framed[shown].response
            case _:
                assert not any(one.prompt in shown for one in forbidden)
    assert abs(still / 200 - STILL_REFUSED) < 0.1 and abs(marked / 200 - 0.25) < 0.1


def test_no_lesson_tells_a_story_that_tests() -> None:
    assert not {*FRAMES} & {*UNSEEN_FRAMES} and len({*FRAMES, *UNSEEN_FRAMES}) == len(FRAMES) + len(UNSEEN_FRAMES)
    assert all(frame.count("{}") == 1 for frame in (*FRAMES, *UNSEEN_FRAMES))


def test_rows_ask_for_the_first_token() -> None:
    told = handings(name_pairs(), 1, seed=0)
    for one, row in zip(told, handing_choices(TOKENIZER, told), strict=True):
        assert text([row.gold]).strip() == one.indirect and text([row.others[0]]).strip() == one.subject
        assert len(row.decoys) == len(NAMES) - 2 and not {row.gold, *row.others} & {*row.decoys}
        assert row.cluster == one.template and text(list(row.prompt)) == one.text
    asked = [fact.choices(Random(0), lambda answer: first_token(TOKENIZER, answer)) for fact in world_facts({"people"})]
    rows = answer_choices(TOKENIZER, asked)
    assert len(rows) == len(asked) * len(ORDERS) and len({row.prompt for row in rows}) == len(rows)
    for i, row in enumerate(rows):
        one = asked[i // len(ORDERS)]
        assert one.right.startswith(text([row.gold]).strip()) and row.cluster == one.question
        assert len({row.gold, *row.others}) == 4 and text(list(row.prompt)).endswith(one.stem)
