"""Rotation from one activation space into another, between any widths, and the map that rotates nothing."""

import torch

from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.statistics import PairMoments


def procrustes(fit: PairMoments, held_out: PairMoments | None = None, *, scaled: bool = True) -> LinearMap:
    """The semi-orthogonal map that aligns best, with one factor for the scale.

    Between unlike widths the smaller space is embedded or the larger projected. `held_out` takes no part: there is
    nothing to choose, and all methods of the catalogue are called alike. Raises NotTestable for fewer than two tokens.

    Source: Schönemann 1966.
    """
    fit.need(2)
    u, s, vh = torch.linalg.svd(fit.cross, full_matrices=False)
    rotation = u @ vh
    factor = s.sum() / (rotation * (fit.source @ rotation)).sum() if scaled else 1.0
    return fit.map(factor * rotation, "scaled procrustes" if scaled else "procrustes")


def identity(fit: PairMoments, held_out: PairMoments | None = None) -> LinearMap:
    """The control that maps nothing: dimension i is dimension i, as far as both spaces go."""
    return fit.map(torch.eye(len(fit.source_mean), len(fit.target_mean)), "identity")
