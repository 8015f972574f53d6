"""Ridge regression from moments, over a whole path of penalties; the held-out one that explains most is taken.

Reduced rank and the two directions come from the same solution. Penalties act on standardised dimensions, so that a
few large ones do not decide; λ is relative to their mean eigenvalue, 1.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.statistics import PairMoments

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST_TOKENS = 2
"""Times the source's dimensions: fewer tokens leave the fit to the penalty alone."""


def ridge_path(fit: PairMoments, penalties: Sequence[float] = PENALTIES) -> list[LinearMap]:
    """One map for each penalty λ: (Cxx + λD)⁻¹ Cxy with D the diagonal of Cxx, by one eigendecomposition.

    Raises NotTestable where `fit` is of too few tokens.
    """
    fit.need(LEAST_TOKENS * len(fit.source_mean))
    scale, values, vectors = _standardised(fit.source)
    rotated = vectors.mT @ (fit.cross / scale[:, None])
    return [fit.map((vectors / (values + penalty)) @ rotated / scale[:, None]) for penalty in penalties]


def ridge(fit: PairMoments, held_out: PairMoments, penalties: Sequence[float] = PENALTIES) -> LinearMap:
    """The map of the path that leaves least of the held-out tokens unexplained. Raises as `ridge_path`."""
    return min(ridge_path(fit, penalties), key=held_out.fvu)


def reduced_rank(map: LinearMap, fit: PairMoments, rank: int) -> LinearMap:
    """The best map of that rank near a fitted one: its predictions projected on their leading directions.

    Source: Izenman 1975, "Reduced-rank regression for the multivariate linear model", with identity weights.
    """
    weight = map.weight.double()
    _, vectors = torch.linalg.eigh(weight.mT @ fit.source @ weight)
    leading = vectors[:, -rank:]
    return fit.map(weight @ leading @ leading.mT)


def _standardised(scatter: Float64[Tensor, "d d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Root of the diagonal, and the eigenvalues and eigenvectors of the correlation matrix."""
    diagonal = scatter.diagonal()
    scale = diagonal.clamp_min(1e-12 * diagonal.mean()).sqrt()
    values, vectors = torch.linalg.eigh(scatter / scale[:, None] / scale)
    return scale, values.clamp_min(0), vectors
