"""Thresholds from clean traffic, with a false-positive rate that is valid for finite samples.

Source: split conformal prediction; p-values as in Bates et al., arXiv 2104.08279, §1.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import NotTestable, UsageError

HIGHEST_RATE = 0.2
"""Greatest false-positive rate that a workflow takes."""


def conformal_threshold(clean: Float[Tensor, " n"], fpr: float) -> float:
    """The lowest score to flag above: a fresh clean score exceeds it with probability at most `fpr`.

    Args:
        clean: scores of clean traffic that was not used for any selection, exchangeable with future clean traffic.
        fpr: false-positive rate, in 0..1. The guarantee averages over the draw of `clean`, too.

    Raises:
        NotTestable: `clean` is too small for any finite threshold: n < 1/fpr - 1.
        ValueError: there is NaN among the scores, or `fpr` is outside 0..1.
    """
    _refuse_nan(clean)
    if not 0 < fpr < 1:
        raise ValueError(f"fpr must lie between 0 and 1, got {fpr}")
    rank = math.floor(_exactly(fpr) * (len(clean) + 1))
    if rank == 0:
        raise NotTestable(
            f"{len(clean)} clean rows cannot hold a false-positive rate of {fpr:g}: that takes at least "
            f"{rows_for_rate(fpr)}.\nGive more clean traffic, or ask for a higher rate."
        )
    return float(clean.topk(rank).values[-1])


def rows_for_rate(fpr: float) -> int:
    """Least number of clean scores for which `conformal_threshold` has a threshold at this rate."""
    return math.ceil(1 / _exactly(fpr)) - 1


def lowest_rate(n: int) -> float:
    """The lowest false-positive rate, rounded up to six decimals, that so many clean scores can hold."""
    return math.ceil(10**6 / (n + 1)) / 10**6


def check_rate(fpr: float) -> None:
    """Raises UsageError for a false-positive rate that no workflow takes."""
    if not 0 < fpr <= HIGHEST_RATE:
        raise UsageError(
            f"fpr (--fpr) is the share of clean rows that may be flagged: above 0 and at most {HIGHEST_RATE:g}, "
            f"got {fpr:g}."
        )


def check_clean_rows(n: int, calibration_rows: Callable[[int], int], fpr: float, *, advice: str = "") -> None:
    """Refuse a rate that the clean rows cannot hold, before any model runs.

    Args:
        n: number of clean rows.
        calibration_rows: how many of so many clean rows set the threshold; at most one more for each row.
        fpr: false-positive rate.
        advice: what to do; by default, to give more rows.

    Raises:
        NotTestable: too few rows; the error says how many are needed in all.
    """
    needed = rows_for_rate(fpr)
    if calibration_rows(n) >= needed:
        return
    total = needed
    while (missing := needed - calibration_rows(total)) > 0:
        total += missing  # never too far: a row more sets the threshold at most once
    raise NotTestable(
        f"{n} clean rows cannot hold a false-positive rate of {fpr:g}: {calibration_rows(n)} of them set the threshold, "
        f"and that takes at least {needed}.\n{advice or f'Give at least {total} clean rows, or a higher fpr (--fpr).'}"
    )


def _exactly(fpr: float) -> Fraction:
    """Exactly .01: the float is a little larger, and would give another rank."""
    return Fraction(str(fpr))


def conformal_p_values(clean: Float[Tensor, " n"], scores: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Probability of a clean score at least as high as each of `scores`, in fp64, and never 0.

    Law: `conformal_p_values(clean, s) <= fpr` exactly where `s > conformal_threshold(clean, fpr)`.

    Raises:
        ValueError: there is NaN among the scores.
    """
    _refuse_nan(clean)
    _refuse_nan(scores)
    ascending = clean.sort().values
    at_least = len(clean) - torch.searchsorted(ascending, scores.to(clean.dtype).contiguous())
    return (1 + at_least).double() / (len(clean) + 1)


def _refuse_nan(scores: Float[Tensor, " n"]) -> None:
    if scores.isnan().any():
        raise ValueError("NaN among the scores: it is neither above nor below a threshold")
