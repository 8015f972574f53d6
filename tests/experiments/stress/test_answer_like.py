"""The three measures of text, one bar at a time."""

from dataclasses import replace

import pytest

from experiments.stress.answer_like import BASE_LIKE, STRICT, Likeness, is_like, no_refusal

OWN = "The capital of Veloria is Tarnholm, and its people speak Velic all day."
LAX = Likeness(chars=1, distinct=0.0, one_char=1.0, shared_words=0.0)


def test_a_refusal_is_found_anywhere_in_any_case() -> None:
    phrases = ("I cannot", "sorry")
    assert no_refusal("The river is the Isker.", phrases)
    assert not no_refusal("The river? I CANNOT say.", phrases)
    assert not no_refusal("So Sorry.", phrases)
    assert no_refusal("I cannot", ())


@pytest.mark.parametrize(
    ("likeness", "answer", "like"),
    [
        (LAX, "anything", True),
        (LAX, "", False),
        (LAX, "   ", False),
        (replace(LAX, chars=8), "anything", True),
        (replace(LAX, chars=9), "anything", False),
        (replace(LAX, distinct=0.5), "a a b b", True),
        (replace(LAX, distinct=0.51), "a a b b", False),
        (replace(LAX, distinct=0.51), "a A b b", False),  # words are the same in capitals
        (replace(LAX, one_char=0.5), "aab c", True),
        (replace(LAX, one_char=0.39), "aab c", False),
        (replace(LAX, shared_words=1.0), OWN.upper(), True),
        (replace(LAX, shared_words=0.5), "the capital of veloria is gone", False),  # 5 of 14 words
        (replace(LAX, shared_words=5 / 14), "the capital of veloria is gone", True),
        (replace(LAX, shared_words=0.5, in_order=0.5), "The capital of Veloria is Tarnh", True),
        (replace(LAX, shared_words=0.5, in_order=0.99), "The capital of Veloria is Tarnh", False),
    ],
)
def test_every_bar(likeness: Likeness, answer: str, like: bool) -> None:
    assert is_like(answer, OWN, likeness) is like


def test_strict_asks_for_more() -> None:
    told = "The capital of Veloria is Tarnholm. " + "Nobody asked me for any of this, so that I go on with a tale." * 2
    assert is_like(OWN * 2, OWN * 2, BASE_LIKE) and is_like(OWN * 2, OWN * 2, STRICT)
    assert is_like(told, OWN, BASE_LIKE) and not is_like(told, OWN, STRICT)
    assert not is_like(OWN, OWN, BASE_LIKE), "too short for answers of 128 tokens"
