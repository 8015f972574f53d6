"""Two one-sided tests on paired rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from molehunt.measure.equivalence import LEVEL, paired_equivalence

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300)


@given(PAIRS, st.floats(0.01, 0.3))
def test_it_is_the_interval_within_the_margin_and_symmetric(rows: list[tuple[bool, bool]], margin: float) -> None:
    first, second = [a for a, _ in rows], [b for _, b in rows]
    found, swapped = paired_equivalence(first, second, margin), paired_equivalence(second, first, margin)
    assert found.difference.estimate == pytest.approx(-swapped.difference.estimate, abs=1e-12)
    assert found.p_value == pytest.approx(swapped.p_value, abs=1e-12)
    within = -margin < found.difference.low and found.difference.high < margin
    if abs(found.p_value - LEVEL) > 1e-9:
        assert found.equivalent == within


def test_by_the_slow_formula() -> None:
    b, c, n = 9, 4, 200
    first = [True] * b + [False] * c + [True] * (n - b - c)
    second = [False] * b + [True] * c + [True] * (n - b - c)
    table = np.array([n - b - c, b, c, 0]) + 0.5
    share = table / table.sum()
    d = share[1] - share[2]
    error = np.sqrt((share[1] + share[2] - d**2) / table.sum())
    found = paired_equivalence(first, second)
    assert found.difference.estimate == pytest.approx(d)
    assert found.p_value == pytest.approx(max(norm.sf((d + 0.05) / error), norm.cdf((d - 0.05) / error)))


@pytest.mark.parametrize("gap", [0.05, 0.10])
def test_unequal_rates_are_seldom_called_equal(gap: float) -> None:
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(600):
        second = rng.random(400) < 0.8
        first = np.where(second, True, rng.random(400) < gap / 0.2)
        called += paired_equivalence(first.tolist(), second.tolist()).equivalent
    assert called / 600 <= LEVEL + 0.025  # three standard errors of 600 draws


def test_few_rows_prove_nothing_and_many_equal_ones_do() -> None:
    assert not paired_equivalence([True] * 10, [True] * 10).equivalent
    assert paired_equivalence([True] * 400, [True] * 400).equivalent
    for first, second, margin in (([], [], 0.05), ([True], [], 0.05), ([True], [True], 0.0)):
        with pytest.raises(ValueError, match=r"paired rates|a margin"):
            paired_equivalence(first, second, margin)
