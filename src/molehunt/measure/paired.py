"""Two ways on the same rows, each right or wrong: how far their shares lie apart, with exact limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import bdtr

from molehunt.measure.interval import Interval, proportion


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Of two shares on the same rows."""

    difference: Interval
    """First minus second."""
    only_first: int
    """Rows that are right in the first way alone."""
    only_second: int
    p_value: float
    """Of the exact McNemar test, two-sided: how surprising these two counts are where neither way is better."""


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """Exact comparison of two ways.

    The limits cover at least as often as they claim, whatever the truth: both one-sided shares (right in one way alone)
    have exact limits at half the error, and the difference of the shares is theirs. Rows that all agree therefore leave
    a width, which says what so many rows could have missed.

    Raises:
        NotTestable: no rows.
        ValueError: unequal numbers of rows.

    Source: Clopper and Pearson 1934 with Bonferroni; McNemar, Psychometrika 12 (1947), in its exact binomial form.
    """
    n = len(first)
    if len(second) != n:
        raise ValueError(f"paired shares need as many rows of each, got {n} and {len(second)}")
    k, m = (sum(a and not b for a, b in zip(*ways, strict=True)) for ways in ((first, second), (second, first)))
    each = (1 + confidence) / 2
    gained, lost = proportion(k, n, each), proportion(m, n, each)
    return PairedDifference(
        difference=Interval((k - m) / n, gained.low - lost.high, gained.high - lost.low, n),
        only_first=k,
        only_second=m,
        p_value=min(1.0, 2 * float(bdtr(min(k, m), k + m, 0.5))),
    )
