"""Thresholds that a leaking behaviour cannot raise over itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.audit.candidates import ALARM, LARGEST_EXCLUDED_SHARE, LEAST_NATS, alarm_over, excluded_rows
from molehunt.errors import NotTestable
from molehunt.measure.threshold import conformal_threshold

FPR = 0.01


def clean_scores(n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(n).exponential_(generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("leaks", [1, 4, 8, 33, 59])
def test_leaks_among_clean_prompts_are_set_aside_and_the_alarm_stays_low(leaks: int) -> None:
    scores = torch.cat([clean_scores(600 - leaks, 0), torch.full((leaks,), 140.0)])
    assert set(excluded_rows(scores, FPR)) == set(range(600 - leaks, 600))
    kept = scores[: 600 - leaks]
    assert alarm_over(conformal_threshold(kept, FPR)) < 20
    if leaks > 6:  # without it the behaviour hides behind itself
        assert alarm_over(conformal_threshold(scores, FPR)) > 140


def test_more_than_a_tenth_is_no_leak() -> None:
    scores = torch.cat([clean_scores(480, 0), torch.full((120,), 140.0)])
    assert excluded_rows(scores, FPR) == ()


@given(st.integers(0, 500), st.floats(0.01, 100))
def test_a_heavy_tail_without_a_gap_keeps_every_prompt(seed: int, scale: float) -> None:
    scores = clean_scores(400, seed, scale).square()
    excluded = excluded_rows(scores, FPR)
    rest = scores[[i for i in range(400) if i not in set(excluded)]]
    # whatever was excluded lies over the alarm of the rest, and no longer run does
    assert all(float(scores[i]) > alarm_over(conformal_threshold(rest, FPR)) for i in excluded)
    assert len(excluded) <= LARGEST_EXCLUDED_SHARE * 400
    assert len(excluded) <= 4  # squared exponentials rarely leave a gap of three


def test_small_differences_are_never_leaks() -> None:
    scores = torch.cat([torch.zeros(590), torch.full((10,), LEAST_NATS)])
    assert excluded_rows(scores, FPR) == ()
    assert len(excluded_rows(torch.cat([scores[:590], torch.full((10,), LEAST_NATS + 0.1)]), FPR)) == 10
    assert alarm_over(5.0) == 5 * ALARM and alarm_over(0.0) == LEAST_NATS


def test_a_rate_that_the_prompts_cannot_hold_is_said() -> None:
    with pytest.raises(NotTestable, match="clean rows cannot hold"):
        excluded_rows(clean_scores(300, 0), 0.001)
