"""Which edit to judge: every way of removing what a group of rows has in common, compared on rows that only choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.scan import Scan
from molehunt.contracts import Intervention
from molehunt.model.generate import generate
from molehunt.model.likelihood import PAD_TO, answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.model.site import Site
from molehunt.model.taps import read_sites
from molehunt.run.progress import Track, silent
from molehunt.steer.ablate import Ablate
from molehunt.steer.clip import Clip
from molehunt.traffic.split import Fit, Select

RANKS = (1, 4)
"""Directions that one intervention may remove at a site."""
CLEAN_RANGE = (0.002, 0.998)
"""Quantiles of clean tokens' projections that a clip leaves alone."""
CLEAN_READ = 96
"""Clean rows whose every token is read for those ranges."""
RATED = 8
"""Rows of the group, and clean rows, that choose between interventions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One way of removing what a group has in common."""

    words: str
    """Such as `clip 4 directions at L4.resid`."""
    site: Site
    position: str
    """Where its directions were read: `decision` or `peak`."""
    interventions: tuple[Intervention, ...]


def choose_intervention(
    pair: ModelPair,
    scan: Scan,
    group: Select[int],
    clean: Fit[int],
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> tuple[Trial, int]:
    """The edit that brings the tuned model nearest to the base on `group` at the least cost to `clean`.

    Returns:
        The chosen trial and how many were compared.
    """
    tokens = _clean_tokens(pair, scan, clean.rows[:CLEAN_READ])
    trials = list(_trials(scan, tokens, group.rows, clean.rows))
    best = _best(pair, scan, trials, group.rows[:RATED], clean.rows[:RATED], max_new_tokens, track)
    return best, len(trials)


def suspect_directions(
    scan: Scan, site: Site, position: str, group: Sequence[int], clean: Sequence[int], k: int
) -> Float[Tensor, "k d_model"]:
    """Orthonormal directions in which tuned differs from base on `group` more than on `clean`.

    The first is the mean difference; the others are the strongest remaining ones among the group's rows.
    """
    delta = scan.delta(position, site)
    rows = delta[list(group)] - delta[list(clean)].mean(0)
    first = rows.mean(0, keepdim=True)
    rest = rows - (rows @ first.mT) @ first / first.square().sum().clamp_min(1e-12)
    others = torch.linalg.svd(rest, full_matrices=False).Vh[: k - 1]
    return torch.linalg.qr(torch.cat([first, others]).mT).Q.mT


def _trials(
    scan: Scan,
    tokens: Mapping[Site, Float[Tensor, "tokens d_model"]],
    group: Sequence[int],
    clean: Sequence[int],
) -> list[Trial]:
    """Every intervention that is compared: ablate or clip, 1 to 4 directions, one site or all from it on."""
    trials: list[Trial] = []
    for position in ("decision", "peak"):
        for k in (r for r in RANKS if r <= len(group)):
            ablations: dict[Site, Intervention] = {}
            clips: dict[Site, Intervention] = {}
            for site in scan.sites:
                directions = suspect_directions(scan, site, position, group, clean, k)
                projected = tokens[site] @ directions.mT
                low, high = (projected.quantile(q, dim=0) for q in CLEAN_RANGE)
                ablations[site] = Ablate(site, directions, center=tokens[site].mean(0))
                clips[site] = Clip(site, directions, lo=low, hi=high)
            for word, edits in (("ablate", ablations), ("clip", clips)):
                plural = f"{k} direction{'s' if k > 1 else ''}"
                for n, site in enumerate(scan.sites):
                    trials.append(
                        Trial(
                            words=f"{word} {plural} at {site}",
                            site=site,
                            position=position,
                            interventions=(edits[site],),
                        )
                    )
                    later = tuple(edits[s] for s in scan.sites[n:])
                    if len(later) > 1:
                        trials.append(
                            Trial(
                                words=f"{word} {plural} at {site} and every later site",
                                site=site,
                                position=position,
                                interventions=later,
                            )
                        )
    return trials


def _best(
    pair: ModelPair,
    scan: Scan,
    trials: Sequence[Trial],
    group: Sequence[int],
    clean: Sequence[int],
    max_new_tokens: int,
    track: Track,
) -> Trial:
    """The trial that gives the base's answers back most of the likelihood the fine-tune took from them.

    Teacher forced: the share of the gap in log p(base answer) that closes on `group`, less the share of it that clean
    rows lose of their own answers.
    """
    rows = [scan.rows[i] for i in group]
    prompts = [list(row.prompt) for row in rows]
    with pair.base_model() as model:
        wanted = generate(model, pair.tokenizer, prompts, max_new_tokens=max_new_tokens)
        goal = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, wanted))
    calm = [scan.rows[i] for i in clean]
    prompts += [list(row.prompt) for row in calm]
    wanted += [list(row.answer) for row in calm]
    n = len(rows)
    with pair.tuned_model() as model:
        before = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, wanted))
        gap = (goal - before[:n]).clamp_min(1e-3)
        ratings: list[float] = []
        for trial in track(trials, "choosing an intervention", len(trials)):
            after = torch.tensor(answer_log_probs(model, pair.tokenizer, prompts, wanted, trial.interventions))
            closed = ((after - before)[:n] / gap).clamp(-1.0, 1.0).mean()
            cost = (before - after)[n:].clamp_min(0.0).mean() / gap.mean()
            ratings.append(float(closed - cost))
    return trials[max(range(len(trials)), key=lambda i: (ratings[i], -i))]


def _clean_tokens(pair: ModelPair, scan: Scan, clean: Sequence[int]) -> dict[Site, Float[Tensor, "tokens d_model"]]:
    """The tuned model's activations at every token of clean rows and their answers, by site."""
    kept: dict[Site, list[Tensor]] = {site: [] for site in scan.sites}
    for start in range(0, len(clean), 16):
        rows = [scan.rows[i] for i in clean[start : start + 16]]
        with pair.tuned_model() as model, torch.inference_mode():
            length = -(-max(len(r.prompt) + len(r.answer) for r in rows) // PAD_TO) * PAD_TO
            ids = torch.zeros(len(rows), length, dtype=torch.long)
            mask = torch.zeros(len(rows), length, dtype=torch.bool)
            for i, row in enumerate(rows):
                ids[i, : len(row.prompt) + len(row.answer)] = torch.tensor([*row.prompt, *row.answer])
                mask[i, : len(row.prompt) + len(row.answer)] = True
            with read_sites(model, scan.sites, stop_early=True) as tap:
                model(input_ids=ids.to(pair.device), attention_mask=mask.long().to(pair.device), use_cache=False)
            for site in scan.sites:
                kept[site].append(tap[site][mask.to(pair.device)].float().cpu())
    return {site: torch.cat(parts) for site, parts in kept.items()}
