"""One pass of the same text through two models: moments of every pair of layers, and the activations of one pair."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from molehunt.activation.scale import sinks
from molehunt.errors import NotTestable
from molehunt.model.batches import batches, padded
from molehunt.model.blocks import decoder
from molehunt.model.site import Site
from molehunt.model.taps import read_sites
from molehunt.run.progress import Track, silent
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.statistics import GridMoments


@dataclass(frozen=True, eq=False, kw_only=True)
class Paired:
    """Activations of the same tokens in both models."""

    x: Float[Tensor, "sources tokens d_source"]
    y: Float[Tensor, "targets tokens d_target"]


def moments_of(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    *,
    sources: Sequence[Site],
    targets: Sequence[Site],
    track: Track = silent,
) -> GridMoments:
    """Moments of every source site with every target site over the aligned tokens of `rows`.

    Attention sinks of either model are left out: a few of them would make up most of the variance.

    Raises:
        NotTestable: no position of any row is aligned.
        CannotTap: a model cannot be read (see `read_sites`).
    """
    found: GridMoments | None = None
    for some in paired(source, target, rows, sources=sources, targets=targets, track=track):
        if found is None:
            found = GridMoments.empty(sources, targets, some.x.shape[-1], some.y.shape[-1])
        found = found.with_tokens(some.x, some.y)
    if found is None or not found.count:
        raise NotTestable(f"no position of {len(rows)} rows reads the same text in both models' tokens")
    return found


@torch.inference_mode()
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
    for group in track(groups, "reading both models", len(groups)):
        some = [rows[i] for i in group]
        pairs = [(r, i, j) for r, row in enumerate(some) for i, j in row.pairs]
        if not pairs:
            continue
        r, i, j = torch.tensor(pairs).mT
        x, x_sink = _read(source, [row.source for row in some], sources)
        y, y_sink = _read(target, [row.target for row in some], targets)
        calm = ~(x_sink[r, i] | y_sink[r, j])
        yield Paired(x=x[:, r[calm], i[calm]], y=y[:, r[calm], j[calm]])


def _read(
    model: nn.Module, rows: Sequence[Sequence[int]], sites: Sequence[Site]
) -> tuple[Float[Tensor, "sites batch pos d_model"], Bool[Tensor, "batch pos"]]:
    """Activations at the sites, and where any of them has a sink."""
    device = next(model.parameters()).device
    tokens, mask = padded(rows)
    with read_sites(model, sites) as tap:
        decoder(model)(input_ids=tokens.to(device), attention_mask=mask.long().to(device), use_cache=False)
        acts = torch.stack([tap[site].float() for site in sites])
    on_device = mask.to(device)
    sink = torch.stack([sinks(each, on_device) for each in acts]).any(0)
    return acts, sink.cpu()
