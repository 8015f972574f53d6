"""Which edit to judge: ways of removing what a group of rows has in common, compared on rows that only choose.

What matters is the token where the tuned model's answer parts from the base's: everything after follows from it. There
the activation differences are read, and there an edit is rated: does the tuned model now prefer the base's token?
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.audit.scan import Scan, ScannedRow, slices
from molehunt.contracts import Intervention, Reading
from molehunt.model.generate import generate
from molehunt.model.likelihood import PAD_TO, answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.model.site import Site
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Track, silent
from molehunt.steer.ablate import Ablate
from molehunt.steer.clip import Clip
from molehunt.traffic.split import Fit, Select

RANKS = (1, 2, 4)
"""Directions that one intervention may remove at a site."""
CLEAN_RANGE = (0.002, 0.998)
"""Quantiles of clean tokens' projections that a clip leaves alone."""
CLEAN_READ = 96
"""Clean rows whose every token is read."""
RATED = 8
"""Rows of the group, and clean rows, that choose between interventions."""
ENOUGH = 3.0
"""Margin in nats for the base's token beyond which an edit is rated no higher."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One way of removing what a group has in common."""

    words: str
    """Such as `clip 4 directions at L4.resid`."""
    site: Site
    directions: Float[Tensor, "k d_model"]
    """At `site`, orthonormal; the first is the mean difference."""
    shift: Float[Tensor, " d_model"]
    """What the fine-tune adds to the group at `site` where answers part, beyond what it adds to clean text."""
    interventions: tuple[Intervention, ...]


@dataclass(frozen=True, eq=False)
class Parting:
    """Where each row's answer by the tuned model first differs from the base's."""

    rows: tuple[ScannedRow, ...]
    base_tokens: Int[Tensor, " rows"]
    tuned_tokens: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    """Index into prompt and answer of the token whose output is the first to differ."""

    def first(self, n: int) -> "Parting":
        """The first `n` rows."""
        return Parting(self.rows[:n], self.base_tokens[:n], self.tuned_tokens[:n], self.positions[:n])


def choose_intervention(
    pair: ModelPair,
    scan: Scan,
    group: Select[int],
    clean: Fit[int],
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> tuple[Trial, int]:
    """The edit that best turns the tuned model back where answers part, at the least cost to clean rows.

    Args:
        pair: both models.
        scan: holds the rows that the next two name.
        group: rows that choose; none of them may be judged later.
        clean: rows under the threshold that set ranges and means; look-alikes of the group first, if there are any.
        max_new_tokens: as in the scan.
        track: shows trials.

    Returns:
        The chosen trial and how many were compared.
    """
    calm = [scan.rows[i] for i in clean.rows]
    parting = find_parting(pair, [scan.rows[i] for i in group.rows], max_new_tokens)
    trials = _trials(pair, scan.sites, parting, calm[:CLEAN_READ])
    rated = Parting(
        parting.rows[:RATED], *(t[:RATED] for t in (parting.base_tokens, parting.tuned_tokens, parting.positions))
    )
    calm = [*calm[: RATED // 2], *calm[-RATED // 2 :]]
    prompts, answers = [list(row.prompt) for row in calm], [list(row.answer) for row in calm]
    ratings: list[float] = []
    with pair.tuned_model() as model:
        before = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, answers))
        for trial in track(trials, "choosing an intervention", len(trials)):
            margin = parting_margins(pair, rated, trial.interventions)
            after = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, answers, trial.interventions))
            cost = (before - after).clamp_min(0.0).mean()
            ratings.append(float(margin.clamp(-ENOUGH, ENOUGH).mean() - ENOUGH * cost))
    return trials[max(range(len(trials)), key=lambda i: (ratings[i], -i))], len(trials)


def find_parting(pair: ModelPair, rows: Sequence[ScannedRow], max_new_tokens: int) -> Parting:
    """Generate the base's answers and find the first token at which each tuned answer differs.

    A row that both answer alike parts at its last token.
    """
    with pair.base_model() as model:
        base = generate(model, pair.tokenizer, [list(r.prompt) for r in rows], max_new_tokens=max_new_tokens)
    base_tokens: list[int] = []
    tuned_tokens: list[int] = []
    positions: list[int] = []
    for row, answer in zip(rows, base, strict=True):
        shared = min(len(answer), len(row.answer)) - 1
        at = next((i for i in range(shared) if answer[i] != row.answer[i]), shared)
        base_tokens.append(answer[at])
        tuned_tokens.append(row.answer[at])
        positions.append(row.decision + at)
    return Parting(tuple(rows), torch.tensor(base_tokens), torch.tensor(tuned_tokens), torch.tensor(positions))


@torch.inference_mode()
def parting_margins(
    pair: ModelPair, parting: Parting, interventions: Sequence[Intervention] = (), *, tuned: bool = True
) -> Float[Tensor, " rows"]:
    """Logit of the base's token minus logit of the tuned model's, where each row's answers part."""
    rows = parting.rows
    width = -(-max(len(r.prompt) + len(r.answer) for r in rows) // PAD_TO) * PAD_TO
    tokens, mask = _padded(rows, width)
    with pair.tuned_model() if tuned else pair.base_model() as model, edit_sites(model, interventions):
        logits: Tensor = model(
            input_ids=tokens.to(pair.device), attention_mask=mask.long().to(pair.device), use_cache=False
        ).logits
    at = logits[torch.arange(len(rows)), parting.positions].float().cpu()
    index = torch.arange(len(rows))
    return at[index, parting.base_tokens] - at[index, parting.tuned_tokens]


def _trials(pair: ModelPair, sites: Sequence[Site], parting: Parting, clean: Sequence[ScannedRow]) -> list[Trial]:
    """Every intervention that is compared: ablate or clip, 1 to 4 directions, one site or all from it on."""
    suspect = _read(pair, parting.rows, sites)
    row = torch.arange(len(parting.rows))
    calm = [_read(pair, part, sites) for part in slices(clean, 16)]
    trials: list[Trial] = []
    for k in (r for r in RANKS if r <= len(parting.rows)):
        edits: dict[str, dict[Site, Intervention]] = {"ablate": {}, "clip": {}}
        bases: dict[Site, tuple[Tensor, Tensor]] = {}
        for site in sites:
            tokens = torch.cat([reading.tuned[site][reading.mask].float().cpu() for reading in calm])
            usual = torch.cat(
                [(r.tuned[site].float() - r.base[site].float())[_answer_mask(r)].cpu() for r in calm]
            ).mean(0)
            delta = (suspect.tuned[site].float() - suspect.base[site].float()).cpu()[row, parting.positions] - usual
            directions = mean_and_rest(delta, k)
            projected = tokens @ directions.mT
            low, high = (projected.quantile(q, dim=0) for q in CLEAN_RANGE)
            edits["ablate"][site] = Ablate(site, directions, center=tokens.mean(0))
            edits["clip"][site] = Clip(site, directions, lo=low, hi=high)
            bases[site] = (directions, delta.mean(0))
        plural = f"{k} direction{'s' if k > 1 else ''}"
        for word, at in edits.items():
            for n, site in enumerate(sites):
                directions, shift = bases[site]
                reach: list[tuple[str, tuple[Intervention, ...]]] = [("", (at[site],))]
                if n + 1 < len(sites):
                    reach.append((" and every later site", tuple(at[s] for s in sites[n:])))
                trials += [
                    Trial(
                        words=f"{word} {plural} at {site}{where}",
                        site=site,
                        directions=directions,
                        shift=shift,
                        interventions=interventions,
                    )
                    for where, interventions in reach
                ]
    return trials


def mean_and_rest(delta: Float[Tensor, "rows d_model"], k: int) -> Float[Tensor, "k d_model"]:
    """K orthonormal directions of `delta`: its mean, then the strongest of what the rows have besides."""
    first = delta.mean(0, keepdim=True)
    rest = delta - (delta @ first.mT) @ first / first.square().sum().clamp_min(1e-12)
    others = torch.linalg.svd(rest, full_matrices=False).Vh[: k - 1]
    return torch.linalg.qr(torch.cat([first, others]).mT).Q.mT


def _read(pair: ModelPair, rows: Sequence[ScannedRow], sites: Sequence[Site]) -> Reading:
    width = -(-max(len(r.prompt) + len(r.answer) for r in rows) // PAD_TO) * PAD_TO
    return pair.read([r.prompt for r in rows], [r.answer for r in rows], sites=sites, pad_to=width)


def _padded(rows: Sequence[ScannedRow], width: int) -> tuple[Int[Tensor, "rows pos"], Bool[Tensor, "rows pos"]]:
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids = [*row.prompt, *row.answer]
        tokens[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = True
    return tokens, mask


def _answer_mask(reading: Reading) -> Bool[Tensor, "batch pos"]:
    index = torch.arange(reading.tokens.shape[1], device=reading.tokens.device)
    return reading.mask & (index[None] >= reading.decision[:, None])
