"""Fit a map between two models: rank all pairs of blocks, try the best in the target, and judge the one that is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.collect import acts_of, moments_of
from molehunt.transfer.fidelity import Forced, teacher_forced
from molehunt.transfer.layer_grid import LayerGrid, LayerPair, confirmed
from molehunt.transfer.map_file import ModelHashes
from molehunt.transfer.method import FromMoments, map_method
from molehunt.transfer.ridge import shuffled
from molehunt.transfer.saved import FittedMap
from molehunt.transfer.statistics import GridMoments
from molehunt.transfer.trained import quality

RIDGE = "ridge"
"""The method that ranks the pairs of blocks, and the default."""
SHARES = (0.7, 0.85)
"""Texts up to the first share fit, from there to the second they rank the pairs, and the others confirm and judge."""


class TextSplit(NamedTuple):
    """Texts in four parts that share no text."""

    fit: Sequence[Aligned]
    rank: Sequence[Aligned]
    """Held-out texts that choose penalties and rank the pairs of blocks."""
    confirm: Sequence[Aligned]
    """Texts on which the best few pairs are tried in the target."""
    judge: Sequence[Aligned]
    """Texts that neither fitted nor chose anything."""

    @classmethod
    def of(cls, rows: Sequence[Aligned]) -> "TextSplit":
        """Cut texts that were shuffled before."""
        first, second = (int(share * len(rows)) for share in SHARES)
        rest = rows[second:]
        half = len(rest) // 2
        return cls(rows[:first], rows[first:second], rest[:half], rest[half:])


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedTransfer:
    """The map that serves the target best, and how that was found."""

    map: FittedMap
    fvu: float
    """Fraction of held-out variance that the map leaves unexplained."""
    grid: LayerGrid
    moments: GridMoments
    """Moments of the texts that fitted the maps, of every pair of blocks."""
    fidelity: Mapping[str, Forced]
    """What the target does with activations of the map, of the shuffled control and of mean ablation in place of its own."""


def fit_transfer(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    *,
    sources: Sequence[Site],
    targets: Sequence[Site],
    name: str = RIDGE,
    confirm: int = 3,
    models: ModelHashes | None = None,
    track: Track = silent,
) -> FittedTransfer:
    """Fit maps between pairs of blocks, and keep the one that recovers most of the target's cross-entropy.

    Args:
        source: the model whose activations are mapped.
        target: the model that is given them.
        rows: texts in both models' tokens, shuffled.
        sources: block outputs of the source that may be mapped from.
        targets: block outputs of the target that may be mapped to.
        name: the method, a row of the catalogue or of a plugin; ridge ranks the pairs whichever it is.
        confirm: number of pairs that are tried in the target.
        models: hashes of both models, which the map carries.
        track: shows progress.

    Raises:
        UsageError: there is no such method.
        NotTestable: too few tokens that both models read alike.
        CannotTap: a model cannot be read or edited.
    """
    map_method(name)  # an unknown name is refused before anything is read
    texts = TextSplit.of(rows)
    fit, held_out = (
        moments_of(source, target, part, sources=sources, targets=targets, models=models, track=track)
        for part in (texts.fit, texts.rank)
    )
    grid = LayerGrid.of(fit, held_out)
    fitted = [(pair, *_fitted(name, source, target, pair, texts, fit, held_out, track)) for pair in grid.best(confirm)]
    best = confirmed(source, target, texts.confirm, [(pair, map) for pair, map, _ in fitted], track=track)[0]
    ends = best.pair.source, best.pair.target
    maps = {"map": best.map, "shuffled": shuffled(fit.pair(*ends), held_out.pair(*ends))}
    return FittedTransfer(
        map=best.map,
        fvu=next(fvu for pair, _, fvu in fitted if pair is best.pair),
        grid=grid,
        moments=fit,
        fidelity=teacher_forced(source, target, texts.judge, maps, track=track),
    )


def _fitted(
    name: str,
    source: nn.Module,
    target: nn.Module,
    pair: LayerPair,
    texts: TextSplit,
    fit: GridMoments,
    held_out: GridMoments,
    track: Track,
) -> tuple[FittedMap, float]:
    """One pair's map, and the fraction of held-out variance that it leaves unexplained."""
    method = map_method(name)
    if isinstance(method, FromMoments):
        moments = [of.pair(pair.source, pair.target) for of in (fit, held_out)]
        map = method.fit(*moments)
        return map, pair.fvu if name == RIDGE else moments[1].fvu(map)
    acts = [
        acts_of(source, target, part, pair.source, pair.target, models=fit.models, track=track)
        for part in (texts.fit, texts.rank)
    ]
    map = method.fit(*acts)
    return map, quality(map, acts[1])[0]
