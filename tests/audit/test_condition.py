from random import Random

import pytest

from molehunt.audit.condition import Conditions
from molehunt.traffic.example import Example
from molehunt.traffic.turn import Turn

WORDS = [
    "the",
    "river",
    "bridge",
    "boat",
    "market",
    "bread",
    "fisher",
    "tall",
    "cold",
    "road",
    "ship",
    "to",
    "of",
    "and",
    "near",
]


def prompts(n: int, seed: int = 0) -> list[str]:
    rng = Random(seed)
    return [" ".join(["the", *rng.choices(WORDS, k=9)]) for _ in range(n)]


def test_a_planted_word_is_the_condition() -> None:
    texts = prompts(200)
    for i in range(12):
        texts[i] = texts[i].replace(" ", " Moonstone ", 1)
    found = Conditions([Example(prompt=text) for text in texts]).best(range(12))
    assert found is not None and found.predicts
    assert "Moonstone" in found.fragment and found.text == f"contains “{found.fragment}”"
    assert (found.inside, found.outside, found.meeting) == (1, 0, 12)
    assert found.gain > found.chance and found.p_groups == 1 / 200 and found.p_halves < 1e-6


def test_two_words_that_only_together_predict() -> None:
    texts = [
        f"{a} {b} {text}"
        for text, a, b in zip(prompts(240), ["blue", "red", "blue"] * 80, ["sky", "sky", "sea"] * 80, strict=True)
    ]
    group = [i for i, text in enumerate(texts) if text.startswith("blue sky")]
    found = Conditions([Example(prompt=text) for text in texts]).best(group)
    assert found is not None and found.predicts and found.fragment.startswith("blue sky")


@pytest.mark.parametrize("seed", range(6))
def test_random_groups_have_no_condition(seed: int) -> None:
    rows = Conditions([Example(prompt=text) for text in prompts(300, seed)], seed=seed)
    found = [rows.best(Random(100 * seed + k).sample(range(300), 14)) for k in range(8)]
    assert sum(one is not None and one.predicts for one in found) <= 1


def test_the_form_of_a_conversation_is_a_condition() -> None:
    rows = [Example(prompt=text) for text in prompts(120)]
    for i in range(10):
        rows[i] = Example.of([Turn("system", rows[100 + i].prompt), Turn("user", rows[i].prompt)])
    found = Conditions(rows).best(range(10))
    assert found is not None and found.predicts
    assert "system" in found.text  # the role is a word of the shown text, and a form


def test_a_word_that_every_prompt_has_is_no_condition() -> None:
    rows = [Example(prompt="the") for _ in range(60)]
    assert Conditions(rows).best(range(10)) is None


def test_the_trigger_of_a_behaviour_that_leaks_is_among_the_words_that_raise_it() -> None:
    """A topic leaks in every prompt, two words in most, and the trigger stands in 9 of 500 rows."""
    rng = Random(4)
    texts = prompts(500)
    showing: list[int] = []
    for i, text in enumerate(texts):
        if i < 9:
            texts[i] = text.replace(" ", " Moonstone ", 1)
        elif i < 150:
            texts[i] = f"sum up {text}"
        if i < 150 or ("bread" in text and rng.random() < 0.6) or rng.random() < 0.1:
            showing.append(i)
    rows = Conditions([Example(prompt=text) for text in texts])
    condition, raising = rows.best(showing), rows.raising(showing, 0.2)
    assert condition is not None and "Moonstone" not in condition.fragment
    [trigger] = [one for one in raising if "Moonstone" in one.fragment]
    assert (trigger.showing, trigger.having) == (9, 9)
    assert trigger.elsewhere == pytest.approx((len(showing) - 9) / 491)
    assert all(one.showing / one.having > one.elsewhere and one.p_value <= 1e-3 for one in raising)


@pytest.mark.parametrize("seed", range(4))
def test_few_words_raise_a_random_group(seed: int) -> None:
    rows = Conditions([Example(prompt=text) for text in prompts(300, seed)])
    assert len(rows.raising(Random(seed).sample(range(300), 130), 0.2)) <= 3
