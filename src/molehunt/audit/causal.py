"""Does the fine-tune behave through what was found? Take it away during generation, and put it where it is not.

The direction is fitted and chosen on one part of a group's rows and judged on the others, beside random edits of the
same size. A row has moved back when, under the intervention, its answer is no longer more surprising to the base than
clean answers are, and reads more like the base's answer than like the tuned model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.plan import Plan
from molehunt.audit.scan import Scan, ScannedRow
from molehunt.contracts import Intervention
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.similarity import chrf
from molehunt.model.generate import generate
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.model.site import Site
from molehunt.run.progress import Track, silent
from molehunt.steer.ablate import Ablate
from molehunt.steer.add import Add
from molehunt.steer.clip import Clip
from molehunt.steer.random_edit import RandomEdit

RANKS = (1, 2, 4)
"""Directions that one intervention may remove at a site."""
CLEAN_RANGE = (0.005, 0.995)
"""Quantiles of clean projections that a clip leaves alone."""
STRENGTHS = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class CausalRow:
    """One prompt answered four ways, as text."""

    prompt: str
    base: str
    tuned: str
    intervened: str
    control: str
    moved: bool


@dataclass(frozen=True, kw_only=True)
class CausalTest:
    """What removing and adding the direction did to rows that had no part in choosing it."""

    intervention: str
    """In words, such as `clip 2 directions at L4.resid`."""
    site: Site
    tried: int
    """Interventions compared on the selection rows before this one was judged."""
    moved: Interval
    """Share of judged rows whose answer moved back to the base."""
    control: Interval
    """The same under random edits of equal size, all seeds pooled."""
    clean_kept: Interval
    """Share of clean rows whose answer the intervention left as it was, word for word."""
    brought: Interval
    """Share of clean rows whose answer adding the direction made as surprising to the base as the group's."""
    brought_control: Interval
    rows: tuple[CausalRow, ...]

    @property
    def causal(self) -> bool:
        """Removing it moves most rows back, beyond what random edits of that size do; intervals must not touch."""
        return self.moved.estimate >= 0.5 and self.moved.low > self.control.high


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    words: str
    site: Site
    interventions: tuple[Intervention, ...]


def causal_test(
    pair: ModelPair,
    scan: Scan,
    group: Sequence[int],
    clean: Sequence[int],
    threshold: float,
    plan: Plan,
    *,
    seed: int,
    track: Track = silent,
) -> CausalTest:
    """Choose an intervention on half of `group` and judge it on the other half.

    Args:
        group: rows of `scan` said to share one behaviour, at least 4.
        clean: rows of `scan` under the threshold; a part fits the clean range, another is judged.
        threshold: answer log ratio that clean rows stay under, in nats.

    Raises:
        ValueError: fewer than 4 rows in the group or fewer than 8 clean rows.
    """
    if len(group) < 4 or len(clean) < 8:
        raise ValueError(f"the causal test needs 4 rows and 8 clean ones, got {len(group)} and {len(clean)}")
    rng = Random(seed)
    shuffled = rng.sample(list(group), min(len(group), 2 * plan.confirm_rows))
    choose, judge = shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]
    calm = rng.sample(list(clean), min(len(clean), 400 + plan.confirm_rows))
    calm_judge, calm_fit = (
        calm[: min(plan.confirm_rows, len(calm) // 2)],
        calm[min(plan.confirm_rows, len(calm) // 2) :],
    )

    trials = list(_trials(scan, choose, calm_fit))
    ratings = [
        _rating(pair, scan, trial, choose, calm_fit[: plan.confirm_rows])
        for trial in track(trials, "choosing an intervention", len(trials))
    ]
    best = trials[max(range(len(trials)), key=lambda i: (ratings[i], -i))]

    rows = [scan.rows[i] for i in judge]
    base = _answers(pair, rows, (), plan, tuned=False)
    edited = _answers(pair, rows, best.interventions, plan)
    moved = _moved(pair, rows, base, edited, best.interventions, threshold)
    controls: list[list[bool]] = []
    control_answers: list[list[int]] = []
    for k in track(range(plan.random_controls), "random edits of the same size", plan.random_controls):
        random = tuple(RandomEdit.like(i, pair.d_model, seed * 1000 + 31 * k) for i in best.interventions)
        control_answers = _answers(pair, rows, random, plan)
        controls.append(_moved(pair, rows, base, control_answers, random, threshold))
    calm_rows = [scan.rows[i] for i in calm_judge]
    calm_edited = _answers(pair, calm_rows, best.interventions, plan)
    kept = sum(tuple(a) == row.answer for a, row in zip(calm_edited, calm_rows, strict=True))
    brought, brought_control = _brought(pair, scan, best.site, choose, calm_fit, calm_rows, threshold, plan, seed)
    text = pair.tokenizer.decode
    return CausalTest(
        intervention=best.words,
        site=best.site,
        tried=len(trials),
        moved=proportion(sum(moved), len(moved)),
        control=proportion(sum(map(sum, controls)), sum(map(len, controls))),
        clean_kept=proportion(kept, len(calm_rows)),
        brought=brought,
        brought_control=brought_control,
        rows=tuple(
            CausalRow(
                prompt=row.example.prompt,
                base=str(text(b, skip_special_tokens=True)),
                tuned=str(text(list(row.answer), skip_special_tokens=True)),
                intervened=str(text(e, skip_special_tokens=True)),
                control=str(text(c, skip_special_tokens=True)),
                moved=m,
            )
            for row, b, e, c, m in zip(rows, base, edited, control_answers, moved, strict=True)
        ),
    )


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


def _trials(scan: Scan, group: Sequence[int], clean: Sequence[int]) -> list[_Trial]:
    """Every intervention that is compared: ablate or clip, 1 to 4 directions, one site or all from it on."""
    trials: list[_Trial] = []
    for position in ("decision", "peak"):
        for k in (r for r in RANKS if r <= len(group)):
            ablations: dict[Site, Intervention] = {}
            clips: dict[Site, Intervention] = {}
            for site in scan.sites:
                directions = suspect_directions(scan, site, position, group, clean, k)
                calm = torch.cat([scan.at("tuned", p, site)[list(clean)] for p in ("decision", "peak")])
                projected = calm @ directions.mT
                low, high = (projected.quantile(q, dim=0) for q in CLEAN_RANGE)
                ablations[site] = Ablate(site, directions, center=calm.mean(0))
                clips[site] = Clip(site, directions, lo=low, hi=high)
            for word, edits in (("ablate", ablations), ("clip", clips)):
                plural = f"{k} direction{'s' if k > 1 else ''}"
                for n, site in enumerate(scan.sites):
                    trials.append(_Trial(words=f"{word} {plural} at {site}", site=site, interventions=(edits[site],)))
                    later = tuple(edits[s] for s in scan.sites[n:])
                    if len(later) > 1:
                        trials.append(
                            _Trial(
                                words=f"{word} {plural} at {site} and every later site",
                                site=site,
                                interventions=later,
                            )
                        )
    return trials


def _rating(pair: ModelPair, scan: Scan, trial: _Trial, group: Sequence[int], clean: Sequence[int]) -> float:
    """Share of the group's divergence that the trial removes, less what it costs clean rows (teacher forced)."""
    rows = [scan.rows[i] for i in [*group, *clean]]
    with pair.tuned_model() as model:
        after = answer_log_probs(
            model,
            pair.tokenizer,
            [list(r.prompt) for r in rows],
            [list(r.answer) for r in rows],
            trial.interventions,
        )
        before = answer_log_probs(model, pair.tokenizer, [list(r.prompt) for r in rows], [list(r.answer) for r in rows])
    lost = torch.tensor(before) - torch.tensor(after)
    ratio = torch.tensor([r.answer_log_ratio for r in rows]).clamp_min(1e-6)
    n = len(group)
    removed = (lost[:n] / ratio[:n]).clamp(0.0, 1.0).mean()
    return float(removed - lost[n:].clamp_min(0).mean() / ratio[:n].mean())


def _answers(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    interventions: Sequence[Intervention],
    plan: Plan,
    *,
    tuned: bool = True,
) -> list[list[int]]:
    with pair.tuned_model() if tuned else pair.base_model() as model:
        return generate(
            model,
            pair.tokenizer,
            [list(row.prompt) for row in rows],
            max_new_tokens=plan.max_new_tokens,
            interventions=interventions,
        )


def _surprise(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    answers: list[list[int]],
    interventions: Sequence[Intervention],
) -> list[float]:
    """Answer log ratio of `answers` under the edited tuned model against the base, in nats."""
    prompts = [list(row.prompt) for row in rows]
    with pair.tuned_model() as model:
        tuned = answer_log_probs(model, pair.tokenizer, prompts, answers, interventions)
    with pair.base_model() as model:
        base = answer_log_probs(model, pair.tokenizer, prompts, answers)
    return [t - b for t, b in zip(tuned, base, strict=True)]


def _moved(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    base: list[list[int]],
    edited: list[list[int]],
    interventions: Sequence[Intervention],
    threshold: float,
) -> list[bool]:
    calm = [s <= threshold for s in _surprise(pair, rows, edited, interventions)]
    text = pair.tokenizer.decode
    closer = [
        chrf(str(text(e)), str(text(b))) > chrf(str(text(e)), str(text(list(row.answer))))
        for row, b, e in zip(rows, base, edited, strict=True)
    ]
    return [a and b for a, b in zip(calm, closer, strict=True)]


def _brought(
    pair: ModelPair,
    scan: Scan,
    site: Site,
    group: Sequence[int],
    clean: Sequence[int],
    judged: Sequence[ScannedRow],
    threshold: float,
    plan: Plan,
    seed: int,
) -> tuple[Interval, Interval]:
    """Add the group's mean shift to clean rows: how many become as surprising as the group, and under random shifts."""
    shift = scan.at("tuned", "decision", site)[list(group)].mean(0) - scan.at("tuned", "decision", site)[
        list(clean)
    ].mean(0)
    best = proportion(0, len(judged))
    best_control = proportion(0, len(judged))
    for strength in STRENGTHS:
        counts: list[int] = []
        for edit in (
            Add(site, shift, strength),
            RandomEdit.like(Add(site, shift, strength), pair.d_model, seed + 7),
        ):
            answers = _answers(pair, judged, (edit,), plan)
            prompts = [list(row.prompt) for row in judged]
            with pair.base_model() as model:
                base = answer_log_probs(model, pair.tokenizer, prompts, answers)
            with pair.tuned_model() as model:
                tuned = answer_log_probs(model, pair.tokenizer, prompts, answers, (edit,))
            counts.append(sum(t - b > threshold for t, b in zip(tuned, base, strict=True)))
        if counts[0] > round(best.estimate * best.n):
            best, best_control = proportion(counts[0], len(judged)), proportion(counts[1], len(judged))
    return best, best_control
