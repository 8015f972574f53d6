"""What the scores of traffic are compared with: clean rows of the user's, bundled prompts, or the traffic itself.

A threshold holds for text of the kind that it comes from. So bundled prompts are only used for traffic about their own
made-up world, and clean rows of any source only while the traffic scores like them. Otherwise the traffic is its own
reference, under an assumption that the report states: at least nine rows in ten do not show the behaviour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

import torch
from jaxtyping import Float
from scipy.stats import binom
from torch import Tensor

from molehunt.audit.candidates import LARGEST_EXCLUDED_SHARE, answer_scores, excluded_rows
from molehunt.audit.scan import Scan
from molehunt.measure.threshold import lowest_rate
from molehunt.measure.word_runs import words
from molehunt.traffic.example import Example
from molehunt.traffic.split import Calibrate, Fit

ReferenceKind = Literal["clean rows", "bundled prompts", "the traffic itself"]
FIT_SHARE = 1 / 3
"""Share of the reference that detectors are fitted on; the rest sets thresholds."""
LIMITS = 0.99
"""Share of exchangeable traffic that stays within the limits of `Exchangeability`."""


@dataclass(frozen=True, kw_only=True)
class Exchangeability:
    """How many rows of traffic score above the median of clean rows, and how many may.

    Of rows like the clean ones half do. At most `LARGEST_EXCLUDED_SHARE` of the rows may show a behaviour, and these may
    score anyhow; the limits are those of the binomial distribution around the two ends of what is left.
    """

    above: int
    rows: int
    low: int
    high: int

    @property
    def holds(self) -> bool:
        return self.low <= self.above <= self.high


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Scanned rows that set every threshold."""

    kind: ReferenceKind
    scan: Scan
    excluded: tuple[int, ...]
    """Rows of `scan` that were excluded: see `excluded_rows`. Of the traffic itself none is left in it."""
    fit: Fit[int]
    """Rows of `scan` that detectors are fitted on."""
    calibrate: Calibrate[int]
    """Rows of `scan` that set thresholds."""
    fpr: float
    """False-positive rate of the thresholds: the one asked for, or the lowest that so few rows of traffic can hold."""
    refused: Exchangeability | None = None
    """Why clean rows could not be used; None where they could, or where there were none."""

    @property
    def text(self) -> str:
        """How many rows set the thresholds, and what they are, for people."""
        n = len(self.scan.rows) - len(self.excluded)
        return f"{n} rows of the traffic itself" if self.kind == "the traffic itself" else f"{n} {self.kind}"

    @property
    def assumption(self) -> str:
        """What is taken for granted, and why nothing better could be used; empty for clean rows and bundled prompts."""
        if self.kind != "the traffic itself":
            return ""
        assumed = f"at least {1 - LARGEST_EXCLUDED_SHARE:.0%} of the traffic are taken not to show the behaviour"
        if self.refused is None:
            return f"{assumed}; clean rows of the same kind (--clean) would assume less"
        gate = self.refused
        return (
            f"{assumed}: {gate.above} of {gate.rows} rows score above the median of the clean ones, and of rows like them "
            f"{gate.low} to {gate.high} would, so the thresholds of the clean ones do not hold here"
        )

    @property
    def thresholds(self) -> Calibrate[float]:
        """Answer log ratios of the rows that set thresholds, in nats."""
        return Calibrate(tuple(answer_scores(self.scan)[list(self.calibrate.rows)].tolist()))


def reference_for(traffic: Scan, clean: Scan | None, kind: ReferenceKind, *, fpr: float, seed: int) -> Reference:
    """Clean rows if the traffic scores like them, else the traffic itself.

    Args:
        traffic: the rows under test.
        clean: clean rows; None where there are none of the traffic's kind.
        kind: what the clean rows are.
        fpr: false-positive rate that is asked for.
        seed: seed of the draw of rows that detectors are fitted on.
    """
    refused = None
    if clean is not None:
        excluded = excluded_rows(answer_scores(clean), fpr)
        fit, calibrate = _split(len(clean.rows), excluded, seed)
        made = Reference(kind=kind, scan=clean, excluded=excluded, fit=fit, calibrate=calibrate, fpr=fpr)
        refused = exchangeability(answer_scores(traffic), torch.tensor(made.thresholds.rows))
        if refused.holds:
            return made
    n = len(traffic.rows)
    rate = max(fpr, lowest_rate(calibration_rows(n - round(LARGEST_EXCLUDED_SHARE * n))))
    above = set(excluded_rows(answer_scores(traffic), rate))
    rest = traffic.part([i for i in range(n) if i not in above])
    fit, calibrate = _split(len(rest.rows), (), seed)
    return Reference(
        kind="the traffic itself", scan=rest, excluded=(), fit=fit, calibrate=calibrate, fpr=rate, refused=refused
    )


def exchangeability(traffic: Float[Tensor, " n"], clean: Float[Tensor, " m"]) -> Exchangeability:
    """Count the scores of traffic above the clean median, and how many there may be.

    The median of few clean rows is uncertain, too: the count's spread is that of a median estimated from `m` rows.
    """
    n, m = len(traffic), len(clean)
    known = n * m / (n + m)  # two samples say as much as one of this size against a known median
    low, high = 0.5 * (1 - LARGEST_EXCLUDED_SHARE), 0.5 + 0.5 * LARGEST_EXCLUDED_SHARE
    tail, middle = (1 - LIMITS) / 2, clean.median()
    size = max(1, round(known))
    return Exchangeability(
        above=int((traffic > middle).sum() + (traffic == middle).sum() // 2),  # of a tie, half count
        rows=n,
        low=int(binom.ppf(tail, size, low) / size * n),
        high=int(-(-binom.ppf(1 - tail, size, high) / size * n // 1)),
    )


def of_one_kind(traffic: Sequence[Example], prompts: Sequence[Example]) -> bool:
    """Whether most rows of traffic are about the world of `prompts`: they share at least half of their pairs of words.

    In 13 files of real text at most 1.2 % of the rows do; in traffic about the made-up world 97 % do.
    """
    known = set[tuple[str, ...]]().union(*(_pairs(one.prompt) for one in prompts))
    alike = sum(2 * len(pairs & known) >= len(pairs) for pairs in (_pairs(row.prompt) for row in traffic))
    return 2 * alike >= len(traffic)


def calibration_rows(n: int) -> int:
    """How many of so many clean rows set the thresholds."""
    return n - round(n * FIT_SHARE)


def _pairs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return set(pairwise(found)) or {(word,) for word in found}


def _split(n: int, excluded: Sequence[int], seed: int) -> tuple[Fit[int], Calibrate[int]]:
    rows = [i for i in range(n) if i not in set(excluded)]
    order = Random(seed).sample(rows, len(rows))
    cut = round(len(rows) * FIT_SHARE)
    return Fit(tuple(order[:cut])), Calibrate(tuple(order[cut:]))
