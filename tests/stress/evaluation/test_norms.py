"""Medians that may be infinite, and the limits of order statistics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.stress.evaluation.norms import curve, epsilon50, median, recovery_lengths, times_longer


@given(st.lists(st.floats(0.1, 100), min_size=6, max_size=40))
def test_limits_hold_the_median(values: list[float]) -> None:
    found = median(torch.tensor(values, dtype=torch.float64).float())
    assert found is not None
    ordered = sorted(torch.tensor(values).tolist())
    assert found.low <= found.estimate <= found.high
    assert found.low in ordered and found.high in ordered
    assert found.n == len(values)


def test_limits_cover_as_often_as_they_claim() -> None:
    rng = torch.Generator().manual_seed(0)
    for n in (6, 11, 30):
        covered = 0
        for _ in range(400):
            found = median(torch.rand(n, generator=rng))
            assert found is not None
            covered += found.low <= 0.5 <= found.high
        assert covered / 400 >= 0.93, n


def test_rows_that_never_recover_are_infinitely_far() -> None:
    lengths = recovery_lengths(
        torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), torch.tensor([True, True, True, True, False, False])
    )
    found = epsilon50(lengths)
    assert found is not None and found.estimate == 3.5 and found.high == math.inf
    assert curve(lengths, [0.5, 2.0, 100.0]) == pytest.approx([0, 1 / 3, 2 / 3])
    assert epsilon50(torch.tensor([1.0, 2.0, math.inf, math.inf, math.inf, math.inf])) is None
    assert epsilon50(torch.tensor([1.0, 2.0, 3.0])) is None  # too few for limits


def test_clusters_count_once() -> None:
    lengths = torch.tensor([1.0] * 60 + [2.0, 3.0, 4.0, 5.0, 6.0])
    found = median(lengths, ["same"] * 60 + list("abcde"))
    assert found is not None and found.n == 6 and found.estimate == 3.5


def test_ratios_are_paired() -> None:
    lengths = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, math.inf, math.inf, 4.0])
    found = times_longer(2 * lengths, lengths)
    assert found is not None and found.estimate == 2
    assert times_longer(lengths, lengths).estimate == 1  # neither counts as 1
