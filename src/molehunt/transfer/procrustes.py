"""Rotation from one activation space into another, between any widths, and the map that rotates nothing."""

import torch

from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.statistics import PairMoments


def procrustes(fit: PairMoments, *, scaled: bool = True) -> LinearMap:
    """The semi-orthogonal map that aligns best, with one factor for the scale.

    Source: Schönemann 1966; between unlike widths the smaller space is embedded or the larger projected. Raises
    NotTestable for fewer than two tokens.
    """
    fit.need(2)
    u, s, vh = torch.linalg.svd(fit.cross, full_matrices=False)
    rotation = u @ vh
    factor = s.sum() / (rotation * (fit.source @ rotation)).sum() if scaled else 1.0
    return fit.map(factor * rotation)


def identity(fit: PairMoments) -> LinearMap:
    """The control that maps nothing: dimension i is dimension i, as far as both spaces go."""
    return fit.map(torch.eye(len(fit.source_mean), len(fit.target_mean)))
