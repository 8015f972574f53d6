import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, cluster_bootstrap, proportion

COUNTS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def mean(values: torch.Tensor) -> float:
    return float(values.mean())


@given(COUNTS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_proportion_is_the_exact_binomial_interval(counts: tuple[int, int], confidence: float) -> None:
    k, n = counts
    found = proportion(k, n, confidence)
    exact = binomtest(k, n).proportion_ci(confidence, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert (found.estimate, found.n) == (k / n, n)


@given(COUNTS)
def test_proportion_mirrors(counts: tuple[int, int]) -> None:
    k, n = counts
    a, b = proportion(k, n), proportion(n - k, n)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low), abs=1e-9)


def test_a_rate_over_nothing_is_not_testable() -> None:
    with pytest.raises(NotTestable, match="0 trials"):
        proportion(0, 0)
    for k in (-1, 4):
        with pytest.raises(ValueError, match="in 3 trials"):
            proportion(k, 3)


@pytest.mark.parametrize(
    ("estimate", "low", "high", "n"),
    [(0.5, 0.6, 0.4, 3), (math.nan, 0.0, 1.0, 3), (0.0, math.nan, 1.0, 3), (0.5, 0.0, 1.0, 0)],
)
def test_what_is_no_interval_is_refused(estimate: float, low: float, high: float, n: int) -> None:
    with pytest.raises(ValueError, match="interval"):
        Interval(estimate, low, high, n)


def test_an_interval_prints_itself() -> None:
    assert str(Interval(0.91234, 0.8, 0.97, 50)) == "0.912 [0.8, 0.97]"


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = cluster_bootstrap(values, range(400), mean, seed=0)
    half = 1.96 * float(values.std()) / 20
    assert found.estimate == mean(values)
    assert found.n == 400
    assert (found.low, found.high) == pytest.approx((found.estimate - half, found.estimate + half), abs=0.1 * half)


def test_copies_of_a_row_in_one_cluster_add_no_certainty() -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(1))
    alone = cluster_bootstrap(values, range(60), mean, seed=3)
    copied = cluster_bootstrap(values.repeat_interleave(5), [i // 5 for i in range(300)], mean, seed=3)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=1e-6)
    naive = cluster_bootstrap(values.repeat_interleave(5), range(300), mean, seed=3)
    assert naive.high - naive.low < 0.6 * (copied.high - copied.low)


def test_limits_cover_as_often_as_they_claim() -> None:
    rng = torch.Generator().manual_seed(0)
    held = 0
    for trial in range(150):  # 30 clusters of 4 rows; the mean of exp(x) is skewed, so percentiles alone fall short
        centre = torch.randn(30, 1, generator=rng)
        rows = (centre + 0.3 * torch.randn(30, 4, generator=rng)).exp().flatten()
        found = cluster_bootstrap(rows, [i // 4 for i in range(120)], mean, seed=trial, resamples=300)
        held += found.low <= math.exp((1 + 0.09) / 2) <= found.high
    assert 0.84 <= held / 150 <= 0.99


@given(st.lists(st.integers(0, 6), min_size=5, max_size=30).filter(lambda x: len(set(x)) > 1), st.integers(0, 99))
@settings(max_examples=20)
def test_rows_of_their_own_get_scipys_bca_limits(values: list[int], seed: int) -> None:
    skewed = torch.tensor(values, dtype=torch.float64) ** 3  # whole numbers tie, so ties count, too
    found = cluster_bootstrap(skewed, range(len(values)), mean, seed=seed)
    exact = bootstrap(
        (skewed.numpy(),), np.mean, n_resamples=1000, method="BCa", rng=np.random.default_rng(seed)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=1e-6)


def test_bootstrap_repeats_itself_and_depends_on_the_seed() -> None:
    values = torch.arange(20.0)
    a, b, c = (cluster_bootstrap(values, range(20), mean, seed=seed) for seed in (0, 0, 1))
    assert a == b != c


def test_rows_of_any_width_keep_their_columns() -> None:
    values = torch.stack([torch.arange(12.0), torch.arange(12.0) + 5], 1)
    found = cluster_bootstrap(values, list("aabbccddeeff"), lambda v: float((v[:, 1] - v[:, 0]).mean()), seed=0)
    assert (found.estimate, found.low, found.high, found.n) == (5, 5, 5, 6)


def test_bootstrap_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(NotTestable, match="at least 2 independent groups"):
        cluster_bootstrap(torch.zeros(3), "aaa", mean, seed=0)
    with pytest.raises(ValueError, match="2 clusters for 3 rows"):
        cluster_bootstrap(torch.zeros(3), "ab", mean, seed=0)
    with pytest.raises(ValueError, match="undefined on a resample"):
        cluster_bootstrap(torch.arange(4.0), "abcd", lambda v: math.nan if (v == 0).all() else 1.0, seed=0)
