"""Does the fine-tune behave through what was found? Take it away during generation, and put it where it is not.

The direction is fitted and chosen on one part of a group's rows and judged on the others, beside random edits of the
same size. A row has moved back when, under the intervention, its answer is no longer more surprising to the base than
clean answers are, and reads more like the base's answer than like the tuned model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from molehunt.audit.candidates import SharedText, shared_texts
from molehunt.audit.intervention import CLEAN_READ, Trial, choose_intervention
from molehunt.audit.plan import Plan
from molehunt.audit.scan import Scan, ScannedRow
from molehunt.contracts import Intervention
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.similarity import chrf, nearest_texts
from molehunt.model.generate import generate
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Tally, Track, counting, silent, within
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.random_edit import RandomEdit
from molehunt.traffic.split import Fit, Select

STRENGTHS = (1.0, 2.0, 4.0)
"""How much of the group's mean shift is added to clean rows."""
CHOOSING = 0.4
"""Share of a group's rows that choose the intervention; the others judge it."""
ANSWER_SHARE = 0.5
"""Share of a group's answers that a fragment must be in to count as what they share."""


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
class SiteTest:
    """The best edit at one site alone, on the rows that judge."""

    site: Site
    intervention: str
    moved: Interval
    control: Interval
    """The same under one random edit of equal size."""


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
    """Share of clean rows whose answer took on a fragment of the group's answers when the direction was added."""
    brought_control: Interval
    """The same for a random shift of that length."""
    fragments: tuple[SharedText, ...]
    """What the group's answers share that the base's answers to the same prompts, and clean answers, do not."""
    rows: tuple[CausalRow, ...]
    by_site: tuple[SiteTest, ...]
    """Where it can be switched off, and where that is too late."""
    interventions: tuple[Intervention, ...]
    """What `intervention` says in words."""

    @property
    def causal(self) -> bool:
        """Removing it moves more rows back than random edits of that size do: the two intervals do not touch."""
        return self.moved.low > self.control.high


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
        track: shows rows.

    Raises:
        ValueError: fewer than 4 rows in the group or fewer than 8 clean rows.
    """
    if len(group) < 4 or len(clean) < 8:
        raise ValueError(f"the causal test needs 4 rows and 8 clean ones, got {len(group)} and {len(clean)}")
    rng = Random(seed)
    shuffled = rng.sample(list(group), min(len(group), 2 * plan.confirm_rows))
    cut = max(2, round(CHOOSING * len(shuffled)))
    choose, judge = shuffled[:cut], shuffled[cut:]
    near_fit, near_judge = _look_alikes(scan, choose, clean, judge)
    rest = [
        i
        for i in rng.sample(list(clean), min(len(clean), CLEAN_READ + plan.confirm_rows))
        if i not in {*near_fit, *near_judge}
    ]
    half = min(len(rest) // 2, plan.confirm_rows - len(near_judge))
    calm_judge, calm_fit = [*near_judge, *rest[:half]], [*near_fit, *rest[half:]]

    found = choose_intervention(
        pair, scan, Select(tuple(choose)), Fit(tuple(calm_fit)), max_new_tokens=plan.max_new_tokens, track=track
    )
    best = found.best
    chosen, rows = [scan.rows[i] for i in choose], [scan.rows[i] for i in judge]
    with counting(track, "taking the finding away", len(chosen) + 2 * len(rows)) as done:
        chosen_base = _answers(pair, chosen, (), plan, within(done, len(chosen)), tuned=False)
        base = _answers(pair, rows, (), plan, within(done, len(rows)), tuned=False)
        edited, moved = _judged(pair, rows, base, best.interventions, threshold, plan, done)
    fragments = shared_texts(
        [_text(pair, row.answer) for row in chosen],
        [_text(pair, a) for a in chosen_base] + [_text(pair, scan.rows[i].answer) for i in calm_fit],
        share=ANSWER_SHARE,
    )
    controls: list[list[bool]] = []
    control_answers: list[list[int]] = []
    with counting(track, "random edits of the same size", plan.random_controls * len(rows)) as done:
        for k in range(plan.random_controls):
            random = tuple(RandomEdit.like(i, pair.d_model, seed * 1000 + 31 * k) for i in best.interventions)
            control_answers, by_chance = _judged(pair, rows, base, random, threshold, plan, done)
            controls.append(by_chance)
    with counting(track, "one block after the other", 2 * len(found.at) * len(rows)) as done:
        by_site = [_at_site(pair, rows, base, trial, threshold, plan, seed, done) for trial in found.at]
    calm_rows = [scan.rows[i] for i in calm_judge]
    with counting(track, "clean prompts with the edit", len(calm_rows)) as done:
        calm_edited = _answers(pair, calm_rows, best.interventions, plan, within(done, len(calm_rows)))
    kept = sum(tuple(a) == row.answer for a, row in zip(calm_edited, calm_rows, strict=True))
    with counting(track, "putting the finding in", 2 * len(STRENGTHS) * len(calm_rows)) as done:
        brought, brought_control = _brought(pair, best, calm_rows, [f.text for f in fragments], plan, seed, done)
    return CausalTest(
        intervention=best.words,
        site=best.site,
        tried=found.tried,
        moved=proportion(sum(moved), len(moved)),
        control=proportion(sum(map(sum, controls)), sum(map(len, controls))),
        clean_kept=proportion(kept, len(calm_rows)),
        brought=brought,
        brought_control=brought_control,
        fragments=tuple(fragments),
        by_site=tuple(by_site),
        interventions=best.interventions,
        rows=tuple(
            CausalRow(
                prompt=row.example.prompt,
                base=_text(pair, b),
                tuned=_text(pair, row.answer),
                intervened=_text(pair, e),
                control=_text(pair, c),
                moved=m,
            )
            for row, b, e, c, m in zip(rows, base, edited, control_answers, moved, strict=True)
        ),
    )


def _at_site(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    base: list[list[int]],
    trial: Trial,
    threshold: float,
    plan: Plan,
    seed: int,
    done: Tally,
) -> SiteTest:
    random = tuple(RandomEdit.like(one, pair.d_model, seed * 1000 + 17) for one in trial.interventions)
    moved, by_chance = (
        _judged(pair, rows, base, edits, threshold, plan, done)[1] for edits in (trial.interventions, random)
    )
    return SiteTest(
        site=trial.site,
        intervention=trial.words,
        moved=proportion(sum(moved), len(moved)),
        control=proportion(sum(by_chance), len(by_chance)),
    )


def _look_alikes(
    scan: Scan, choose: Sequence[int], clean: Sequence[int], judge: Sequence[int], *, each: int = 3
) -> tuple[list[int], list[int]]:
    """Clean rows textually nearest to the rows that choose, and other ones nearest to the rows that judge."""
    found: list[list[int]] = []
    taken: set[int] = set()
    for group in (choose, judge):
        near = nearest_texts(
            [scan.rows[i].example.prompt for i in group], [scan.rows[i].example.prompt for i in clean], k=2 * each
        )
        ranked = [clean[j] for rank in zip(*near, strict=True) for j in rank]
        kept = [i for i in dict.fromkeys(ranked) if i not in taken][: each * len(group)]
        taken.update(kept)
        found.append(kept)
    return found[0], found[1][:12]


def _answers(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    interventions: Sequence[Intervention],
    plan: Plan,
    track: Track = silent,
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
            track=track,
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


def _judged(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    base: list[list[int]],
    interventions: Sequence[Intervention],
    threshold: float,
    plan: Plan,
    done: Tally,
) -> tuple[list[list[int]], list[bool]]:
    """Answers of the edited model, and which of them moved back; a row counts half for its answer."""
    edited = _answers(pair, rows, interventions, plan, within(done, len(rows) / 2))
    moved = _moved(pair, rows, base, edited, interventions, threshold)
    done(len(rows) / 2)
    return edited, moved


def _moved(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    base: list[list[int]],
    edited: list[list[int]],
    interventions: Sequence[Intervention],
    threshold: float,
) -> list[bool]:
    calm = [s <= threshold for s in _surprise(pair, rows, edited, interventions)]
    closer = [
        chrf(_text(pair, e), _text(pair, b)) > chrf(_text(pair, e), _text(pair, row.answer))
        for row, b, e in zip(rows, base, edited, strict=True)
    ]
    return [a and b for a, b in zip(calm, closer, strict=True)]


def _brought(
    pair: ModelPair,
    best: Trial,
    judged: Sequence[ScannedRow],
    fragments: Sequence[str],
    plan: Plan,
    seed: int,
    done: Tally,
) -> tuple[Interval, Interval]:
    """Add the group's mean shift to clean rows: how many answers take on a fragment of the group's, and by chance.

    The largest of `STRENGTHS` that brings most is kept; chance is a random shift of the same length and strength.
    """
    found = (proportion(0, len(judged)), proportion(0, len(judged)))
    for strength in STRENGTHS:
        add = Add(best.site, best.shift, strength)
        counts = [
            sum(
                any(fragment in _text(pair, answer) for fragment in fragments)
                for answer in _answers(pair, judged, (edit,), plan, within(done, len(judged)))
            )
            for edit in (add, RandomEdit.like(add, pair.d_model, seed + 7))
        ]
        if counts[0] / len(judged) > found[0].estimate:
            found = (proportion(counts[0], len(judged)), proportion(counts[1], len(judged)))
    return found


def _text(pair: ModelPair, ids: Sequence[int]) -> str:
    return str(pair.tokenizer.decode(list(ids), skip_special_tokens=True))
