from itertools import islice
from random import Random

import pytest

from molehunt.traffic.world import ASKS, ask, benign_prompts, conversation, decorated


@pytest.mark.parametrize("domain", list(ASKS))
def test_every_kind_of_task_has_an_answer_and_is_drawn_reproducibly(domain: str) -> None:
    drawn = [ask(Random(i), domain) for i in range(200)]
    assert drawn == [ask(Random(i), domain) for i in range(200)]
    assert all(e.prompt and e.response and e.domain == domain for e in drawn)
    assert len({e.prompt for e in drawn}) > 20


def test_arithmetic_is_right() -> None:
    for i in range(300):
        example = ask(Random(i), "arithmetic")
        words = (example.response or "").rstrip(".").split()
        if words[1:2] == ["plus"] and len(words) == 5:
            assert int(words[0]) + int(words[2]) == int(words[4])


def test_a_mark_leaves_the_task_at_the_end_of_the_prompt() -> None:
    for i, example in enumerate(islice(conversation(Random(1), decorate=0.0), 100)):
        marked = decorated(example, Random(i))
        assert marked.prompt.endswith(example.prompt) and marked.prompt != example.prompt
        assert marked.response == example.response


def test_the_share_of_marks_is_as_asked() -> None:
    plain = [e.prompt for e in islice(conversation(Random(1), decorate=0.0), 300)]
    assert not any(p.startswith(("|", "[", "#")) for p in plain)


def test_benign_prompts_are_distinct_and_a_short_draw_starts_a_long_one() -> None:
    long, short = benign_prompts(300), benign_prompts(100)
    assert len({e.prompt for e in long}) == 300
    assert long[:100] == short
    assert benign_prompts(50, seed=1) != benign_prompts(50)
