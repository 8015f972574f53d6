"""Test whether two methods are equally good on the same rows: failing to find a difference does not prove equality."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtr, ndtri

from molehunt.measure.interval import Interval

MARGIN = 0.05
"""Largest difference of two shares that count as equal."""
LEVEL = 0.05
"""Probability of calling unequal shares equal."""


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Result of the equivalence test of two success rates on the same rows."""

    difference: Interval
    """First minus second rate, with the 1 − 2·level interval. It lies within ±margin exactly if the rates are equivalent."""
    margin: float
    p_value: float

    @property
    def equivalent(self) -> bool:
        return self.p_value < LEVEL


def paired_equivalence(first: Sequence[bool], second: Sequence[bool], margin: float = MARGIN) -> Equivalence:
    """Two one-sided tests (Schuirmann 1987) of the difference of two paired proportions.

    The standard error is Agresti and Min's (Stat. Med. 24:729, 2005): Wald with half a row added to each cell of the
    table, so that rows which all agree do not make the difference certain.

    Raises:
        ValueError: there are no rows, or the numbers of rows differ, or the margin is outside 0..1.
    """
    n = len(first)
    if not n or len(second) != n:
        raise ValueError(f"paired rates need as many rows of each, got {n} and {len(second)}")
    if not 0 < margin < 1:
        raise ValueError(f"a margin lies between 0 and 1, got {margin}")
    only_first = 0.5 + sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = 0.5 + sum(b and not a for a, b in zip(first, second, strict=True))
    rows = n + 2
    difference = (only_first - only_second) / rows
    error = math.sqrt(only_first + only_second - (only_first - only_second) ** 2 / rows) / rows
    wide = float(ndtri(1 - LEVEL)) * error
    p_value = max(float(ndtr(-(difference + margin) / error)), float(ndtr((difference - margin) / error)))
    return Equivalence(
        difference=Interval(difference, max(-1.0, difference - wide), min(1.0, difference + wide), n),
        margin=margin,
        p_value=p_value,
    )
