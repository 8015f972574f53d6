"""Which layer of the source goes with which of the target: every pair, from moments that one pass has left.

Source sites have one eigendecomposition and one whitening each, target sites one whitening; a pair is a few products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.fidelity import Forced, teacher_forced
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.ridge import PENALTIES, Solver, least, need, ridge
from molehunt.transfer.statistics import GridMoments, mean_correlation, whitening


@dataclass(frozen=True, kw_only=True)
class LayerPair:
    """How well a source site explains a target site."""

    source: Site
    target: Site
    fvu: float
    """Held-out fraction of variance unexplained, of the best ridge."""
    penalty: float
    """The λ of that ridge."""
    cka: float
    svcca: float
    """Both of the fitted tokens (see `PairMoments`)."""


@dataclass(frozen=True, kw_only=True)
class LayerGrid:
    """Every pair of sites, source by source."""

    pairs: tuple[LayerPair, ...]

    @classmethod
    def of(cls, fit: GridMoments, held_out: GridMoments, penalties: Sequence[float] = PENALTIES) -> "LayerGrid":
        """From moments of one pass over texts to fit on and one over held-out texts.

        Raises:
            NotTestable: too few tokens for a ridge, or a site whose activations never vary.
        """
        white = [whitening(scatter) for scatter in fit.target]
        found: list[LayerPair] = []
        for source, scatter, other in zip(fit.sources, fit.source, held_out.source, strict=True):
            need(fit.pair(source, fit.targets[0]))
            solver, own = Solver.of(scatter), whitening(scatter)
            rotated = solver.rotated(other)
            for target, theirs in zip(fit.targets, white, strict=True):
                here, there = fit.pair(source, target), held_out.pair(source, target)
                here.need(1)
                there.need(1)
                penalty, fvu = least(penalties, solver.unexplained(here, there, penalties, rotated))
                svcca = mean_correlation(own, here.cross, theirs)
                found.append(
                    LayerPair(source=source, target=target, fvu=fvu, penalty=penalty, cka=here.cka(), svcca=svcca)
                )
        return cls(pairs=tuple(found))

    def best(self, n: int) -> tuple[LayerPair, ...]:
        """The `n` pairs with the lowest held-out FVU, best first. What that is worth, `confirmed` says."""
        return tuple(sorted(self.pairs, key=lambda pair: pair.fvu)[:n])


@dataclass(frozen=True, eq=False, kw_only=True)
class Confirmed:
    """A pair whose map was put into the target."""

    pair: LayerPair
    map: LinearMap
    forced: Forced


def confirmed(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    pairs: Sequence[LayerPair],
    fit: GridMoments,
    held_out: GridMoments,
    *,
    track: Track = silent,
) -> tuple[Confirmed, ...]:
    """What some pairs do in the target: its activations replaced by mapped ones on `rows`, most CE recovered first.

    `rows` must be others than those of the moments. Raises as `ridge` and `teacher_forced`.
    """
    maps: Mapping[str, LinearMap] = {
        f"{pair.source} {pair.target}": ridge(
            fit.pair(pair.source, pair.target), held_out.pair(pair.source, pair.target)
        )
        for pair in pairs
    }
    run = teacher_forced(source, target, rows, maps, track=track)
    found = [
        Confirmed(pair=pair, map=map, forced=run[name]) for pair, (name, map) in zip(pairs, maps.items(), strict=True)
    ]
    return tuple(sorted(found, key=lambda one: -one.forced.ce_recovered().estimate))
