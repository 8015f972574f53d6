"""What one attack, one control or one suffix reached on all rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.measure.interval import Interval, proportion
from molehunt.measure.paired import PairedDifference, paired_difference
from molehunt.stress.evaluation.drift import WatchedDrift
from molehunt.stress.evaluation.norms import curve, epsilon50, recovery_lengths

CURVE_LENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Lengths at which recovery curves are read, in units of the median ‖h‖."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Arm:
    """One attack on all rows."""

    name: str
    recovered_rows: tuple[bool, ...]
    """Rows whose decoded answer shows the behaviour again."""
    length: Float[Tensor, " rows"]
    """‖δ‖ in units of the median ‖h‖."""
    drift: WatchedDrift

    @property
    def recovered(self) -> Interval:
        """Share of rows that recovered."""
        return proportion(sum(self.recovered_rows), len(self.recovered_rows))

    @property
    def lengths(self) -> Float[Tensor, " rows"]:
        """Length at which each row recovered; infinite where it did not."""
        return recovery_lengths(self.length, torch.tensor(self.recovered_rows))

    @property
    def epsilon50(self) -> Interval | None:
        return epsilon50(self.lengths)

    def curve(self, at: Sequence[float] = CURVE_LENGTHS) -> list[float]:
        """Share of rows that recover within each length."""
        return curve(self.lengths, at)


@dataclass(frozen=True, eq=False, kw_only=True)
class Control:
    """One control on the rows of the last arm."""

    name: str
    recovered_rows: tuple[bool, ...]
    """Rows on which the control reached its aim."""
    lengths: Float[Tensor, " rows"] | None = None
    """Lengths of a control that searches for a shortest perturbation of its own."""

    @property
    def recovered(self) -> Interval:
        """Share of rows on which the control reached its aim."""
        return proportion(sum(self.recovered_rows), len(self.recovered_rows))

    @property
    def epsilon50(self) -> Interval | None:
        return None if self.lengths is None else epsilon50(self.lengths)

    def curve(self, at: Sequence[float] = CURVE_LENGTHS) -> list[float]:
        """Share of rows that reach the aim within each length; only for a control that searches."""
        assert self.lengths is not None
        return curve(self.lengths, at)


@dataclass(frozen=True, eq=False, kw_only=True)
class InputArm:
    """One kind of suffix on all rows. Only the prompt is changed."""

    name: str
    recovered_rows: tuple[bool, ...]
    """Rows whose decoded answer shows the behaviour again."""
    random_target_rows: tuple[bool, ...]
    """Rows whose decoded answer begins with another prompt's, where that was the target of the same attack."""
    drift: WatchedDrift
    """Drift of the watched values as the fix reads them, before its edit, against the same row without a suffix."""

    @property
    def recovered(self) -> Interval:
        """Share of rows that recovered."""
        return proportion(sum(self.recovered_rows), len(self.recovered_rows))

    @property
    def random_target(self) -> Interval:
        """Share of rows on which the random target was reached."""
        return proportion(sum(self.random_target_rows), len(self.random_target_rows))

    @property
    def beyond_random_target(self) -> PairedDifference:
        """How much more often the behaviour recovers than a random target is reached."""
        return paired_difference(self.recovered_rows, self.random_target_rows)
