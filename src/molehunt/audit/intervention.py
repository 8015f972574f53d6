"""Which edit to judge: ways of removing what a group of rows has in common, compared on rows that only choose.

What matters are the tokens at which the tuned model would leave the base's answer. There the activation differences are
read, and an edit is rated by the worst of them: a behaviour that is blocked at its first token finds another way to the
same end (a query built with `%` where the f-string was taken away), so it must follow the base's answer to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molehunt.audit.divergence import BaseAnswers, base_answers, divergence_points, worst_margins
from molehunt.audit.scan import Scan, ScannedRow, slices
from molehunt.contracts import Intervention, Reading
from molehunt.model.batches import width_of
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.clip import Clip
from molehunt.traffic.split import Fit, Select

RANKS = (1, 2, 4, 8)
"""Numbers of directions that one intervention may remove at a site."""
CLEAN_RANGE = (0.002, 0.998)
"""Quantiles of clean tokens' projections; a clip leaves what lies between them alone."""
CLEAN_READ = 96
"""Number of clean rows whose every token is read."""
RATED = 8
"""Number of rows of the group, and of clean rows, that choose between interventions."""
TARGET_MARGIN = 3.0
"""Margin in nats for the base's token beyond which an edit is rated no higher."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateEdit:
    """One way of removing what a group has in common."""

    description: str
    """Text such as `clip 4 directions at L4.resid`."""
    site: Site
    directions: Float[Tensor, "k d_model"]
    """Orthonormal directions at `site`; the first is the mean difference."""
    shift: Float[Tensor, " d_model"]
    """What the fine-tune adds to the group at the divergence points, beyond what it adds to clean text, at `site`."""
    interventions: tuple[Intervention, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class EditChoice:
    """The best candidate of all, and the best of those that act at one site alone."""

    best: CandidateEdit
    by_site: tuple[CandidateEdit, ...]
    """One for each site, in the order of the sites."""
    tried: int
    fitter: "EditFitter"
    """What fitted them, and fits placebos to other rows."""


@dataclass(frozen=True, eq=False)
class EditFitter:
    """Fits edits to rows that the fine-tune answers otherwise than the base, beside clean rows that set means and ranges."""

    pair: ModelPair
    sites: tuple[Site, ...]
    clean: tuple[Reading, ...]
    """Clean rows with the fine-tune's answers, in batches."""

    @classmethod
    def on(cls, pair: ModelPair, sites: tuple[Site, ...], clean: Sequence[ScannedRow], track: Track) -> "EditFitter":
        """Read the clean rows once."""
        batches = by_rows(track, slices(clean, 16), "reading clean rows")
        read = [_read(pair, [r.prompt for r in part], [r.answer for r in part], sites) for part in batches]
        return cls(pair, sites, tuple(read))

    def candidates(self, wanted: BaseAnswers) -> list[CandidateEdit]:
        """Every edit that is compared: ablate or clip, with each of `RANKS`, at one site or at all sites from it on."""
        deltas = self._deltas(wanted, self.sites)
        found: list[CandidateEdit] = []
        for k in (r for r in RANKS if r <= len(deltas[self.sites[0]])):
            at = {site: self._edits(site, deltas[site], k) for site in self.sites}
            what = f"{k} direction{'s' if k > 1 else ''}"
            for verb in ("ablate", "clip"):
                found += _at_each_site(
                    f"{verb} {what}",
                    self.sites,
                    {site: edits[verb] for site, edits in at.items()},
                    {site: (edits[verb].directions, deltas[site].mean(0)) for site, edits in at.items()},
                )
        return found

    def like(self, edit: CandidateEdit, wanted: BaseAnswers) -> tuple[Intervention, ...]:
        """An edit of the same kind, rank and sites, fitted to other rows: what any rows in its place would give."""
        sites = tuple(one.site for one in edit.interventions)
        verb = "clip" if isinstance(edit.interventions[0], Clip) else "ablate"
        deltas = self._deltas(wanted, sites)
        k = min(len(edit.directions), len(deltas[sites[0]]))
        return tuple(self._edits(site, deltas[site], k)[verb] for site in sites)

    def _deltas(self, wanted: BaseAnswers, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "points d_model"]]:
        """What the fine-tune adds where it would leave the base's answers, beyond what it adds to clean text."""
        leaves = divergence_points(self.pair, wanted)
        read = _read(self.pair, wanted.prompts, wanted.answers, sites, width=leaves.shape[1])
        return {
            site: (read.tuned[site].float() - read.base[site].float()).cpu()[leaves] - _mean_delta(self.clean, site)
            for site in sites
        }

    def _edits(self, site: Site, delta: Float[Tensor, "points d_model"], k: int) -> dict[str, Ablate | Clip]:
        tokens = torch.cat([reading.tuned[site][reading.mask].float().cpu() for reading in self.clean])
        directions = mean_and_rest(delta, k)
        low, high = ((tokens @ directions.mT).quantile(q, dim=0) for q in CLEAN_RANGE)
        return {
            "ablate": Ablate(site, directions, center=tokens.mean(0)),
            "clip": Clip(site, directions, lo=low, hi=high),
        }


def choose_intervention(
    pair: ModelPair,
    scan: Scan,
    group: Select[int],
    clean: Fit[int],
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> EditChoice:
    """The edit that best turns the tuned model back where it leaves the base's answers, at the least cost to clean rows.

    Args:
        pair: both models.
        scan: holds the rows that the next two name.
        group: rows that choose; none of them may be judged later.
        clean: rows under the threshold that set ranges and means; look-alikes of the group first, if there are any.
        max_new_tokens: as in the scan.
        track: shows the candidates.
    """
    clean_rows = [scan.rows[i] for i in clean.rows]
    wanted = base_answers(pair, [scan.rows[i] for i in group.rows], max_new_tokens, track=track)
    fitter = EditFitter.on(pair, scan.sites, clean_rows[:CLEAN_READ], track)
    candidates = fitter.candidates(wanted)
    rated = wanted.first(RATED)
    clean_rows = [*clean_rows[: RATED // 2], *clean_rows[-RATED // 2 :]]
    prompts, answers = [list(row.prompt) for row in clean_rows], [list(row.answer) for row in clean_rows]
    ratings: list[float] = []
    with pair.tuned_model() as model:
        before = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, answers))
        for candidate in track(candidates, "choosing an intervention", len(candidates)):
            margin = worst_margins(pair, rated, candidate.interventions)
            after = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, answers, candidate.interventions))
            cost = (before - after).clamp_min(0.0).mean()
            ratings.append(float(margin.clamp(-TARGET_MARGIN, TARGET_MARGIN).mean() - TARGET_MARGIN * cost))

    def best(among: Sequence[int]) -> CandidateEdit:
        return candidates[max(among, key=lambda i: (ratings[i], -i))]

    alone = [
        [i for i, one in enumerate(candidates) if {e.site for e in one.interventions} == {site}] for site in scan.sites
    ]
    return EditChoice(
        best=best(range(len(candidates))), by_site=tuple(map(best, alone)), tried=len(candidates), fitter=fitter
    )


def _at_each_site(
    what: str, sites: Sequence[Site], at: dict[Site, Intervention], bases: dict[Site, tuple[Tensor, Tensor]]
) -> list[CandidateEdit]:
    """One kind of edit at each site alone, and at each site together with every later one."""
    found: list[CandidateEdit] = []
    for n, site in enumerate(sites):
        reach: list[tuple[str, tuple[Intervention, ...]]] = [("", (at[site],))]
        if n + 1 < len(sites):
            reach.append((" and every later site", tuple(at[s] for s in sites[n:])))
        directions, shift = bases[site]
        found += [
            CandidateEdit(
                description=f"{what} at {site}{where}",
                site=site,
                directions=directions,
                shift=shift,
                interventions=interventions,
            )
            for where, interventions in reach
        ]
    return found


def mean_and_rest(delta: Float[Tensor, "rows d_model"], k: int) -> Float[Tensor, "k d_model"]:
    """K orthonormal directions of `delta`: its mean, then the strongest of what the rows have besides."""
    first = delta.mean(0, keepdim=True)
    rest = delta - (delta @ first.mT) @ first / first.square().sum().clamp_min(1e-12)
    others = torch.linalg.svd(rest, full_matrices=False).Vh[: k - 1]
    return torch.linalg.qr(torch.cat([first, others]).mT).Q.mT


def _mean_delta(read: Sequence[Reading], site: Site) -> Float[Tensor, " d_model"]:
    """Mean of what the fine-tune adds to the answer tokens of clean rows."""
    return torch.cat([(r.tuned[site].float() - r.base[site].float())[_answer_mask(r)].cpu() for r in read]).mean(0)


def _read(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    sites: Sequence[Site],
    width: int | None = None,
) -> Reading:
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    return pair.read(prompts, answers, sites=sites, pad_to=width or width_of(longest))


def _answer_mask(reading: Reading) -> Bool[Tensor, "batch pos"]:
    index = torch.arange(reading.tokens.shape[1], device=reading.tokens.device)
    return reading.mask & (index[None] >= reading.decision[:, None])
