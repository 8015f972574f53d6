"""Which layer of the source goes with which of the target: every pair, from moments that one pass has left.

Source sites have one eigendecomposition and one whitening each, target sites one whitening; a pair is a few products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.fidelity import Forced, teacher_forced
from molehunt.transfer.ridge import PENALTIES, Solver, least, need
from molehunt.transfer.saved import FittedMap
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
    """Both similarities are of the fitted tokens (see `PairMoments`)."""


@dataclass(frozen=True, kw_only=True)
class LayerGrid:
    """Every pair of sites, source by source."""

    pairs: tuple[LayerPair, ...]

    @classmethod
    def of(cls, fit: GridMoments, held_out: GridMoments, penalties: Sequence[float] = PENALTIES) -> "LayerGrid":
        """The grid from moments of texts to fit on and of held-out texts.

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
    """A pair of sites whose map was put into the target."""

    pair: LayerPair
    map: FittedMap
    forced: Forced


def confirmed(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    fitted: Sequence[tuple[LayerPair, FittedMap]],
    *,
    track: Track = silent,
) -> tuple[Confirmed, ...]:
    """What the maps of some pairs do in the target, whose activations are replaced by mapped ones; best first.

    The best is the one that recovers most of the cross-entropy. Raises as `teacher_forced`.

    Args:
        source: the model whose activations are mapped.
        target: the model that is given them.
        rows: other texts than those that fitted the maps and ranked the pairs.
        fitted: pairs of sites with their maps.
        track: shows progress.
    """
    maps = {f"{pair.source} {pair.target}": map for pair, map in fitted}
    run = teacher_forced(source, target, rows, maps, track=track)
    found = [Confirmed(pair=pair, map=map, forced=run[name]) for (pair, map), name in zip(fitted, maps, strict=True)]
    return tuple(sorted(found, key=lambda one: -one.forced.ce_recovered().estimate))
