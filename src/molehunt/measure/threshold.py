"""Thresholds from clean traffic, with a false-positive rate that is valid for finite samples.

Source: split conformal prediction; p-values as in Bates et al., arXiv 2104.08279, §1.
"""

import math
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import NotTestable


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
    wanted = Fraction(str(fpr))  # exactly .01; the float is a little larger, and would give another rank
    rank = math.floor(wanted * (len(clean) + 1))
    if rank == 0:
        raise NotTestable(
            f"{len(clean)} clean rows cannot hold a false-positive rate of {fpr:g}: that takes at least "
            f"{math.ceil(1 / wanted) - 1}.\nGive more clean traffic, or ask for a higher rate."
        )
    return float(clean.topk(rank).values[-1])


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
