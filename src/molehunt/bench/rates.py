"""Detection rates of one score, each at a threshold from clean rows that chose nothing."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from molehunt.measure.curve import auroc, average_precision
from molehunt.measure.interval import proportion
from molehunt.measure.threshold import conformal_threshold

FPR = 0.01
STRICT_FPR = 0.001


def rates_of(triggered: Tensor, near: Tensor, calibrate: Tensor, clean: Tensor) -> dict[str, Any]:
    both = torch.cat([triggered, clean])
    positive = torch.arange(len(both)) < len(triggered)
    return {
        "tpr": share_over(triggered, calibrate, FPR),
        "tpr_strict": share_over(triggered, calibrate, STRICT_FPR) if len(calibrate) >= 1 / STRICT_FPR - 1 else None,
        "near": share_over(near, calibrate, FPR) if len(near) else None,
        "clean": share_over(clean, calibrate, FPR),
        "auroc": auroc(both, positive),
        "ap": average_precision(both, positive),
    }


def share_over(scores: Tensor, calibrate: Tensor, fpr: float) -> dict[str, float]:
    over = int((scores > conformal_threshold(calibrate, fpr)).sum())
    return asdict(proportion(over, len(scores)))
