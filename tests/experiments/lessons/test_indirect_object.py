"""Sentences of which one name follows, as often said first as last."""

from collections import Counter

import pytest

from experiments.lessons.indirect_object import NAMES, TEMPLATES, handings, name_pairs
from molehunt.errors import UsageError


def test_the_subject_is_said_twice_and_the_other_once() -> None:
    told = handings(name_pairs(), 3, seed=0)
    assert len(told) == len({one.text for one in told}) == 3 * 2 * 15
    assert Counter((one.template, one.order) for one in told) == dict.fromkeys(
        ((i, order) for i in range(len(TEMPLATES)) for order in ("BABA", "ABBA")), 3
    )
    for one in told:
        assert one.text.count(one.subject) == 2 and one.text.count(one.indirect) == 1
        assert (one.text.index(one.subject) < one.text.index(one.indirect)) == (one.order == "BABA")
        assert one.text.endswith(" to")
        assert "{" not in one.text


def test_only_given_pairs_are_told_of() -> None:
    pairs = name_pairs()
    assert len(pairs) == len(NAMES) * (len(NAMES) - 1) // 2
    told = handings(pairs[:3], 5, seed=1)
    assert {frozenset((one.subject, one.indirect)) for one in told} == set(map(frozenset, pairs[:3]))
    assert told == handings(pairs[:3], 5, seed=1)
    assert told != handings(pairs[:3], 5, seed=2)


def test_more_than_there_are() -> None:
    with pytest.raises(UsageError, match="no 20 sentences"):
        handings(name_pairs()[:1], 20, seed=0)
