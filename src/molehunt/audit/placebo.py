"""Is it this edit that moves the rows, or would any edit like it? Placebos on the same rows, with the row as the unit.

Half of the placebos are of the same size in a random direction. The other half come from the same pipeline, fitted to
rows that are no part of the finding and that the fine-tune answers otherwise than the base: if these move the finding's
rows, too, the edit takes the fine-tune away, and not a behaviour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from molehunt.audit.divergence import BaseAnswers
from molehunt.audit.intervention import CandidateEdit, EditFitter
from molehunt.audit.reverted import ReversionTest
from molehunt.audit.scan import Scan
from molehunt.contracts import Intervention
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.sign_flip import sign_flip_p
from molehunt.run.progress import Track, counting
from molehunt.steer.random_edit import RandomEdit

PlaceboKind = Literal["random", "fitted"]
FEWEST_JUDGED = 8
"""Number of judged rows that evidence of a cause needs."""
LEVEL = 0.05
"""p-value up to which both tests pass."""


@dataclass(frozen=True, kw_only=True)
class PlaceboComparison:
    """Which rows reverted under an edit, and under each placebo."""

    reverted: tuple[bool, ...]
    placebos: tuple[tuple[bool, ...], ...]
    """For each placebo the rows that reverted under it."""
    kinds: tuple[PlaceboKind, ...]
    answers: tuple[tuple[int, ...], ...]
    """The rows' answers under the last random placebo, token ids."""

    @property
    def by_row(self) -> list[float]:
        """Share of the placebos under which each row reverted."""
        return [sum(one) / len(self.placebos) for one in zip(*self.placebos, strict=True)]

    @property
    def control(self) -> Interval:
        """Mean share that reverted under a placebo; its limits are those of as many rows under one placebo each."""
        n, total = len(self.reverted), sum(self.by_row)
        limits = proportion(round(total), n)
        return Interval(total / n, min(limits.low, total / n), max(limits.high, total / n), n)

    @property
    def p_edits(self) -> float:
        """Rank of the edit among the placebos: the share of all of them that revert at least as many rows."""
        return (1 + sum(sum(one) >= sum(self.reverted) for one in self.placebos)) / (1 + len(self.placebos))

    @property
    def p_rows(self) -> float:
        """Sign-flip p-value of the rows' outcomes minus their share under placebos."""
        return sign_flip_p([float(a) - b for a, b in zip(self.reverted, self.by_row, strict=True)])

    @property
    def causal(self) -> bool:
        """Whether the edit reverts enough rows, more than the placebos do and in more than a few rows."""
        return len(self.reverted) >= FEWEST_JUDGED and self.p_edits <= LEVEL and self.p_rows <= LEVEL


def compare_with_placebos(
    judge: ReversionTest,
    edit: CandidateEdit,
    reverted: Sequence[bool],
    fitter: EditFitter,
    scan: Scan,
    unflagged: Sequence[int],
    *,
    size: int,
    seed: int,
    track: Track,
) -> PlaceboComparison:
    """Judge placebos on the rows of `judge`.

    Args:
        judge: says which of its rows revert under an edit.
        edit: what the placebos are like.
        reverted: which rows reverted under it.
        fitter: fits edits of its kind.
        scan: holds the rows that the next one names, with the base's answers.
        unflagged: rows that are no part of the finding; those that both models answer alike are passed over.
        size: number of rows that each fitted placebo is fitted to.
        seed: seed of the draws.
        track: shows rows.
    """
    n, rng = judge.plan.random_controls, Random(seed)
    differing = [i for i in unflagged if scan.rows[i].base_answer and scan.rows[i].answer != scan.rows[i].base_answer]
    fitted = n // 2 if len(differing) >= 2 * size else 0
    outcomes, answers = list[tuple[bool, ...]](), list[list[int]]()
    kinds: list[PlaceboKind] = ["fitted" if k < fitted else "random" for k in range(n)]
    with counting(track, "placebo edits", n * len(judge.rows)) as done:
        for k, kind in enumerate(kinds):
            placebo: tuple[Intervention, ...]
            if kind == "fitted":
                drawn = [scan.rows[i] for i in rng.sample(differing, size)]
                wanted = BaseAnswers(tuple(r.prompt for r in drawn), tuple(r.base_answer for r in drawn))
                placebo = fitter.like(edit, wanted)
            else:
                placebo = tuple(
                    RandomEdit.like(i, judge.pair.d_model, seed * 1000 + 31 * (k - fitted)) for i in edit.interventions
                )
            answers, by_chance = judge(placebo, done)
            outcomes.append(tuple(by_chance))
    return PlaceboComparison(
        reverted=tuple(reverted), placebos=tuple(outcomes), kinds=tuple(kinds), answers=tuple(map(tuple, answers))
    )
