"""Confidence intervals: exact binomial limits, and a bootstrap over independent clusters of rows."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri
from torch import Tensor

from molehunt.errors import NotTestable


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence limits."""

    estimate: float
    low: float
    high: float
    n: int
    """Number of independent draws: trials of a proportion, or clusters of a bootstrap."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"an interval needs at least one draw, got n = {self.n}")
        if not math.isfinite(self.estimate) or not self.low <= self.high:
            raise ValueError(f"not an interval: {self.estimate} in [{self.low}, {self.high}]")

    def __str__(self) -> str:
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def fixed(self, digits: int = 2, sign: str = "") -> str:
        """The estimate and its limits with this number of decimals, such as `0.93 [0.86, 0.97]`; `+` shows each sign."""
        return " ".join(
            (
                f"{self.estimate:{sign}.{digits}f}",
                f"[{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]",
            )
        )


def proportion(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Rate of `k` successes in `n` independent trials, with exact limits: their coverage is at least `confidence`.

    Raises:
        NotTestable: there was no trial.
        ValueError: `k` lies outside 0..n.

    Source: Clopper and Pearson, Biometrika 26 (1934).
    """
    if n == 0:
        raise NotTestable("A rate over 0 trials says nothing. Give more rows of this kind.")
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} trials")
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return Interval(k / n, low, high, n)


def cluster_bootstrap(
    values: Shaped[Tensor, "n ..."],
    clusters: Sequence[Hashable],
    statistic: Callable[[Tensor], float],
    *,
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """BCa limits for `statistic(values)` from draws of whole clusters, because rows of one cluster are not independent.

    Args:
        values: one row per observation.
        clusters: the cluster of each row: a document, a template, a model organism.
        statistic: function of any number of rows; rows of one cluster stay together.
        seed: seed of the draws.
        resamples: number of draws.
        confidence: coverage of the limits.

    Returns:
        An interval whose `n` is the number of clusters. Its width is 0 when all resamples agree (such as AUROC 1.0 in
        each of them). Such data holds no information on its own spread: report `proportion` of the clusters beside it.

    Raises:
        NotTestable: there are fewer than two clusters.
        ValueError: there is not one cluster per row, or the statistic is not finite on a resample.

    Source: Efron, JASA 82 (1987); jackknife over clusters for the acceleration.
    """
    if len(clusters) != len(values):
        raise ValueError(f"{len(clusters)} clusters for {len(values)} rows")
    members: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(row)
    groups = [torch.tensor(rows) for rows in members.values()]
    m = len(groups)
    if m < 2:
        raise NotTestable(f"An interval needs at least 2 independent groups of rows, got {m}.")

    def over(chosen: Sequence[int]) -> float:
        return float(statistic(values[torch.cat([groups[i] for i in chosen])]))

    estimate = float(statistic(values))
    draws = np.random.default_rng(seed).integers(m, size=(resamples, m))
    drawn = np.array([over(row.tolist()) for row in draws])
    left_out = np.array([over([i for i in range(m) if i != out]) for out in range(m)])
    if not (np.isfinite(drawn).all() and np.isfinite(left_out).all()):
        raise ValueError("the statistic is undefined on a resample: group the rows so that each draw can hold it")
    return Interval(estimate, *_bca_limits(estimate, drawn, left_out, confidence), m)


def _bca_limits(
    estimate: float, drawn: NDArray[np.float64], left_out: NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """Limits from the statistic on resamples (`drawn`) and without each cluster in turn (`left_out`)."""
    tied = np.isclose(drawn, estimate, rtol=1e-6, atol=0)  # the same rows in another order round differently
    below = float((~tied & (drawn < estimate)).mean() + tied.mean() / 2)
    bias = float(ndtri(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn))))
    skew = left_out.mean() - left_out
    spread = float((skew**2).sum() ** 1.5)
    acceleration = float((skew**3).sum()) / (6 * spread) if spread > 0 else 0.0

    def limit(q: float) -> float:
        z = bias + float(ndtri(q))
        return float(np.quantile(drawn, ndtr(bias + z / (1 - acceleration * z))))

    tail = (1 - confidence) / 2
    return limit(tail), limit(1 - tail)
