"""The sign-flip test: equal to all patterns gone through slowly, and level under the null."""

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.measure.sign_flip import EXACT, sign_flip_p

values = st.lists(st.integers(-6, 6).map(lambda n: n / 4), min_size=1, max_size=9)


def slowly(differences: list[float]) -> float:
    """All patterns of the rows that have a difference; the sum of quarters is exact."""
    kept = [d for d in differences if d]
    sums = [sum(sign * d for sign, d in zip(signs, kept, strict=True)) for signs in product((1, -1), repeat=len(kept))]
    return sum(one >= sum(kept) for one in sums) / len(sums)


@given(values)
def test_it_equals_all_patterns_gone_through(differences: list[float]) -> None:
    assert sign_flip_p(differences) == pytest.approx(slowly(differences))


@given(values, st.randoms())
def test_order_and_rows_without_a_difference_do_not_matter(differences: list[float], rng: Random) -> None:
    mixed = [*differences, 0.0, 0.0]
    rng.shuffle(mixed)
    assert sign_flip_p(mixed) == sign_flip_p(differences)


@pytest.mark.parametrize("n", [1, 8, EXACT])
def test_rows_that_all_agree_have_the_least_p_value_there_is(n: int) -> None:
    assert sign_flip_p([1.0] * n) == 2**-n
    assert sign_flip_p([-1.0] * n) == 1 == sign_flip_p([0.0] * n)


@pytest.mark.parametrize("n", [10, 40])
def test_without_an_effect_one_in_twenty_passes(n: int) -> None:
    rng = Random(n)
    passed = sum(sign_flip_p([rng.gauss(0, 1) for _ in range(n)], seed=i) <= 0.05 for i in range(300))
    assert 5 <= passed <= 28
