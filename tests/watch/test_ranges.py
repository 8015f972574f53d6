import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.watch.ranges import SLACK, RunningRange
from molehunt.watch.sketch import ScoreSketch

COLUMNS = 3
COSINE = st.floats(-1, 1, width=16)
ROWS = st.integers(1, 20).flatmap(lambda n: arrays(np.float32, (n, COLUMNS, 2), elements=COSINE)).map(torch.from_numpy)


def ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest of each pair."""
    return rows.amax(2), rows.amin(2)


def range_of(rows: Tensor, **options: float) -> RunningRange:
    return RunningRange.empty(COLUMNS, **options).absorb(*ends(rows))


@given(ROWS, ROWS, st.sampled_from([0.0, SLACK, 0.25]))
def test_exceedance_flags_what_the_published_rule_flags(clean: Tensor, rows: Tensor, slack: float) -> None:
    """Its words: max > hi + EPS or min < lo - EPS, for any direction."""
    running = range_of(clean, slack=slack)
    high, low = clean.double().amax((0, 2)) + slack, clean.double().amin((0, 2)) - slack
    maxima, minima = (end.double() for end in ends(rows))
    published = ((maxima > high) | (minima < low)).any(1)
    exceedance = running.exceedance(*ends(rows))
    assert torch.equal((exceedance > 1e-12).any(1), ((maxima - high > 1e-12) | (low - minima > 1e-12)).any(1))
    assert torch.equal(running.first_sight(*ends(rows)), (exceedance > 0).any(1))
    torch.testing.assert_close(exceedance, (maxima - high).maximum(low - minima), rtol=0, atol=1e-12)
    if slack in (0.0, 0.25):  # exact in binary
        assert torch.equal(running.first_sight(*ends(rows)), published)


@given(ROWS, ROWS, st.sampled_from([0.0, 0.07, 0.1, 0.34]))
def test_merged_ranges_equal_one_pass(a: Tensor, b: Tensor, percentile: float) -> None:
    whole = range_of(torch.cat([a, b]), percentile=percentile)
    merged = range_of(a, percentile=percentile).merge(range_of(b, percentile=percentile))
    assert merged.n == whole.n == len(a) + len(b)
    assert torch.equal(merged.high, whole.high) and torch.equal(merged.low, whole.low)


@pytest.mark.parametrize(("percentile", "left_out"), [(0.0, 0), (0.009, 0), (0.01, 1), (0.07, 7), (0.29, 29)])
def test_the_percentile_leaves_out_whole_rows_at_each_end_of_every_column(percentile: float, left_out: int) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float() / 100
    values = torch.stack([order, order.flip(0)], 1)
    running = RunningRange.empty(2, percentile=percentile).absorb(values, values - 1)
    assert torch.equal(running.high, torch.full((2,), (99 - left_out) / 100))
    torch.testing.assert_close(running.low, torch.full((2,), left_out / 100 - 1), rtol=0, atol=1e-6)


def test_the_slack_hides_directions_of_small_scale() -> None:
    """The published fault, kept: fourteen standard deviations on a small column stay unseen."""
    clean = 3e-4 * torch.randn(1_000, 1, generator=torch.Generator().manual_seed(0))
    triggered = torch.full((1, 1), 14 * 3e-4)
    assert not RunningRange.empty(1).absorb(clean, clean).first_sight(triggered, triggered).any()
    assert RunningRange.empty(1, slack=0.0).absorb(clean, clean).first_sight(triggered, triggered).all()


def test_looking_absorbs_nothing_and_absorbing_is_the_caller_s_choice() -> None:
    running = range_of(torch.zeros(5, COLUMNS, 2))
    before = running.maxima.to_bytes(), running.minima.to_bytes()
    attack = torch.full((3, COLUMNS), 0.5)
    for _ in range(3):  # a repeated attack alarms each time
        assert running.first_sight(attack, -attack).all()
        assert (running.exceedance(attack, attack - 0.5) == 0.5 - SLACK).all()
    assert (running.maxima.to_bytes(), running.minima.to_bytes()) == before and running.n == 5
    assert not running.absorb(attack, -attack).first_sight(attack, -attack).any()
    assert running.n == 8


def test_each_end_of_the_range_counts() -> None:
    running = range_of(torch.zeros(5, COLUMNS, 2))
    zero, off = torch.zeros(1, COLUMNS), torch.tensor([[0.0, 0.5, 0.0]])
    assert running.first_sight(off, zero).tolist() == running.first_sight(zero, -off).tolist() == [True]
    assert running.first_sight(zero, zero).tolist() == [False]


@given(ROWS, ROWS)
def test_each_end_says_how_far_it_is_left(clean: Tensor, rows: Tensor) -> None:
    running = range_of(clean)
    both = running.beyond(*ends(rows))
    maxima, minima = (end.double() for end in ends(rows))
    torch.testing.assert_close(both[:, :COLUMNS], maxima - clean.double().amax((0, 2)) - SLACK, rtol=0, atol=1e-12)
    torch.testing.assert_close(both[:, COLUMNS:], clean.double().amin((0, 2)) - minima - SLACK, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "percentile", "bound"), [(100, 0.0, 2 * 3 / 100), (100, 0.05, 2 * 3 * 6 / 100), (2, 0.0, 3.0)]
)
def test_the_bound_is_the_published_one(n: int, percentile: float, bound: float) -> None:
    assert range_of(torch.zeros(n, COLUMNS, 2), percentile=percentile).false_alarm_bound == pytest.approx(bound)


def test_the_bound_holds_without_slack() -> None:
    """Independent columns, where the union loses least."""
    rng = torch.Generator().manual_seed(0)
    flagged = 0
    for _ in range(60):
        clean, fresh = (torch.rand(n, COLUMNS, 2, generator=rng) for n in (40, 50))
        running = range_of(clean, slack=0.0, percentile=0.05)
        flagged += int(running.first_sight(*ends(fresh)).sum())
    bound = range_of(torch.zeros(40, COLUMNS, 2), percentile=0.05).false_alarm_bound
    assert 0.5 * bound < flagged / 3000 < bound


def test_nothing_is_in_range_before_calibration() -> None:
    with pytest.raises(NotTestable, match="Calibrate"):
        _ = RunningRange.empty(COLUMNS).false_alarm_bound
    row = torch.zeros(1, COLUMNS)
    for percentile in (0.0, 0.1):
        with pytest.raises(NotTestable, match="Calibrate"):
            RunningRange.empty(COLUMNS, percentile=percentile).first_sight(row, row)


def test_what_would_pass_as_clean_is_refused() -> None:
    running = range_of(torch.zeros(5, COLUMNS, 2))
    zero = torch.zeros(2, COLUMNS)
    for maxima, minima in (
        (zero + math.nan, zero),
        (zero, zero + math.nan),
        (zero, zero[:1]),  # would broadcast
        (zero[:, :1], zero[:, :1]),
        (zero - 0.5, zero),
    ):
        for refused in (running.absorb, running.exceedance, running.first_sight):
            with pytest.raises(ValueError, match="maxim"):
                refused(maxima, minima)
    assert running.n == 5


def test_what_cannot_be_a_range_is_refused() -> None:
    running = range_of(torch.zeros(5, COLUMNS, 2))
    for refused in (
        lambda: RunningRange.empty(1, slack=-0.1),
        lambda: RunningRange.empty(1, slack=math.nan),
        lambda: RunningRange.empty(1, percentile=0.5),
        lambda: RunningRange.empty(1, percentile=-0.1),
        lambda: RunningRange(ScoreSketch.empty(1), ScoreSketch.empty(2)),
        lambda: RunningRange(running.maxima, ScoreSketch.empty(COLUMNS)),
        lambda: running.merge(RunningRange.empty(COLUMNS, slack=0.0)),
        lambda: running.merge(RunningRange.empty(COLUMNS, percentile=0.1)),
        lambda: running.merge(RunningRange.empty(COLUMNS + 1)),
    ):
        with pytest.raises(ValueError):
            refused()
    assert running.n == 5


def test_the_state_of_a_thousand_directions_stays_below_5_mb() -> None:
    values = torch.randn(2_000, 1_000, generator=torch.Generator().manual_seed(0))
    running = RunningRange.empty(1_000).absorb(values, values - 1)
    for _ in range(10):
        copies = (ScoreSketch.from_bytes(sketch.to_bytes()) for sketch in (running.maxima, running.minima))
        running.merge(RunningRange(*copies))
    assert running.n == 2_000 * 2**10
    assert len(running.maxima.to_bytes()) + len(running.minima.to_bytes()) < 5e6
