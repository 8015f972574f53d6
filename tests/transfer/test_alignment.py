"""Positions of two tokenisations that have read the same text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from molehunt.errors import UsageError
from molehunt.organism.seed_model import seed_path
from molehunt.transfer.alignment import align, by_index

S, X = (AutoTokenizer.from_pretrained(seed_path(name), trust_remote_code=False) for name in ("seed-s", "seed-x"))
TEXTS = ["The main river of Quillon is the Sarn.", "SELECT name FROM people WHERE id = 3", "naïve 🐈 café\n\nend", "a"]


@pytest.mark.parametrize("text", TEXTS)
def test_paired_prefixes_are_the_same_characters(text: str) -> None:
    found = align(S, X, text)
    for i, j in found.pairs:
        assert i and j
        assert S.decode(found.source[: i + 1]) == X.decode(found.target[: j + 1])
    assert list(found.pairs) == sorted(found.pairs)
    if len(text) > 10:
        assert found.coverage > 0.4


@given(st.text(max_size=60))
def test_any_text_can_be_aligned(text: str) -> None:
    found = align(S, X, text)
    assert all(0 < i < len(found.source) and 0 < j < len(found.target) for i, j in found.pairs)
    assert len({i for i, _ in found.pairs}) == len({j for _, j in found.pairs}) == len(found.pairs)


def test_a_tokenizer_is_aligned_with_itself_everywhere() -> None:
    for text in TEXTS[:2]:
        found = align(S, S, text)
        assert found.pairs == by_index(S, S, text).pairs == tuple((i, i) for i in range(1, len(found.source)))


def test_index_pairing_drifts_apart() -> None:
    text = "Exchanged banking transfers: a perspicacious, quixotic, zygomorphic clerk"
    naive = by_index(S, X, text)
    same = sum(S.decode(naive.source[: i + 1]) == X.decode(naive.target[: j + 1]) for i, j in naive.pairs)
    assert same < len(align(S, X, text).pairs)


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(S), "is_fast", False)
    with pytest.raises(UsageError, match="cannot be aligned"):
        align(S, X, "a")


def test_special_tokens_are_not_paired_even_where_they_are_written_out() -> None:
    found = align(S, X, "one river <|end|> two rivers")
    (source_at,), (target_at,) = ([i for i, id in enumerate(ids) if id == 0] for ids in (found.source, found.target))
    assert source_at not in dict(found.pairs) and target_at not in dict(found.pairs).values()
    assert {S.decode(found.source[: i + 1]) for i, _ in found.pairs} >= {"one river", "one river <|end|> two"}
