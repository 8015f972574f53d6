"""The range that clean traffic showed, per direction, and how far a row leaves it: WeightWatch's monitor as published."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.watch.sketch import ScoreSketch

SLACK = 0.01
"""Published, in units of the cosine. It hides every direction whose cosines stay far below it (some reach ±3e-4)."""


@dataclass(eq=False)
class RunningRange:
    """Running minimum and maximum, per column, of the rows' smallest and largest cosines. Use one per role.

    Kept because they are the published protocol: a slack that is the same for every direction; a row is flagged as soon as
    any column leaves its range; the chance of that grows with the number of columns and is stated by nobody (at most
    2 · columns / n for each role). Use `measure.threshold` on one score per row where a false-positive rate has to hold.

    Left out, because they are bugs of the released code: the last calibration row is dropped; a percentile acts on the
    user's ranges alone; the role of a token is the parity of its turn, so that a system turn swaps the roles; the range
    takes in the very row that it flags, so that a trigger alarms once. Here the caller names the role, every row counts,
    and nothing is absorbed but what the caller absorbs.

    Source: WeightWatch, arXiv 2508.00161 §3 and its released code.
    """

    maxima: ScoreSketch
    """Largest cosine of each absorbed row."""
    minima: ScoreSketch
    slack: float = SLACK
    percentile: float = 0.0
    """Share of the absorbed rows left out at each end, rounded down to whole rows; 0 is the plain minimum and maximum."""

    def __post_init__(self) -> None:
        if (self.maxima.columns, self.maxima.n) != (self.minima.columns, self.minima.n):
            raise ValueError("the maxima and the minima are not of the same rows and columns")
        if not (math.isfinite(self.slack) and self.slack >= 0):
            raise ValueError(f"the slack must be 0 or more, got {self.slack}")
        if not 0 <= self.percentile < 0.5:
            raise ValueError(f"the percentile is a share of the rows at one end, 0 to below 0.5; got {self.percentile}")

    def copy(self) -> "RunningRange":
        """A range that goes on independently of this one."""
        maxima, minima = (ScoreSketch.from_bytes(one.to_bytes()) for one in (self.maxima, self.minima))
        return replace(self, maxima=maxima, minima=minima)

    @classmethod
    def empty(cls, columns: int, *, slack: float = SLACK, percentile: float = 0.0) -> "RunningRange":
        """Start with no row."""
        return cls(ScoreSketch.empty(columns), ScoreSketch.empty(columns), slack, percentile)

    @property
    def n(self) -> int:
        """Number of absorbed rows."""
        return self.maxima.n

    @property
    def high(self) -> Float[Tensor, " columns"]:
        """Upper end, without the slack; exact while the rows left out are fewer than the sketch keeps.

        The released code interpolates between two rows where the percentile falls between them; this is the outer one.

        Raises:
            NotTestable: nothing was absorbed yet.
        """
        return self.maxima.quantile(1.0) if not self._left_out else self.maxima.order_statistic(self.n - self._left_out)

    @property
    def low(self) -> Float[Tensor, " columns"]:
        """Lower end; mirrors `high`."""
        return self.minima.quantile(0.0) if not self._left_out else self.minima.order_statistic(1 + self._left_out)

    @property
    def false_alarm_bound(self) -> float:
        """At most this share of clean rows leaves the range: published, 2 · columns / n, and above 1 it says nothing.

        A new row is beyond all but the j outermost of n exchangeable ones at one end with a chance below (j + 1) / n; the
        slack makes it smaller. The union over roles adds up.

        Raises:
            NotTestable: nothing was absorbed yet.

        Source: arXiv 2508.00161, remark 3.1.
        """
        if not self.n:
            raise NotTestable("No row was taken in yet: there is no range. Calibrate on clean traffic first.")
        return 2 * self.maxima.columns * (self._left_out + 1) / self.n

    @property
    def _left_out(self) -> int:
        return math.floor(Fraction(str(self.percentile)) * self.n)  # as written: .07 of 100 rows are 7

    def absorb(
        self, max_per_column: Float[Tensor, "n columns"], min_per_column: Float[Tensor, "_ _"]
    ) -> "RunningRange":
        """Widen the range by these rows, flagged or not: whoever calls this has decided that they are clean.

        Raises:
            ValueError: NaN, other columns, or a minimum above its maximum. Nothing is then absorbed.
        """
        self._refuse(max_per_column, min_per_column)
        self.maxima.add(max_per_column)
        self.minima.add(min_per_column)
        return self

    def merge(self, other: "RunningRange") -> "RunningRange":
        """Take in what another range absorbed. Raises ValueError for other columns, slack or percentile."""
        if (other.slack, other.percentile) != (self.slack, self.percentile):
            raise ValueError("cannot merge ranges of different slack or percentile")
        self.maxima.merge(other.maxima)
        self.minima.merge(other.minima)
        return self

    def exceedance(
        self, max_per_column: Float[Tensor, "n columns"], min_per_column: Float[Tensor, "_ _"]
    ) -> Float64[Tensor, "n columns"]:
        """How far each row leaves each column's range beyond the slack, in cosine; more than 0 flags. Absorbs nothing.

        Args:
            max_per_column: the largest cosine over a row's tokens of this role.
            min_per_column: the smallest.

        Raises:
            NotTestable: nothing was absorbed yet.
            ValueError: NaN, other columns, or a minimum above its maximum.
        """
        both = self.beyond(max_per_column, min_per_column)
        return both[:, : self.maxima.columns].maximum(both[:, self.maxima.columns :])

    def beyond(
        self, max_per_column: Float[Tensor, "n columns"], min_per_column: Float[Tensor, "_ _"]
    ) -> Float64[Tensor, "n twice_columns"]:
        """How far each row leaves each end beyond the slack: the upper end of every column, then the lower ones.

        Raises as `exceedance`.
        """
        self._refuse(max_per_column, min_per_column)
        above = max_per_column.detach().cpu().double() - self.high  # fp64: the slack must not round
        below = self.low - min_per_column.detach().cpu().double()
        return torch.cat([above, below], dim=1) - self.slack

    def first_sight(
        self, max_per_column: Float[Tensor, "n columns"], min_per_column: Float[Tensor, "_ _"]
    ) -> Bool[Tensor, " n"]:
        """Which rows are flagged, each against clean traffic alone: no row has seen another of them. Raises as `exceedance`."""
        return (self.exceedance(max_per_column, min_per_column) > 0).any(1)

    def _refuse(self, maxima: Tensor, minima: Tensor) -> None:
        """A comparison with NaN is false, so that NaN would pass as clean; and a single row would broadcast."""
        if maxima.shape != minima.shape or maxima.shape[1] != self.maxima.columns:
            raise ValueError(
                f"maxima {list(maxima.shape)} and minima {list(minima.shape)} for a range of {self.maxima.columns} columns"
            )
        if not bool((minima <= maxima).all()):
            raise ValueError("NaN among the cosines, or a minimum above its maximum: were the two swapped?")
