"""One pass of the same text through two models: moments of every pair of layers, and the activations of one pair."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from molehunt.activation.scale import sinks
from molehunt.errors import NotTestable
from molehunt.model.batches import batches, padded
from molehunt.model.blocks import decoder
from molehunt.model.taps import read_sites
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.map_file import ModelHashes
from molehunt.transfer.statistics import GridMoments, PairMoments


@dataclass(frozen=True, eq=False, kw_only=True)
class Paired:
    """Activations of the same tokens in both models."""

    x: Float[Tensor, "sources tokens d_source"]
    y: Float[Tensor, "targets tokens d_target"]
    row: Int[Tensor, " tokens"]
    """Number of the text that each token belongs to."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PairActs:
    """Activations of the same tokens at one pair of sites: what a map that is not fitted on moments takes."""

    source_site: Site
    target_site: Site
    x: Float[Tensor, "tokens d_source"]
    y: Float[Tensor, "tokens d_target"]
    row: Int[Tensor, " tokens"]
    models: ModelHashes = field(default_factory=ModelHashes)

    def moments(self) -> PairMoments:
        return replace(PairMoments.of(self.source_site, self.target_site, self.x, self.y), models=self.models)


def acts_of(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    source_site: Site,
    target_site: Site,
    *,
    models: ModelHashes | None = None,
    track: Track = silent,
) -> PairActs:
    """Activations at one pair of sites, all in memory. Raises as `moments_of`."""
    read = list(paired(source, target, rows, sources=[source_site], targets=[target_site], track=track))
    if not sum(len(some.row) for some in read):
        raise _nothing(rows)
    return PairActs(
        source_site=source_site,
        target_site=target_site,
        x=torch.cat([some.x[0] for some in read]),
        y=torch.cat([some.y[0] for some in read]),
        row=torch.cat([some.row for some in read]),
        models=models or ModelHashes(),
    )


def moments_of(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    *,
    sources: Sequence[Site],
    targets: Sequence[Site],
    models: ModelHashes | None = None,
    track: Track = silent,
) -> GridMoments:
    """Moments of every source site with every target site over the aligned tokens of `rows`, in one pass of each model.

    Attention sinks of either model are left out: a few of them would make up most of the variance. Neither model runs
    further than its deepest site.

    Raises:
        NotTestable: no position of any row is aligned.
        CannotTap: a model cannot be read (see `read_sites`).
    """
    found: GridMoments | None = None
    for some in paired(source, target, rows, sources=sources, targets=targets, track=track):
        if found is None:
            found = GridMoments.empty(sources, targets, some.x.shape[-1], some.y.shape[-1], models)
        found = found.with_tokens(some.x, some.y)
    if found is None or not found.count:
        raise _nothing(rows)
    return found


def _nothing(rows: Sequence[Aligned]) -> NotTestable:
    return NotTestable(f"no position of {len(rows)} rows reads the same text in both models' tokens")


def paired(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    *,
    sources: Sequence[Site],
    targets: Sequence[Site],
    track: Track = silent,
) -> Iterator[Paired]:
    """The activations themselves, batch by batch; raises as `moments_of`."""
    groups = batches([max(len(row.source), len(row.target)) for row in rows])
    for group in by_rows(track, groups, "reading both models"):
        some = [rows[i] for i in group]
        pairs = [(r, i, j) for r, row in enumerate(some) for i, j in row.pairs]
        if not pairs:
            continue
        r, i, j = torch.tensor(pairs).mT
        x, x_sink = read_rows(source, [row.source for row in some], sources)
        y, y_sink = read_rows(target, [row.target for row in some], targets)
        no_sink = ~(x_sink[r, i] | y_sink[r, j])
        r, i, j = r[no_sink], i[no_sink], j[no_sink]
        yield Paired(x=x[:, r, i], y=y[:, r, j], row=torch.tensor(group)[r])


@torch.inference_mode()
def read_rows(
    model: nn.Module, rows: Sequence[Sequence[int]], sites: Sequence[Site]
) -> tuple[Float[Tensor, "sites batch pos d_model"], Bool[Tensor, "batch pos"]]:
    """Activations at the sites, and where any of them has a sink."""
    device = next(model.parameters()).device
    tokens, mask = padded(rows)
    with read_sites(model, sites, stop_early=True) as tap:
        decoder(model)(input_ids=tokens.to(device), attention_mask=mask.long().to(device), use_cache=False)
    acts = torch.stack([tap[site].float() for site in sites])
    on_device = mask.to(device)
    sink = torch.stack([sinks(each, on_device) for each in acts]).any(0)
    return acts, sink.cpu()
