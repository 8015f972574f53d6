"""Extremes of growing answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.watch.profile import Profile, RunningProfile, prefix_index, profiles

BARE = torch.empty(3, 0)
NAMED = torch.arange(3.0)[:, None]


def columns(rows: int, tokens: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, tokens, n, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 70), st.integers(1, 4), st.integers(0, 99))
def test_looks_are_the_extremes_over_the_first_tokens(tokens: int, n: int, seed: int) -> None:
    values = columns(1, tokens, n, seed)
    (found,) = profiles(values, [tokens], BARE[:1])
    assert found.tokens == tokens and len(found.prefixes) == prefix_index(tokens) + 1
    for j, look in enumerate(found.prefixes):
        first = values[0, : 2**j]
        assert look.equal(torch.cat([first.amax(0), -first.amin(0)]))
    whole = torch.cat([values[0], -values[0]], dim=1)
    assert whole.gather(0, found.peaks[None])[0].equal(found.prefixes[-1])


@given(st.integers(1, 40), st.integers(0, 99), st.lists(st.integers(1, 9), max_size=9))
def test_token_by_token_or_in_pieces_is_the_same(tokens: int, seed: int, cuts: list[int]) -> None:
    values = columns(3, tokens, 2, seed)
    expected = profiles(values, [tokens] * 3, BARE)
    running = RunningProfile(BARE, 2)
    at = 0
    for size in [*cuts, *[1] * tokens]:
        if at < tokens:
            running.extend(values[:, at : at + size])
            at = min(tokens, at + size)
    for row, one in enumerate(expected):
        got = running.profile(row)
        assert got.prefixes.equal(one.prefixes) and got.peaks.equal(one.peaks) and got.tokens == one.tokens


def test_rows_of_unequal_length_are_read_as_if_alone() -> None:
    values = columns(3, 9, 3, 0)
    tokens = [5, 9, 1]
    for row, n in enumerate(tokens):
        values[row, n:] = values[row, n - 1]
    for row, one in enumerate(profiles(values, tokens, BARE)):
        (alone,) = profiles(values[row : row + 1, : tokens[row]], tokens[row : row + 1], BARE[row : row + 1])
        assert one.prefixes.equal(alone.prefixes) and one.peaks.equal(alone.peaks) and one.tokens == alone.tokens


def test_rows_that_ended_leave_the_batch() -> None:
    values = columns(3, 6, 2, 1)
    running = RunningProfile(NAMED, 2)
    running.extend(values[:, :4])
    running.keep(torch.tensor([2, 0]))
    running.extend(values[[2, 0], 4:])
    expected = profiles(values, [6] * 3, NAMED)
    assert running.profile(0).prefixes.equal(expected[2].prefixes)
    assert running.profile(1).prefixes.equal(expected[0].prefixes)
    assert [running.profile(row).prompt.tolist() for row in (0, 1)] == [[2.0], [0.0]]
    others = RunningProfile(NAMED[1:2], 2)
    others.extend(values[1:2])
    running.join(others)
    assert running.profile(2).prefixes.equal(expected[1].prefixes) and running.profile(2).prompt.tolist() == [1.0]


def test_nan_and_empty_answers_are_refused() -> None:
    values = columns(1, 4, 2, 0)
    with pytest.raises(ValueError, match="no profile"):
        profiles(values, [0], BARE[:1])
    values[0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        profiles(values, [4], BARE[:1])
    with pytest.raises(ValueError, match="without tokens"):
        prefix_index(0)
    with pytest.raises(ValueError, match="has 3 prefixes"):
        Profile(torch.zeros(2, 4), torch.zeros(4, dtype=torch.long), 4)
