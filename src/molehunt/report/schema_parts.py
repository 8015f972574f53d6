"""What every part of a report is built from: records that refuse unknown fields, and numbers with their interval."""

import math
from dataclasses import dataclass
from typing import ClassVar

from molehunt.measure.interval import Interval


@dataclass(frozen=True, kw_only=True)
class Forbidding:
    """Base of every part: unknown fields are refused when a report is read back."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Measure(Forbidding):
    """A number, its 95 % interval and how many draws are behind it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def from_interval(cls, interval: Interval) -> "Measure":
        """An estimate with its interval. An upper limit may be infinite, which JSON cannot hold: it becomes None."""
        high = interval.high if math.isfinite(interval.high) else None
        return cls(value=interval.estimate, low=interval.low, high=high, n=interval.n)
