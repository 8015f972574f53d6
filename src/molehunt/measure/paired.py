"""Compares two methods that are right or wrong on the same rows: the difference of their shares, with exact limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import bdtr

from molehunt.measure.interval import Interval, proportion


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Difference of two shares on the same rows."""

    difference: Interval
    """First minus second share."""
    only_first: int
    """Number of rows that only the first method gets right."""
    only_second: int
    """Number of rows that only the second method gets right."""
    p_value: float
    """Two-sided p-value of the exact McNemar test that neither method is better."""


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """Exact comparison of two methods.

    The coverage of the limits is at least `confidence`: both one-sided shares (right in one method only) have exact limits
    at half the error, and the limits of the difference follow from them. If the methods agree on all rows, the interval
    still has a width, which states the difference that so many rows could have missed.

    Raises:
        NotTestable: there are no rows.
        ValueError: the numbers of rows differ.

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
