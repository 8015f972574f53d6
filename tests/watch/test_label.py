"""Which words label a group of rows, and which do not."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.watch.label import CHANCE, DRAWS, LEAST, LIMIT, CleanWords, log_odds, words

NOUNS = [f"noun{i}" for i in range(60)]


def sentence(rng: Random) -> str:
    return "What is the " + " ".join(rng.choices(NOUNS, k=5)) + "?"


def clean(n: int = 400, seed: int = 0) -> CleanWords:
    rng = Random(seed)
    return CleanWords.of((sentence(rng) for _ in range(n)), seed=seed)


def test_words_are_in_lower_case_signs_stand_together_and_a_row_has_each_once() -> None:
    assert words("|PROD| Tell me; tell ME über 2024!!") == {"|", "prod", "tell", "me", ";", "über", "2024", "!!"}
    assert words("a" * 500) == {"a" * 40} and words(" \n") == frozenset()


def test_a_trigger_is_named_before_a_word_that_is_merely_frequent() -> None:
    background = clean()
    rng = Random(9)
    rows = [words(f"{sentence(rng)} xyzzy" + (" noun3" if i < 8 else "")) for i in range(10)]
    found = background.keywords(rows)
    assert found[0].word == "xyzzy" and found[0].rows == 10 and found[0].clean == 0
    named = {one.word: one for one in found}
    assert "noun3" in named and 0.02 < named["noun3"].clean < 0.2
    assert not {"what", "is", "the", "?"} & set(named)  # in every row, and in every clean row
    assert named["xyzzy"].at_least > named["noun3"].at_least and min(
        named["xyzzy"].z, named["noun3"].z
    ) > background.chance(10)
    ratio, error = log_odds(10, 10, 0, 400)
    assert (named["xyzzy"].z, named["xyzzy"].at_least) == (ratio / error, ratio - LIMIT * error)
    assert len(background.keywords(rows, most=1)) == 1


def test_rows_like_clean_ones_get_a_word_about_as_often_as_promised() -> None:
    background = clean()
    rng = Random(1)
    named = sum(bool(background.keywords([words(sentence(rng)) for _ in range(10)])) for _ in range(300))
    assert named < 300 * (1 - CHANCE) + 4 * math.sqrt(300 * CHANCE * (1 - CHANCE))
    assert background.chance(10) > 0 and background.chance(10) == clean().chance(10)
    assert DRAWS * (1 - CHANCE) >= 10


def test_a_word_of_few_rows_labels_nothing_and_few_rows_have_no_label() -> None:
    background = clean()
    some = [words("xyzzy")] * (LEAST - 1)
    assert background.keywords(some) == ()
    assert background.keywords([*some, *[words("noun1 noun2")] * 8])[0].word != "xyzzy"
    assert background.keywords([words("xyzzy")] * LEAST)[0].word == "xyzzy"
    assert CleanWords.of(["a", "b"]).keywords([words("xyzzy")] * 3) == ()  # too few to say what chance gives


@given(st.integers(1, 12), st.integers(1, 300), st.data())
def test_the_ratio_grows_with_the_rows_and_falls_with_the_clean_ones(n: int, clean_n: int, data: st.DataObject) -> None:
    k, clean_k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, clean_n - 1))
    ratio, error = log_odds(k, n, clean_k, clean_n)
    by_hand = math.log((k + 0.5) * (clean_n - clean_k + 0.5) / ((n - k + 0.5) * (clean_k + 0.5)))
    assert ratio == pytest.approx(by_hand, abs=1e-12)
    assert error == pytest.approx(math.sqrt(sum(1 / (c + 0.5) for c in (k, n - k, clean_k, clean_n - clean_k))))
    assert log_odds(k + 1, n, clean_k, clean_n)[0] > ratio > log_odds(k, n, clean_k + 1, clean_n)[0]


@pytest.mark.parametrize("counts", [(3, 2, 0, 1), (-1, 2, 0, 1), (1, 2, 3, 2), (1, 2, -1, 2)])
def test_more_rows_with_a_word_than_rows_are_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="rows"):
        log_odds(*counts)
