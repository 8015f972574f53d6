"""From an answer's extremes along many directions to one score. Each is fitted on clean answers of one prefix length.

The scores go from what is published to what works best: see docs/guides/watch.md for what each one catches.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

SUMMED = 32
"""Number of columns whose exceedances are added up."""
TAIL = 0.9
"""Quantile above which a column's tail begins."""
SMALLEST = 1e-9
"""Scale of a column that never varied."""


@runtime_checkable
class RowScore(Protocol):
    """Extremes → one score per answer; higher is more suspicious."""

    def __call__(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]: ...

    def by_column(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Contribution of each column to the score, or its own score in the same units."""
        ...


@dataclass(frozen=True, eq=False)
class RangeExceedance:
    """How far the worst column lies beyond its clean range, in its own units. Source: arXiv 2508.00161 §3, without slack."""

    high: Float[Tensor, " columns"]

    @classmethod
    def fit(cls, clean: Float[Tensor, "rows columns"]) -> "RangeExceedance":
        return cls(clean.amax(0))

    def __call__(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        return self.by_column(extremes).amax(1)

    def by_column(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return extremes - self.high


@dataclass(frozen=True, eq=False)
class RobustMax:
    """Worst column in interquartile ranges from its median: the plain normalisation, which heavy tails defeat."""

    median: Float[Tensor, " columns"]
    scale: Float[Tensor, " columns"]

    @classmethod
    def fit(cls, clean: Float[Tensor, "rows columns"]) -> "RobustMax":
        low, median, high = (quantile(clean, q) for q in (0.25, 0.5, 0.75))
        return cls(median, (high - low).clamp_min(SMALLEST))

    def __call__(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        return self.by_column(extremes).amax(1)

    def by_column(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return (extremes - self.median) / self.scale


@dataclass(frozen=True, eq=False)
class MahalanobisScore:
    """Distance of all extremes together from clean ones, columns standardised, covariance shrunk to the identity."""

    mean: Float[Tensor, " columns"]
    scale: Float[Tensor, " columns"]
    whiten: Float[Tensor, "columns columns"]

    @classmethod
    def fit(cls, clean: Float[Tensor, "rows columns"], shrink: float = 0.1) -> "MahalanobisScore":
        mean, scale = clean.double().mean(0), clean.double().std(0).clamp_min(SMALLEST)
        standard = (clean.double() - mean) / scale
        covariance = standard.mT @ standard / max(len(clean) - 1, 1)
        shrunk = (1 - shrink) * covariance + shrink * torch.eye(len(mean), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(shrunk)
        return cls(mean.float(), scale.float(), (vectors / values.clamp_min(SMALLEST).sqrt()).float())

    def __call__(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        return (((extremes - self.mean) / self.scale) @ self.whiten).norm(dim=1)

    def by_column(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return (extremes - self.mean) / self.scale


@dataclass(frozen=True, eq=False)
class TailSum:
    """Sum of the largest exceedances of clean tails, each column in units of its own tail.

    A column's tail begins at its `TAIL` quantile and is as wide as its mean excess there, so that an exponential tail
    gives one unit per factor e of rarity. A backdoor moves many columns a little out of what clean text shows; noise
    moves one of them far. The `SUMMED` largest are added, so the noise of a single column does not rule the score.
    """

    start: Float[Tensor, " columns"]
    scale: Float[Tensor, " columns"]
    summed: int = SUMMED

    @classmethod
    def fit(cls, clean: Float[Tensor, "rows columns"], summed: int = SUMMED) -> "TailSum":
        return cls(*tail(clean), summed)

    def __call__(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        beyond = self.by_column(extremes)
        return beyond.topk(min(self.summed, beyond.shape[1]), dim=1).values.sum(1)

    def by_column(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return ((extremes - self.start) / self.scale).clamp_min(0)


def tail(
    clean: Float[Tensor, "rows columns"], begins: float = TAIL
) -> tuple[Float[Tensor, " columns"], Float[Tensor, " columns"]]:
    """Start of each column's upper tail, at that quantile, and the mean excess there."""
    start = quantile(clean, begins)
    excess = (clean - start).clamp_min(0)
    return start, (excess.sum(0) / (excess > 0).sum(0).clamp_min(1)).clamp_min(SMALLEST)


def quantile(values: Float[Tensor, "rows columns"], q: float) -> Float[Tensor, " columns"]:
    """The smallest value that a share `q` of a column does not exceed; of any size, unlike `torch.quantile`."""
    return values.kthvalue(max(1, math.ceil(q * len(values))), dim=0).values
