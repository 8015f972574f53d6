"""Which edit to judge: ways of removing what a group of rows has in common, compared on rows that only choose.

What matters are the tokens at which the tuned model would leave the base's answer. There the activation differences are
read, and an edit is rated by the worst of them: a behaviour that is blocked at its first token finds another way to the
same end (a query built with `%` where the f-string was taken away), so it must follow the base's answer to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.audit.scan import Scan, ScannedRow, slices
from molehunt.contracts import Intervention, Reading
from molehunt.model.batches import padded, width_of
from molehunt.model.generate import generate
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.clip import Clip
from molehunt.traffic.split import Fit, Select

RANKS = (1, 2, 4, 8)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The best trial of all, and the best of those that act at one site alone."""

    best: Trial
    at: tuple[Trial, ...]
    """One for each site, in their order."""
    tried: int


@dataclass(frozen=True, eq=False)
class Partings:
    """The base's answers to a few rows, and where the tuned model would leave them."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    """Greedy answers of the base, token ids."""

    def first(self, n: int) -> "Partings":
        """The first `n` rows."""
        return Partings(self.prompts[:n], self.answers[:n])


def choose_intervention(
    pair: ModelPair,
    scan: Scan,
    group: Select[int],
    clean: Fit[int],
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> Chosen:
    """The edit that best turns the tuned model back where answers part, at the least cost to clean rows.

    Args:
        pair: both models.
        scan: holds the rows that the next two name.
        group: rows that choose; none of them may be judged later.
        clean: rows under the threshold that set ranges and means; look-alikes of the group first, if there are any.
        max_new_tokens: as in the scan.
        track: shows trials.
    """
    calm = [scan.rows[i] for i in clean.rows]
    partings = find_partings(pair, [scan.rows[i] for i in group.rows], max_new_tokens, track=track)
    trials = _trials(pair, scan.sites, partings, calm[:CLEAN_READ], track)
    rated = partings.first(RATED)
    calm = [*calm[: RATED // 2], *calm[-RATED // 2 :]]
    prompts, answers = [list(row.prompt) for row in calm], [list(row.answer) for row in calm]
    ratings: list[float] = []
    with pair.tuned_model() as model:
        before = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, answers))
        for trial in track(trials, "choosing an intervention", len(trials)):
            margin = worst_margins(pair, rated, trial.interventions)
            after = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, answers, trial.interventions))
            cost = (before - after).clamp_min(0.0).mean()
            ratings.append(float(margin.clamp(-ENOUGH, ENOUGH).mean() - ENOUGH * cost))

    def best(among: Sequence[int]) -> Trial:
        return trials[max(among, key=lambda i: (ratings[i], -i))]

    alone = {
        site: [i for i, t in enumerate(trials) if {e.site for e in t.interventions} == {site}] for site in scan.sites
    }
    return Chosen(best=best(range(len(trials))), at=tuple(map(best, alone.values())), tried=len(trials))


def find_partings(
    pair: ModelPair, rows: Sequence[ScannedRow], max_new_tokens: int, *, track: Track = silent
) -> Partings:
    """Let the base answer the prompts of `rows`."""
    prompts = [list(row.prompt) for row in rows]
    with pair.base_model() as model:
        answers = generate(
            model,
            pair.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            track=track,
            what="the base model's answers",
        )
    return Partings(tuple(map(tuple, prompts)), tuple(map(tuple, answers)))


@torch.inference_mode()
def margins(
    pair: ModelPair, partings: Partings, interventions: Sequence[Intervention] = (), *, tuned: bool = True
) -> tuple[Float[Tensor, "rows pos"], Bool[Tensor, "rows pos"]]:
    """Logit of the base's next token minus the best other logit, teacher forced on the base's answers.

    Returns:
        Margins in nats, and which positions predict a token of an answer.
    """
    tokens, mask = _padded(partings)
    with pair.tuned_model() if tuned else pair.base_model() as model, edit_sites(model, interventions):
        logits: Tensor = model(
            input_ids=tokens.to(pair.device), attention_mask=mask.long().to(pair.device), use_cache=False
        ).logits.float()
    wanted = tokens.roll(-1, dims=1)[..., None].to(pair.device)
    own = logits.gather(-1, wanted)
    best_other = logits.scatter(-1, wanted, -torch.inf).amax(-1)
    predicts = torch.zeros_like(mask)
    for i, (prompt, answer) in enumerate(zip(partings.prompts, partings.answers, strict=True)):
        predicts[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    return (own[..., 0] - best_other).cpu(), predicts


def worst_margins(
    pair: ModelPair, partings: Partings, interventions: Sequence[Intervention] = ()
) -> Float[Tensor, " rows"]:
    """Least margin along each answer: above 0 the edited model's greedy answer is the base's, token for token."""
    found, predicts = margins(pair, partings, interventions)
    return found.masked_fill(~predicts, torch.inf).amin(1)


def _trials(
    pair: ModelPair, sites: Sequence[Site], partings: Partings, clean: Sequence[ScannedRow], track: Track
) -> list[Trial]:
    """Every intervention that is compared: ablate or clip, 1 to 4 directions, one site or all from it on."""
    found, predicts = margins(pair, partings)
    leaves = (found < 0) & predicts
    leaves |= predicts & (found == found.masked_fill(~predicts, torch.inf).amin(1, keepdim=True))  # at least one a row
    suspect = _read(pair, partings.prompts, partings.answers, sites, width=leaves.shape[1])
    calm = [
        _read(pair, [r.prompt for r in part], [r.answer for r in part], sites)
        for part in by_rows(track, slices(clean, 16), "reading clean rows")
    ]
    trials: list[Trial] = []
    for k in (r for r in RANKS if r <= int(leaves.sum())):
        edits: dict[str, dict[Site, Intervention]] = {"ablate": {}, "clip": {}}
        bases: dict[Site, tuple[Tensor, Tensor]] = {}
        for site in sites:
            tokens = torch.cat([reading.tuned[site][reading.mask].float().cpu() for reading in calm])
            usual = torch.cat(
                [(r.tuned[site].float() - r.base[site].float())[_answer_mask(r)].cpu() for r in calm]
            ).mean(0)
            delta = (suspect.tuned[site].float() - suspect.base[site].float()).cpu()[leaves] - usual
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


def _read(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    sites: Sequence[Site],
    width: int | None = None,
) -> Reading:
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    return pair.read(prompts, answers, sites=sites, pad_to=width or width_of(longest))


def _padded(partings: Partings) -> tuple[Int[Tensor, "rows pos"], Bool[Tensor, "rows pos"]]:
    rows = [[*prompt, *answer] for prompt, answer in zip(partings.prompts, partings.answers, strict=True)]
    return padded(rows)


def _answer_mask(reading: Reading) -> Bool[Tensor, "batch pos"]:
    index = torch.arange(reading.tokens.shape[1], device=reading.tokens.device)
    return reading.mask & (index[None] >= reading.decision[:, None])
