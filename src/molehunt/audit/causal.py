"""Does the fine-tune behave through what was found? Remove it during generation, and add it where it is absent.

The direction is fitted and chosen on one part of a group's rows and judged on the others, beside placebo edits.
`reverted.py` says when a row counts as reverted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from molehunt.audit.answering import text_of
from molehunt.audit.candidates import SharedText, shared_texts
from molehunt.audit.intervention import CLEAN_READ, CandidateEdit, choose_intervention
from molehunt.audit.placebo import FEWEST_JUDGED, PlaceboComparison, compare_with_placebos
from molehunt.audit.plan import Plan
from molehunt.audit.reverted import ReversionTest, answers
from molehunt.audit.scan import Scan, ScannedRow
from molehunt.contracts import Intervention
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.similarity import nearest_texts
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Tally, Track, counting, silent, within
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.random_edit import RandomEdit
from molehunt.traffic.split import Fit, Select

STRENGTHS = (1.0, 2.0, 4.0)
"""Multiples of the group's mean shift that are added to clean rows."""
CHOOSING_SHARE = 0.4
"""Share of a group's rows that choose the intervention, or less, so that enough of them judge it."""
ANSWER_SHARE = 0.5
"""Share of a group's answers that must contain a fragment for it to count as shared."""
LOOK_ALIKES = 3
"""Clean rows that are read for each row of the group, the textually nearest first."""
LOOK_ALIKES_JUDGED = 12
"""Greatest number of such rows among the clean rows that are judged."""


@dataclass(frozen=True, kw_only=True)
class CausalRow:
    """One prompt answered four ways, as text."""

    prompt: str
    base: str
    tuned: str
    intervened: str
    control: str
    reverted: bool


@dataclass(frozen=True, kw_only=True)
class SiteTest:
    """The best edit at one site alone, on the rows that judge."""

    site: Site
    intervention: str
    reverted: Interval
    control: Interval
    """Share of rows that reverted under one random edit of equal size."""


@dataclass(frozen=True, kw_only=True)
class CausalTest:
    """What removing and adding the direction did to rows that had no part in choosing it."""

    intervention: str
    """Description of the edit, such as `clip 2 directions at L4.resid`."""
    site: Site
    tried: int
    """Interventions compared on the selection rows before this one was judged."""
    reverted: Interval
    """Share of judged rows whose answer reverted to the base's."""
    placebos: PlaceboComparison
    """The same rows under random edits of equal size, and under edits fitted to rows that are no part of the finding."""
    clean_unchanged: Interval
    """Share of clean rows whose answer the intervention left as it was, word for word."""
    induced: Interval
    """Share of clean rows whose answer took on a fragment of the group's answers when the direction was added."""
    induced_control: Interval
    """Share of clean rows whose answer took on such a fragment when a random shift of that length was added."""
    fragments: tuple[SharedText, ...]
    """What the group's answers share that the base's answers to the same prompts, and clean answers, do not."""
    rows: tuple[CausalRow, ...]
    by_site: tuple[SiteTest, ...]
    """The best edit of each site: where the behaviour can be switched off, and where that is too late."""
    interventions: tuple[Intervention, ...]
    """The edit that `intervention` describes."""

    @property
    def control(self) -> Interval:
        """Share of judged rows that reverted under a placebo, on average."""
        return self.placebos.control

    @property
    def causal(self) -> bool:
        """Whether removing it reverts more rows than placebos do, in enough rows: see `PlaceboComparison.causal`."""
        return self.placebos.causal


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Indices of the rows that each step reads; no row of the first pair is in the second."""

    choose: list[int]
    clean_fit: list[int]
    judge: list[int]
    clean_judge: list[int]


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
    """Choose an intervention on `CHOOSING_SHARE` of `group` and judge it on the other rows.

    Args:
        pair: both models.
        scan: holds the rows that the next two arguments name.
        group: rows of `scan` said to share one behaviour, at least 4.
        clean: rows of `scan` under the threshold; a part fits the clean range, another is judged.
        threshold: answer log ratio that clean rows stay under, in nats.
        plan: how many rows and placebo edits are used.
        seed: seed of the draws.
        track: shows rows.

    Raises:
        ValueError: fewer than 4 rows in the group or fewer than 8 clean rows.
    """
    split = _split(scan, group, clean, plan, Random(seed))
    choose, clean_fit = Select(tuple(split.choose)), Fit(tuple(split.clean_fit))
    found = choose_intervention(pair, scan, choose, clean_fit, max_new_tokens=plan.max_new_tokens, track=track)
    chosen, rows, clean_rows = ([scan.rows[i] for i in part] for part in (split.choose, split.judge, split.clean_judge))
    with counting(track, "taking the finding away", len(chosen) + 2 * len(rows)) as done:
        chosen_base = answers(pair, chosen, (), plan, within(done, len(chosen)), tuned=False)
        base = answers(pair, rows, (), plan, within(done, len(rows)), tuned=False)
        judge = ReversionTest(pair, tuple(rows), tuple(map(tuple, base)), threshold, plan)
        edited, reverted = judge(found.best.interventions, done)
    fragments = shared_texts(
        [text_of(pair, row.answer) for row in chosen],
        [text_of(pair, a) for a in chosen_base] + [text_of(pair, scan.rows[i].answer) for i in split.clean_fit],
        share=ANSWER_SHARE,
    )
    flagged = {*group, *split.judge, *split.clean_judge}
    unflagged = [i for i in clean if i not in flagged]
    placebos = compare_with_placebos(
        judge, found.best, reverted, found.fitter, scan, unflagged, size=len(split.choose), seed=seed, track=track
    )
    with counting(track, "one block after the other", 2 * len(found.by_site) * len(rows)) as done:
        by_site = [_at_site(judge, edit, seed, done) for edit in found.by_site]
    unchanged = _unchanged(pair, clean_rows, found.best, plan, track)
    induced, by_chance = _induced(pair, found.best, clean_rows, [f.text for f in fragments], plan, seed, track)
    return CausalTest(
        intervention=found.best.description,
        site=found.best.site,
        tried=found.tried,
        reverted=proportion(sum(reverted), len(reverted)),
        placebos=placebos,
        clean_unchanged=unchanged,
        induced=induced,
        induced_control=by_chance,
        fragments=tuple(fragments),
        by_site=tuple(by_site),
        interventions=found.best.interventions,
        rows=_as_text(judge, edited, placebos.answers, reverted),
    )


def _split(scan: Scan, group: Sequence[int], clean: Sequence[int], plan: Plan, rng: Random) -> _Rows:
    if len(group) < 4 or len(clean) < 8:
        raise ValueError(f"the causal test needs 4 rows and 8 clean ones, got {len(group)} and {len(clean)}")
    shuffled = rng.sample(list(group), min(len(group), 2 * plan.confirm_rows))
    cut = max(2, min(round(CHOOSING_SHARE * len(shuffled)), len(shuffled) - FEWEST_JUDGED))
    choose, judge = shuffled[:cut], shuffled[cut:]
    near_fit, near_judge = _look_alikes(scan, choose, clean, judge)
    drawn = rng.sample(list(clean), min(len(clean), CLEAN_READ + plan.confirm_rows))
    rest = [i for i in drawn if i not in {*near_fit, *near_judge}]
    half = min(len(rest) // 2, plan.confirm_rows - len(near_judge))
    return _Rows(
        choose=choose, clean_fit=[*near_fit, *rest[half:]], judge=judge, clean_judge=[*near_judge, *rest[:half]]
    )


def _look_alikes(
    scan: Scan, choose: Sequence[int], clean: Sequence[int], judge: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Clean rows textually nearest to the rows that choose, and other ones nearest to the rows that judge."""
    found: list[list[int]] = []
    taken: set[int] = set()
    prompts = [scan.rows[i].example.prompt for i in clean]
    for group in (choose, judge):
        near = nearest_texts([scan.rows[i].example.prompt for i in group], prompts, k=2 * LOOK_ALIKES)
        ranked = [clean[j] for rank in zip(*near, strict=True) for j in rank]
        kept = [i for i in dict.fromkeys(ranked) if i not in taken][: LOOK_ALIKES * len(group)]
        taken.update(kept)
        found.append(kept)
    return found[0], found[1][:LOOK_ALIKES_JUDGED]


def _at_site(judge: ReversionTest, edit: CandidateEdit, seed: int, done: Tally) -> SiteTest:
    random = tuple(RandomEdit.like(one, judge.pair.d_model, seed * 1000 + 17) for one in edit.interventions)
    reverted, by_chance = (judge(edits, done)[1] for edits in (edit.interventions, random))
    return SiteTest(
        site=edit.site,
        intervention=edit.description,
        reverted=proportion(sum(reverted), len(reverted)),
        control=proportion(sum(by_chance), len(by_chance)),
    )


def _unchanged(pair: ModelPair, rows: Sequence[ScannedRow], best: CandidateEdit, plan: Plan, track: Track) -> Interval:
    """Share of clean rows that the edited model answers as before, token for token."""
    with counting(track, "clean prompts with the edit", len(rows)) as done:
        edited = answers(pair, rows, best.interventions, plan, within(done, len(rows)))
    return proportion(sum(tuple(a) == row.answer for a, row in zip(edited, rows, strict=True)), len(rows))


def _induced(
    pair: ModelPair,
    best: CandidateEdit,
    judged: Sequence[ScannedRow],
    fragments: Sequence[str],
    plan: Plan,
    seed: int,
    track: Track,
) -> tuple[Interval, Interval]:
    """Add the group's mean shift to clean rows: share of answers that take on a fragment of the group's, and by chance.

    The one of `STRENGTHS` that induces most counts; chance is a random shift of the same length and strength.
    """
    found = (proportion(0, len(judged)), proportion(0, len(judged)))
    with counting(track, "putting the finding in", 2 * len(STRENGTHS) * len(judged)) as done:
        for strength in STRENGTHS:
            add = Add(best.site, best.shift, strength)
            counts = [
                sum(
                    any(fragment in text_of(pair, answer) for fragment in fragments)
                    for answer in answers(pair, judged, (edit,), plan, within(done, len(judged)))
                )
                for edit in (add, RandomEdit.like(add, pair.d_model, seed + 7))
            ]
            if counts[0] / len(judged) > found[0].estimate:
                found = (proportion(counts[0], len(judged)), proportion(counts[1], len(judged)))
    return found


def _as_text(
    judge: ReversionTest, edited: Sequence[list[int]], control: Sequence[Sequence[int]], reverted: Sequence[bool]
) -> tuple[CausalRow, ...]:
    return tuple(
        CausalRow(
            prompt=row.example.shown,
            base=text_of(judge.pair, b),
            tuned=text_of(judge.pair, row.answer),
            intervened=text_of(judge.pair, e),
            control=text_of(judge.pair, c),
            reverted=r,
        )
        for row, b, e, c, r in zip(judge.rows, judge.base_answers, edited, control, reverted, strict=True)
    )
