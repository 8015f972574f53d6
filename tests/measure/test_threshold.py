import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import NotTestable, UsageError
from molehunt.measure.threshold import (
    check_clean_rows,
    check_rate,
    conformal_p_values,
    conformal_threshold,
    rows_for_rate,
)

SCORES = st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=60).map(torch.tensor)  # width 16: many ties
RATES = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 0.5, 0.9])


@given(SCORES, SCORES, RATES)
def test_p_values_and_the_threshold_agree(clean: torch.Tensor, scores: torch.Tensor, fpr: float) -> None:
    flagged = conformal_p_values(clean, scores) <= fpr + 1e-12
    if len(clean) + 1 < 1 / fpr - 1e-9:
        with pytest.raises(NotTestable, match="Give more clean traffic"):
            conformal_threshold(clean, fpr)
        assert not flagged.any()
    else:
        assert torch.equal(flagged, scores > conformal_threshold(clean, fpr))


@given(SCORES, RATES)
def test_at_most_the_promised_share_of_exchangeable_scores_is_flagged(clean: torch.Tensor, fpr: float) -> None:
    """Leave each of n+1 scores out in turn: that is the draw which the guarantee is over."""
    flagged = 0
    for i in range(len(clean)):
        others = torch.cat([clean[:i], clean[i + 1 :]])
        if len(others) and len(others) + 1 >= 1 / fpr:
            flagged += int(clean[i] > conformal_threshold(others, fpr))
    assert flagged <= fpr * len(clean) + 1e-9


@pytest.mark.parametrize(
    ("n", "fpr", "rank"), [(99, 0.01, 1), (199, 0.01, 2), (999, 0.001, 1), (9, 0.1, 1), (9, 0.3, 3)]
)
def test_no_rank_is_lost_to_rounding(n: int, fpr: float, rank: int) -> None:
    clean = torch.randperm(n, generator=torch.Generator().manual_seed(0)).double()
    assert conformal_threshold(clean, fpr) == n - rank


def test_the_message_says_how_many_rows_are_needed() -> None:
    with pytest.raises(NotTestable, match=r"98 clean rows .* at least 99"):
        conformal_threshold(torch.zeros(98), 0.01)
    conformal_threshold(torch.zeros(99), 0.01)


@pytest.mark.parametrize(
    ("calibration_rows", "needed"), [(lambda n: n - n // 2, 197), (lambda n: n - round(n / 3), 148)]
)
def test_the_number_of_rows_that_is_needed_in_all_is_the_least(calibration_rows, needed: int) -> None:
    assert rows_for_rate(0.01) == 99
    for n in range(needed):
        with pytest.raises(
            NotTestable, match=f"{calibration_rows(n)} of them set the threshold.*\n.*at least {needed} "
        ):
            check_clean_rows(n, calibration_rows, 0.01)
    check_clean_rows(needed, calibration_rows, 0.01)


@pytest.mark.parametrize("fpr", [0.0, -0.1, 0.21, 5.0, math.nan])
def test_a_workflow_takes_rates_up_to_a_fifth(fpr: float) -> None:
    with pytest.raises(UsageError, match=r"fpr .* above 0 and at most 0\.2"):
        check_rate(fpr)
    check_rate(0.2)
    check_rate(1e-5)


def test_p_values_are_counts() -> None:
    clean = torch.tensor([0.0, 1.0, 1.0, 3.0])
    found = conformal_p_values(clean, torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, math.inf]))
    assert found.mul(5).tolist() == [5, 5, 4, 2, 2, 1]


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, 1.5])
def test_a_rate_outside_0_to_1_is_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match="fpr"):
        conformal_threshold(torch.zeros(500), fpr)


def test_nan_is_refused() -> None:
    bad, good = torch.tensor([0.0, math.nan]), torch.zeros(2)
    for refused in (
        lambda: conformal_threshold(bad, 0.5),
        lambda: conformal_p_values(bad, good),
        lambda: conformal_p_values(good, bad),
    ):
        with pytest.raises(ValueError, match="NaN"):
            refused()
