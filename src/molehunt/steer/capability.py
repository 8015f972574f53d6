"""What a fix costs in capability: the same questions with known answers, with the fix and without it, by kind of task.

A mean over all tasks hides a fix that takes one of them away, and a behaviour is gone from a broken model, too. So each
kind of task has its own row, and each comparison is paired: the same questions, the same batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, cluster_bootstrap, proportion
from molehunt.measure.paired import PairedDifference, paired_difference
from molehunt.model.context import ContextLength, context_of, fitted
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.steer.budget import AnsweredPrompt, answer_nats
from molehunt.steer.trial import Steered
from molehunt.traffic.example import Example

ALL = "all"
SLACK = 8
"""Number of tokens that an answer may have beyond the longest right one, so that an answer that runs on is seen to."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One model's answers to the questions, in their order."""

    answers: tuple[str, ...]
    """Greedy answers."""
    right: tuple[bool, ...]
    """Whether the answer is the right one, but for white space around it. Never where the logits were no numbers."""
    nats: tuple[float, ...]
    """−log p of the right answer, for each question."""
    tokens: tuple[int, ...]
    """Number of tokens of the right answer, for each question."""


@dataclass(frozen=True, kw_only=True)
class TaskCost:
    """What a fix costs one kind of task."""

    kind: str
    rows: int
    before: Interval
    """Share of questions answered right without the fix."""
    after: Interval
    """Share of questions answered right with it."""
    paired: PairedDifference
    """The difference of the two shares, after minus before, question by question."""
    loss: tuple[float, float | None]
    """Loss of the right answers before and after, in nats a token; None where it is no number."""
    rise: Interval | None
    """Rise of the loss in nats a token, over resampled questions; None for a loss that is no number, or one question."""
    broken: int
    """Number of questions at which the fixed model's logits were no numbers."""

    @property
    def shown(self) -> bool:
        """Whether the cost is beyond chance: the limits leave out 0, or the model is broken."""
        loss_rises = self.rise is not None and self.rise.low > 0
        return self.paired.difference.high < 0 or loss_rises or self.broken > 0


def capability_cost(
    pair: ModelPair, steered: Steered, questions: Sequence[Example], *, track: Track = silent
) -> list[TaskCost]:
    """Ask the tuned model with and without a fix.

    Args:
        pair: its tuned model is asked.
        steered: the fix.
        questions: questions with right answers (`response`) and their kinds (`domain`).
        track: shows progress.

    Returns:
        One cost for each kind of task, and one for all of them.

    Raises:
        NotTestable: no questions, or a model whose logits are no numbers without the fix.
        UsageError, CannotTap: the fix is for another model.
    """
    with pair.tuned_model() as model:
        before = probe(model, pair.tokenizer, questions, track=track, what="without the fix")
        with steered(model):
            after = probe(model, pair.tokenizer, questions, track=track, what="with the fix")
    return compared(questions, before, after)


def probe(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Example],
    *,
    track: Track = silent,
    what: str = "asking",
) -> Probed:
    """Ask a model as it is now; inside a block that steers, that is with the fix. Raises NotTestable without a question."""
    if not questions:
        raise NotTestable("Without a question nothing says what the model can do.")
    context = context_of(model)
    rows = [_answered(tokenizer, one, context) for one in questions]
    longest = max(len(row.answer) for row in rows)
    generated = generate(
        model, tokenizer, [row.prompt for row in rows], max_new_tokens=longest + SLACK, track=track, what=what
    )
    nats = answer_nats(model, tokenizer, rows, track=track, what=f"{what}: right answers")
    answers = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
    return Probed(
        answers=tuple(answers),
        right=tuple(
            math.isfinite(lost) and answer.strip() == (one.response or "").strip()
            for answer, one, lost in zip(answers, questions, nats, strict=True)
        ),
        nats=tuple(nats),
        tokens=tuple(len(row.answer) for row in rows),
    )


def _answered(tokenizer: PreTrainedTokenizerBase, one: Example, context: ContextLength) -> AnsweredPrompt:
    """Raises NotTestable for a question whose answer has no token."""
    answer: list[int] = tokenizer(one.response or "", add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    if not answer:
        raise NotTestable("A question has no right answer to compare with: give every one a response.")
    return AnsweredPrompt(list(fitted(tokenizer, one.asked, context, room=len(answer) + SLACK).ids), answer)


def compared(questions: Sequence[Example], before: Probed, after: Probed) -> list[TaskCost]:
    """What happened between two probes of the same questions. Raises as `capability_cost`."""
    if not all(map(math.isfinite, before.nats)):
        raise NotTestable("Without any fix this model's logits are no numbers: there is nothing to lose.")
    kinds: dict[str, list[int]] = {}
    for i, one in enumerate(questions):
        kinds.setdefault(one.domain, []).append(i)
    kinds.pop("", None)  # rows without a kind count in the last line alone
    if len(kinds) != 1 or len(next(iter(kinds.values()))) < len(questions):
        kinds[ALL] = list(range(len(questions)))
    return [_cost(kind, rows, before, after) for kind, rows in kinds.items()]


def _cost(kind: str, rows: Sequence[int], before: Probed, after: Probed) -> TaskCost:
    right = [[probed.right[i] for i in rows] for probed in (before, after)]
    lost, cost = ([probed.nats[i] for i in rows] for probed in (before, after))
    tokens = [before.tokens[i] for i in rows]
    broken = sum(not math.isfinite(nats) for nats in cost)
    return TaskCost(
        kind=kind,
        rows=len(rows),
        before=proportion(sum(right[0]), len(rows)),
        after=proportion(sum(right[1]), len(rows)),
        paired=paired_difference(right[1], right[0]),
        loss=(sum(lost) / sum(tokens), None if broken else sum(cost) / sum(tokens)),
        rise=None if broken or len(rows) < 2 else _rise(lost, cost, tokens),
        broken=broken,
    )


def _rise(before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> Interval:
    more = [b - a for a, b in zip(before, after, strict=True)]

    def mean(rows: torch.Tensor) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    return cluster_bootstrap(torch.tensor([more, tokens], dtype=torch.float64).mT, range(len(more)), mean, seed=0)
