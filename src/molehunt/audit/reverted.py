"""When does a row count as reverted to the base?

A row has reverted when, under the intervention, its answer is no longer more surprising to the base than clean answers
are, and reads more like the base's answer than like the tuned model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.audit.plan import Plan
from molehunt.audit.scan import ScannedRow
from molehunt.contracts import Intervention
from molehunt.measure.similarity import chrf
from molehunt.model.generate import generate
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Tally, Track, silent, within


@dataclass(frozen=True, eq=False)
class ReversionTest:
    """Judges edits of the tuned model on the same rows."""

    pair: ModelPair
    rows: tuple[ScannedRow, ...]
    base_answers: tuple[tuple[int, ...], ...]
    """The base's greedy answers to these rows, token ids."""
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
        clean = [ratio <= self.threshold for ratio in _log_ratios(self.pair, self.rows, edited, interventions)]
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
    """Greedy answers of one of the two models to the prompts of `rows`, token ids."""
    with pair.tuned_model() if tuned else pair.base_model() as model:
        return generate(
            model,
            pair.tokenizer,
            [list(row.prompt) for row in rows],
            max_new_tokens=plan.max_new_tokens,
            interventions=interventions,
            track=track,
        )


def text_of(pair: ModelPair, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens."""
    return str(pair.tokenizer.decode(list(ids), skip_special_tokens=True))


def _log_ratios(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    answered: list[list[int]],
    interventions: Sequence[Intervention],
) -> list[float]:
    """Answer log ratio of `answered` under the edited tuned model against the base, in nats."""
    prompts = [list(row.prompt) for row in rows]
    with pair.tuned_model() as model:
        tuned = answer_log_probs(model, pair.tokenizer, prompts, answered, interventions)
    with pair.base_model() as model:
        base = answer_log_probs(model, pair.tokenizer, prompts, answered)
    return [t - b for t, b in zip(tuned, base, strict=True)]
