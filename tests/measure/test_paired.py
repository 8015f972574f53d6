"""Two ways on the same rows: exact limits and the exact test, against scipy and against every possible table."""

from itertools import product
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from molehunt.errors import NotTestable
from molehunt.measure.paired import PairedDifference, paired_difference


def rows(only_first: int, only_second: int, both: int, neither: int) -> tuple[list[bool], list[bool]]:
    table = [(True, False)] * only_first + [(False, True)] * only_second + [(True, True)] * both
    table += [(False, False)] * neither
    return [a for a, _ in table], [b for _, b in table]


def of(*table: int) -> PairedDifference:
    return paired_difference(*rows(*table))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(1, 9))
def test_the_test_is_mcnemars_and_the_estimate_the_difference_of_shares(
    k: int, m: int, both: int, neither: int
) -> None:
    found, n = of(k, m, both, neither), k + m + both + neither
    first, second = rows(k, m, both, neither)
    assert found.difference.estimate == pytest.approx(sum(first) / n - sum(second) / n)
    assert (found.only_first, found.only_second, found.difference.n) == (k, m, n)
    expected = binomtest(k, k + m).pvalue if k + m else 1.0
    assert found.p_value == pytest.approx(expected)
    gained, lost = (binomtest(one, n).proportion_ci(0.975, method="exact") for one in (k, m))
    assert found.difference.low == pytest.approx(gained.low - lost.high)
    assert found.difference.high == pytest.approx(gained.high - lost.low)
    assert -1 <= found.difference.low <= found.difference.estimate <= found.difference.high <= 1
    back = paired_difference(second, first)
    assert (back.difference.low, back.difference.high) == (-found.difference.high, -found.difference.low)
    assert back.p_value == found.p_value


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.1, 0.1), (0.3, 0.05), (0.02, 0.5), (0.0, 0.2)])
def test_the_limits_cover_as_often_as_they_claim(shares: tuple[float, float]) -> None:
    n, (p, q) = 12, shares
    covered = 0.0
    for k, m in product(range(n + 1), repeat=2):
        if k + m <= n:
            rest = n - k - m
            limits = of(k, m, 0, rest).difference
            if limits.low <= p - q <= limits.high:
                covered += comb(n, k) * comb(n - k, m) * p**k * q**m * (1 - p - q) ** rest
    assert covered >= 0.95


def test_rows_that_all_agree_are_no_proof_of_equality() -> None:
    few, many = of(0, 0, 5, 5).difference, of(0, 0, 500, 500).difference
    assert few.estimate == many.estimate == 0
    assert few.high > 0.2 > 0.01 > many.high > 0 > many.low == -many.high


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(NotTestable):
        paired_difference([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_difference([True], [True, False])
