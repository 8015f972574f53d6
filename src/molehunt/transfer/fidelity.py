"""How faithful a map is: what the target does when a block's output is replaced by what the map makes of the source's.

The replacement is full: at every position that both models have read the same text up to, but for attention sinks, which
no map is fitted to. Beside it stands mean ablation: the same positions, replaced by their mean in that text. Source: arXiv
2503.04429 §maps; CE recovered as in Gao et al., arXiv 2406.04093 §4.1, with mean ablation as the floor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from molehunt.activation.scale import sinks
from molehunt.contracts import TransferMap
from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, cluster_bootstrap
from molehunt.model.batches import TOKENS, batches, padded
from molehunt.model.blocks import unwrapped
from molehunt.model.likelihood import LOGIT_BYTES
from molehunt.model.taps import edit_sites, read_sites
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site
from molehunt.steer.replace import Replace
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.collect import read_rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Forced:
    """Teacher-forced passes over the same texts. Each tensor holds a sum over the replaced positions of each text.

    A position counts where it was replaced and has a next token. Intervals resample texts.
    """

    tokens: Float64[Tensor, " texts"]
    kl: Float64[Tensor, " texts"]
    """KL(own ‖ replaced) of the next token's distribution, in nats."""
    agreed: Float64[Tensor, " texts"]
    """Positions whose most likely next token is the same."""
    ce: Float64[Tensor, " texts"]
    """Cross-entropy of the text's own next token, in nats."""
    ce_own: Float64[Tensor, " texts"]
    """The same without a replacement."""
    ce_ablated: Float64[Tensor, " texts"]
    """The same under mean ablation."""

    def kl_per_token(self) -> Interval:
        return self._ratio(self.kl, self.tokens)

    def agreement(self) -> Interval:
        """Share of positions with the same most likely next token."""
        return self._ratio(self.agreed, self.tokens)

    def ce_recovered(self) -> Interval:
        """(ablated − replaced) / (ablated − own): 1 loses nothing, 0 is as bad as mean ablation, below 0 is worse."""
        return self._ratio(self.ce_ablated - self.ce, self.ce_ablated - self.ce_own)

    def kl_below(self, other: "Forced") -> Interval:
        """The nats a token by which this KL is below that of another replacement of the same texts: a paired test.

        Raises ValueError where the texts are others.
        """
        return self._below(other, self.kl, other.kl)

    def ce_below(self, other: "Forced") -> Interval:
        """The same difference for the cross-entropies."""
        return self._below(other, self.ce, other.ce)

    def _below(self, other: "Forced", mine: Tensor, theirs: Tensor) -> Interval:
        if not self.tokens.equal(other.tokens):
            raise ValueError("a paired test takes the same positions of the same texts")
        return self._ratio(theirs - mine, self.tokens)

    def _ratio(self, above: Tensor, below: Tensor) -> Interval:
        def ratio(rows: Tensor) -> float:
            return float(rows[:, 0].sum() / rows[:, 1].sum())

        return cluster_bootstrap(torch.stack([above, below], 1), range(len(above)), ratio, seed=0)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A score of answers against the target's own, beside that of mean ablation on the same prompts."""

    replaced: Interval
    ablated: Interval
    difference: Interval
    """Replaced minus ablated, prompt by prompt: a paired test."""


def compared(replaced: Sequence[float], ablated: Sequence[float]) -> Compared:
    """Means over prompts, with intervals that resample prompts (see `text_similarity` and `judge_endpoint` for scores)."""

    def mean(values: Sequence[float]) -> Interval:
        scores = torch.tensor(values, dtype=torch.float64)
        return cluster_bootstrap(scores, range(len(scores)), lambda rows: float(rows.mean()), seed=0)

    both = zip(replaced, ablated, strict=True)
    return Compared(replaced=mean(replaced), ablated=mean(ablated), difference=mean([a - b for a, b in both]))


def ablation_at(site: Site) -> str:
    """The name under which `teacher_forced` returns mean ablation."""
    return f"mean ablation at {site}"


@dataclass(frozen=True, eq=False)
class _Batch:
    """Texts in the target's tokens, and where they are replaced."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    row: Int[Tensor, " replaced"]
    at: Int[Tensor, " replaced"]
    scored: Bool[Tensor, " replaced"]
    """Those that have a next token."""

    def next_tokens(self) -> Int[Tensor, " scored"]:
        return self.tokens[self.row[self.scored], self.at[self.scored] + 1]

    def log_probs(self, model: nn.Module) -> Float[Tensor, "scored vocab"]:
        return self.of_logits(_logits(model, self.tokens, self.mask))

    def of_logits(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "scored vocab"]:
        return logits[self.row[self.scored], self.at[self.scored]].float().log_softmax(-1)

    def put(self, site: Site, given: Float[Tensor, "replaced d_model"], like: Tensor) -> Replace:
        """`given` in place of the activations."""
        whole, where = torch.zeros_like(like, dtype=torch.float32), torch.zeros_like(self.mask)
        whole[self.row, self.at] = given.float()
        where[self.row, self.at] = True
        return Replace(site, whole, gate=lambda acts: where)


@torch.inference_mode()
def teacher_forced(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    maps: Mapping[str, TransferMap],
    *,
    track: Track = silent,
) -> dict[str, Forced]:
    """Run the target over texts with each map's activations in place of its own, and without.

    Args:
        source: the model whose activations are mapped.
        target: the model that is given them.
        rows: texts that neither fitted nor chose a map.
        maps: by name, between any sites. All are scored at the same positions.
        track: shows rows.

    Returns:
        One for each map, and one for mean ablation at each target site (`ablation_at`).

    Raises:
        NotTestable: no text has a position that could be replaced and scored.
        CannotTap: a model cannot be read or edited (see `edit_sites`).
    """
    sources, targets = (sorted({getattr(map, end) for map in maps.values()}) for end in ("source", "target"))
    names = [*(ablation_at(site) for site in targets), *maps]
    sums = torch.zeros(len(names), len(rows), 6, dtype=torch.float64)
    config: Any = unwrapped(target).config
    limit = min(TOKENS, LOGIT_BYTES // (4 * int(config.get_text_config(decoder=True).vocab_size)))
    groups = batches([max(len(row.source), len(row.target)) for row in rows], limit)
    for group in by_rows(track, groups, "replacing activations"):
        sums[:, group] = _scores(source, target, [rows[i] for i in group], maps, sources, targets)
    scored = sums[0, :, 0] > 0
    if not bool(scored.any()):
        raise NotTestable(f"no position of {len(rows)} texts can be replaced and has a next token")
    fields = ("tokens", "kl", "agreed", "ce", "ce_own", "ce_ablated")
    return {
        name: Forced(**dict(zip(fields, of_name[scored].unbind(1), strict=True)))
        for name, of_name in zip(names, sums, strict=True)
    }


def _scores(
    source: nn.Module,
    target: nn.Module,
    rows: Sequence[Aligned],
    maps: Mapping[str, TransferMap],
    sources: Sequence[Site],
    targets: Sequence[Site],
) -> Float64[Tensor, "names batch 6"]:
    """Sums by text for mean ablation at each target site, then for each map."""
    x, x_sink = read_rows(source, [row.source for row in rows], sources)
    device = next(target.parameters()).device
    tokens, mask = (each.to(device) for each in padded([row.target for row in rows]))
    with read_sites(target, targets) as tap:
        own_logits = _logits(target, tokens, mask)
        acts = {site: tap[site].float() for site in targets}
    y_sink = torch.stack([sinks(each, mask) for each in acts.values()]).any(0).cpu()
    pairs = [(r, i, j) for r, row in enumerate(rows) for i, j in row.pairs]
    r, i, j = torch.tensor(pairs, dtype=torch.long).reshape(-1, 3).mT
    no_sink = ~(x_sink[r, i] | y_sink[r, j])
    r, i, j = r[no_sink], i[no_sink], j[no_sink]
    lengths = torch.tensor([len(row.target) for row in rows])
    batch = _Batch(tokens, mask, r.to(device), j.to(device), (j + 1 < lengths[r]).to(device))
    own = batch.of_logits(own_logits)
    wanted = batch.next_tokens()
    by_row = batch.row[batch.scored].cpu()

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, by_row, values.double().cpu())

    def cross_entropy(log_probs: Tensor) -> Tensor:
        return summed(-log_probs.gather(1, wanted[:, None])[:, 0])

    def run(site: Site, given: Tensor) -> list[Tensor]:
        with edit_sites(target, [batch.put(site, given, acts[site])]):
            log_probs = batch.log_probs(target)
        kl = (own.exp() * (own - log_probs)).sum(1)
        return [summed(kl), summed(own.argmax(1) == log_probs.argmax(1)), cross_entropy(log_probs)]

    tokens_of, ce_own = summed(torch.ones(len(by_row))), cross_entropy(own)
    ablated = {site: run(site, _means(acts[site], batch)) for site in targets}
    found = [(site, ablated[site]) for site in targets]
    for map in maps.values():
        given = map(x[sources.index(map.source)][r, i])
        found.append((map.target, run(map.target, given.to(device))))
    return torch.stack([torch.stack([tokens_of, *three, ce_own, ablated[site][2]], 1) for site, three in found])


def _means(acts: Float[Tensor, "batch pos d_model"], batch: _Batch) -> Float[Tensor, "replaced d_model"]:
    """The mean over the replaced positions of a text, at each of them."""
    total = torch.zeros(len(acts), acts.shape[-1], device=acts.device)
    total.index_add_(0, batch.row, acts[batch.row, batch.at])
    count = torch.bincount(batch.row, minlength=len(acts)).clamp_min(1)
    return (total / count[:, None])[batch.row]


def _logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits


def forced_kl(source: nn.Module, target: nn.Module, rows: Sequence[Aligned]) -> Callable[[TransferMap], float]:
    """For `train_map` to watch: nats a token that the target's next token moves by under a map, on these texts."""

    def kl(map: TransferMap) -> float:
        found = teacher_forced(source, target, rows, {"map": map})["map"]
        return float(found.kl.sum() / found.tokens.sum())

    return kl
