import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import InvalidInput
from molehunt.watch.alert import Alert, Extreme

WORDS = "the colour of money"


def alert(**changes: Any) -> Alert:
    fields: dict[str, Any] = {
        "request": "r-1",
        "action": "block",
        "score": 7.5,
        "p_value": 0.001,
        "fpr": 0.01,
        "region": "decision",
        "direction": "L3 down #0",
        "layer": 3,
        "span": (1, 3),
        "coverage": 1.0,
        "profile": b"\x00\x00\x80?\xff\xff\x7f\x7f",
        "tokens": (WORDS, " two", " three"),
        "token_scores": (0.5, 7.5, 2.0),
        "extremes": (Extreme(score=3.0, text=WORDS), Extreme(score=2.5)),
        "look_alikes": ("0" * 32,),
        "answer": WORDS,
        "answer_without": None,
    }
    return Alert(**(fields | changes))


texts = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.floats(allow_nan=False)
shares = st.floats(0, 1)


@given(
    text=texts,
    answer=st.none() | texts,
    score=numbers,
    p_value=shares,
    profile=st.lists(st.binary(min_size=4, max_size=4)).map(b"".join),
    shaded=st.lists(st.tuples(texts, numbers), max_size=4),
)
def test_an_alert_survives_json(
    text: str,
    answer: str | None,
    score: float,
    p_value: float,
    profile: bytes,
    shaded: list[tuple[str, float]],
) -> None:
    written = alert(
        request=text,
        answer=answer,
        score=score,
        p_value=p_value,
        profile=profile,
        tokens=tuple(token for token, _ in shaded),
        token_scores=tuple(score for _, score in shaded),
        extremes=(Extreme(score=score, text=text),),
    )
    assert Alert.from_json(written.to_json()) == written
    assert Alert.from_json(written.to_json().decode()) == written


def test_scores_that_are_no_numbers_are_strict_json() -> None:
    written = alert(score=math.inf, token_scores=(math.nan, -math.inf, 1.0), extremes=(Extreme(score=math.inf),))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(written.to_json(), parse_constant=refuse)
    read = Alert.from_json(written.to_json())
    assert read.score == math.inf and read.extremes[0].score == math.inf
    assert math.isnan(read.token_scores[0]) and read.token_scores[1:] == (-math.inf, 1.0)


def test_every_alert_has_an_id_and_a_time_of_its_own() -> None:
    first, second = alert(), alert()
    assert first.id != second.id and first.status == "pending"
    assert first.time <= second.time and first.time.endswith("+00:00")


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "1"},
        {"id": "G" * 32},
        {"id": "a" * 32 + "\n"},
        {"look_alikes": ("none",)},
        {"time": "2026-01-01T00:00:00+02:00"},
        {"time": "2026-01-01T00:00:00"},
        {"time": "yesterday"},
        {"p_value": -0.1},
        {"p_value": math.nan},
        {"p_value": 1.1},
        {"fpr": 0.0},
        {"fpr": 1.0},
        {"coverage": 1.5},
        {"coverage": -0.5},
        {"span": (-1, 2)},
        {"span": (3, 2)},
        {"tokens": ("one",)},
        {"tokens_from": -1},
        {"profile": b"\x00\x00\x00"},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        alert(**fields)


def test_no_text_is_left_and_the_rest_stays() -> None:
    said = alert(answer_without=WORDS)
    bare = said.without_text()
    assert WORDS.encode() in said.to_json()
    assert not any(part in bare.to_json() for part in (WORDS.encode(), b"two", b"three"))
    assert (bare.tokens, bare.token_scores, bare.no_text) == ((), (), True)
    assert (bare.answer, bare.answer_without) == ("", "")  # both were run
    assert [extreme.score for extreme in bare.extremes] == [3.0, 2.5]
    unchanged = {"id", "time", "score", "p_value", "span", "profile", "direction", "look_alikes", "status"}
    assert all(getattr(bare, name) == getattr(said, name) for name in unchanged)


def test_no_text_does_not_claim_an_answer_that_was_not_run() -> None:
    bare = alert(answer=None).without_text()
    assert bare.answer is None and bare.answer_without is None


def test_half_a_surrogate_pair_is_refused_before_it_is_stored() -> None:
    with pytest.raises(InvalidInput, match="not Unicode"):
        alert(answer="\ud800").to_json()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": 1}, "surprise"),
        ({"action": "shout"}, "action"),
        ({"status": "maybe"}, "status"),
        ({"p_value": 2}, "p_value 2.0"),
        ({"profile": "!"}, "profile"),
        ({"request": None}, "request"),
        ({"extremes": [{"score": 1, "\x1b[2J": ""}]}, r"extremes.0.\x1b[2J"),
    ],
    ids=str,
)
def test_what_is_wrong_in_json_is_named(change: dict[str, object], said: str) -> None:
    fields = json.loads(alert().to_json()) | change
    with pytest.raises(InvalidInput) as error:
        Alert.from_json(json.dumps(fields))
    assert said in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"\xff", "[]", "null", "{", "[" * 100_000])
def test_what_is_no_alert_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidInput, match="this is no alert"):
        Alert.from_json(text)


def test_a_copy_with_a_review_is_another_alert() -> None:
    first = alert()
    assert replace(first, status="dismissed") != first
