"""When does a row count as reverted to the base?

A row has reverted when, under the intervention, its answer is no longer more surprising to the base than clean answers
are, and reads more like the base's answer than like the tuned model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.audit.answering import drawn_answers, log_ratios, most_surprising, text_of
from molehunt.audit.plan import Plan
from molehunt.audit.scan import ScannedRow
from molehunt.contracts import Intervention
from molehunt.measure.similarity import chrf
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Tally, Track, silent, within


@dataclass(frozen=True, eq=False)
class ReversionTest:
    """Judges edits of the tuned model on the same rows."""

    pair: ModelPair
    rows: tuple[ScannedRow, ...]
    base_answers: tuple[tuple[int, ...], ...]
    """One of the base's answers to each of these rows, token ids."""
    threshold: float
    """Answer log ratio that clean rows stay under, in nats."""
    plan: Plan

    def __call__(self, interventions: Sequence[Intervention], done: Tally) -> tuple[list[list[int]], list[bool]]:
        """Answers of the edited model, and which rows reverted; half of a row's progress is its answer."""
        edited = answers(self.pair, self.rows, interventions, self.plan, within(done, len(self.rows) / 2))
        reverted = self._reverted(edited, interventions)
        done(len(self.rows) / 2)
        return edited, reverted

    def _reverted(self, edited: list[list[int]], interventions: Sequence[Intervention]) -> list[bool]:
        clean = [ratio <= self.threshold for ratio in log_ratios(self.pair, _prompts(self.rows), edited, interventions)]
        closer = [
            chrf(text_of(self.pair, e), text_of(self.pair, b))
            > chrf(text_of(self.pair, e), text_of(self.pair, r.answer))
            for r, b, e in zip(self.rows, self.base_answers, edited, strict=True)
        ]
        return [a and b for a, b in zip(clean, closer, strict=True)]


def answers(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    interventions: Sequence[Intervention],
    plan: Plan,
    track: Track = silent,
    *,
    tuned: bool = True,
) -> list[list[int]]:
    """The answer of one of the two models to each of `rows`, token ids: as in the scan, or the base's first one."""
    prompts = _prompts(rows)
    drawn = drawn_answers(pair, prompts, plan.answering, tuned=tuned, interventions=interventions, track=track)
    return most_surprising(pair, prompts, drawn, interventions) if tuned else [of_row[0] for of_row in drawn]


def _prompts(rows: Sequence[ScannedRow]) -> list[list[int]]:
    return [list(row.prompt) for row in rows]
