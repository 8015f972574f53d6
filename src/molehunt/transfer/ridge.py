"""Ridge regression from moments, over a whole path of penalties; the held-out one that explains most is taken.

Reduced rank and the two directions come from the same solution. Penalties act on standardised dimensions, so that a
few large ones do not decide; λ is relative to their mean eigenvalue, 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.statistics import PairMoments

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST_TOKENS = 2
"""Least number of tokens for each dimension of the source: fewer leave the fit to the penalty alone."""
RANK_SLACK = 0.01
"""A lower rank may leave this share more unexplained than the full one."""


@dataclass(frozen=True, eq=False)
class Solver:
    """One eigendecomposition of a source site: every penalty and every target site share it."""

    directions: Float64[Tensor, "d d"]
    """Columns that make Cxx its `values` and D, its diagonal, the identity: (Cxx + λD)⁻¹ = U (values + λ)⁻¹ Uᵀ."""
    values: Float64[Tensor, " d"]

    @classmethod
    def of(cls, scatter: Float64[Tensor, "d d"]) -> "Solver":
        diagonal = scatter.diagonal()
        scale = diagonal.clamp_min(1e-12 * diagonal.mean()).sqrt()
        values, vectors = torch.linalg.eigh(scatter / scale[:, None] / scale)
        return cls(vectors / scale[:, None], values.clamp_min(0))

    def weight(self, fit: PairMoments, penalty: float) -> Float64[Tensor, "d_source d_target"]:
        """(Cxx + λD)⁻¹ Cxy. Raises NotTestable where that has no one solution: too few dimensions vary, and no penalty."""
        tiny = len(self.values) * torch.finfo(torch.float64).eps * self.values.amax()
        rank = int((self.values > tiny).sum())
        if penalty <= 0 and rank < len(self.values):
            raise NotTestable(
                f"the {fit.count} tokens at {fit.source_site} span {rank} of {len(self.values)} dimensions: without a "
                "penalty no map is the best.\nGive more text, or a penalty above 0."
            )
        return (self.directions / (self.values + penalty)) @ (self.directions.mT @ fit.cross)

    def unexplained(
        self,
        fit: PairMoments,
        held_out: PairMoments,
        penalties: Sequence[float],
        rotated: Float64[Tensor, "d d"] | None = None,
    ) -> list[float]:
        """`held_out.fvu` of the map of each penalty, in three products for all of them.

        `rotated` is `self.rotated(held_out.source)`, where a caller has it for many targets.
        """
        within = self.rotated(held_out.source) if rotated is None else rotated
        weight, cross = self.directions.mT @ fit.cross, self.directions.mT @ held_out.cross
        linear, quadratic = (weight * cross).sum(1), within * (weight @ weight.mT)
        shift = (held_out.source_mean - fit.source_mean) @ self.directions
        off = held_out.target_mean - fit.target_mean
        total = held_out.target.trace()
        found: list[float] = []
        for penalty in penalties:
            gain = 1 / (self.values + penalty)
            explained = 2 * gain @ linear - gain @ quadratic @ gain
            missed = off - (shift * gain) @ weight
            found.append(float((total - explained + held_out.count * missed.square().sum()) / total))
        return found

    def rotated(self, scatter: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
        """Another scatter of the source in these directions."""
        return self.directions.mT @ scatter @ self.directions


def ridge_path(fit: PairMoments, penalties: Sequence[float] = PENALTIES) -> list[LinearMap]:
    """One map for each penalty λ: (Cxx + λD)⁻¹ Cxy with D the diagonal of Cxx, by one eigendecomposition.

    Raises NotTestable where `fit` is of too few tokens, or of tokens that span too few dimensions for λ = 0.
    """
    need(fit)
    solver = Solver.of(fit.source)
    return [fit.map(solver.weight(fit, penalty), f"ridge, λ = {penalty:g}") for penalty in penalties]


def ridge(fit: PairMoments, held_out: PairMoments, penalties: Sequence[float] = PENALTIES) -> LinearMap:
    """The map of the path that leaves least of the held-out tokens unexplained. Raises as `ridge_path`."""
    need(fit)
    held_out.need(1)
    solver = Solver.of(fit.source)
    best, _ = least(penalties, solver.unexplained(fit, held_out, penalties))
    return fit.map(solver.weight(fit, best), f"ridge, λ = {best:g}")


def least(penalties: Sequence[float], unexplained: Sequence[float]) -> tuple[float, float]:
    """The penalty that leaves least unexplained, and how much that is."""
    fvu, penalty = min(zip(unexplained, penalties, strict=True))
    return penalty, fvu


def need(fit: PairMoments) -> None:
    """Raises NotTestable where `fit` is of too few tokens for a ridge."""
    fit.need(LEAST_TOKENS * len(fit.source_mean))


def reduced_rank(fit: PairMoments, held_out: PairMoments) -> LinearMap:
    """Ridge of the lowest rank among powers of 2 that explains the held-out tokens about as well as the full one.

    Raises as `ridge_path`.
    """
    full = ridge(fit, held_out)
    target_fvu = (1 + RANK_SLACK) * held_out.fvu(full)
    rank = 1
    while rank < min(full.widths):
        lower = of_rank(full, fit, rank)
        if held_out.fvu(lower) <= target_fvu:
            return lower
        rank *= 2
    return full


def of_rank(map: LinearMap, fit: PairMoments, rank: int) -> LinearMap:
    """The best map of that rank near a fitted one: its predictions projected on their leading directions.

    Source: Izenman 1975, "Reduced-rank regression for the multivariate linear model", with identity weights.
    """
    weight = map.weight.double()
    _, vectors = torch.linalg.eigh(weight.mT @ fit.source @ weight)
    leading = vectors[:, -rank:]
    return fit.map(weight @ leading @ leading.mT, f"{map.facts.method}, rank {rank}")


def shuffled(fit: PairMoments, held_out: PairMoments, *, seed: int = 0) -> LinearMap:
    """The control: ridge as ever, of pairs of tokens that do not belong together (see `PairMoments.shuffled`)."""
    found = ridge(fit.shuffled(seed), held_out)
    return replace(found, facts=replace(found.facts, method=f"{found.facts.method}, of shuffled pairs"))
