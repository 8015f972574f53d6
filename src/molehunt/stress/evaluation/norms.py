"""Lengths at which rows recover: the curve over ε, its half-way point, and how two attacks compare row by row."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Bool, Float
from scipy.stats import binom
from torch import Tensor

from molehunt.measure.interval import Interval

ROUNDING = 1e-4
"""Share by which a perturbation that fills its ball may come out longer."""


def recovery_lengths(norm: Float[Tensor, " rows"], recovered: Bool[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """The length at which each row recovers; infinite where it did not."""
    return torch.where(recovered, norm, torch.inf)


def curve(lengths: Float[Tensor, " rows"], at: Sequence[float]) -> list[float]:
    """Share of rows that recover within each length."""
    return [float((lengths <= radius * (1 + ROUNDING)).float().mean()) for radius in at]


def epsilon50(lengths: Float[Tensor, " rows"], clusters: Sequence[Hashable] | None = None) -> Interval | None:
    """The length at which half of the rows recover. None where fewer than half ever do, or too few rows for limits.

    Args:
        lengths: as `recovery_lengths` gives them, in any unit.
        clusters: what was drawn independently, such as the question of each row; each row by default.
    """
    return median(lengths, clusters)


def times_longer(
    lengths: Float[Tensor, " rows"], others: Float[Tensor, " rows"], clusters: Sequence[Hashable] | None = None
) -> Interval | None:
    """Median over rows of lengths / others. Rows that recovered under neither attack count as 1; None as in `epsilon50`."""
    neither = lengths.isinf() & others.isinf()
    return median(torch.where(neither, 1.0, lengths / others), clusters)


def median(
    values: Float[Tensor, " rows"], clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Interval | None:
    """The median with the limits of order statistics, which assume no distribution and may be infinite.

    Each cluster counts once, with its median. None where the median is infinite or there are fewer than 6 clusters, whose
    extremes do not make an interval of 95 %. Source: the sign test's interval (Conover, 1999, §3.4).
    """
    members: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values.tolist(), range(len(values)) if clusters is None else clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    once = sorted(sorted(some)[(len(some) - 1) // 2] for some in members.values())
    n = len(once)
    if not n:
        return None
    tail = (1 - confidence) / 2
    low = int(binom.ppf(tail, n, 0.5))
    low -= bool(binom.cdf(low, n, 0.5) > tail)
    if low < 0:
        return None
    middle = (once[(n - 1) // 2] + once[n // 2]) / 2
    if middle == float("inf"):
        return None
    return Interval(middle, once[low], once[n - 1 - low], n)
