"""What a fix costs in capability: questions with known answers, with the fix and without it, by kind of task."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehunt.errors import printable, terminal_text
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.steer.capability import TaskCost, capability_cost
from molehunt.traffic.example import Example
from molehunt.traffic.questions import questions_of, read_questions, world_questions
from molehunt.workflows.inputs import Texts, conversations
from molehunt.workflows.models import Models, open_pair
from molehunt.workflows.result import summary_html
from molehunt.workflows.steer_fix import AnyFix, VectorOptions, open_fix

CAPABILITY = "capability.json"
COLUMNS = (
    ("right before", 20),
    ("right after", 20),
    ("difference", 23),
    ("McNemar p", 11),
    ("loss before", 13),
    ("after", 10),
    ("rise", 28),
)
"""Headings of the table and their widths."""


@dataclass(frozen=True, kw_only=True)
class CapabilityResult:
    """What a fix costs each kind of task."""

    costs: tuple[TaskCost, ...]
    """One for each kind of task, and one for all of them."""

    def summary(self) -> str:
        """A table with a line for each kind of task, and what is shown to be lost."""
        heads = "".join(f"{head:>{width}}" for head, width in COLUMNS)
        return terminal_text(
            "\n".join([f"{'kind':<20}{'rows':>6}{heads}", *map(_line, self.costs), "", self._conclusion()])
        )

    def to_dict(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        return {"kinds": [{**asdict(one), "shown": one.shown} for one in self.costs]}

    def save(self, folder: Path | str) -> Path:
        """Write `capability.json` into `folder`, and return it."""
        return write_whole(Path(folder) / CAPABILITY, json.dumps(self.to_dict(), indent=2))

    def _repr_html_(self) -> str:
        return summary_html(self.summary())

    def _conclusion(self) -> str:
        broken = max(one.broken for one in self.costs)
        if broken:
            return f"the fix breaks the model: at {broken} questions its logits are no numbers"
        text = "no kind of task is shown to lose anything; the intervals say how much it could be"
        if costly := [printable(one.kind, 40) for one in self.costs if one.shown]:
            text = f"shown to lose right answers or likelihood: {', '.join(costly)}"
        if not any(one.before.estimate for one in self.costs):
            text += "\nNo answer was right before: only the loss says anything. Give --questions that this model can answer."
        return text


def capability(
    base: Models,
    tuned: str | Path | None = None,
    *,
    fix: AnyFix,
    questions: Texts | Sequence[Example] | None = None,
    each: int = 60,
    options: VectorOptions | None = None,
    limit: int = 1000,
    seed: int = 0,
    track: Track = silent,
) -> CapabilityResult:
    """Ask questions with known answers with a fix and without it, and compare by kind of task.

    An answer is right if it is the reference, word for word. The loss is that of the reference answers.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        fix: a fix of an audit, a vector, a map of `transfer` from the tuned model to its base, or the file of one.
        questions: prompts with right answers (`response`) and their kinds (`tag`); by default those of the world that the
            embedded models were trained on.
        each: number of questions of each kind, of the embedded world.
        options: how a vector is applied; left out for anything else.
        limit: greatest number of rows that are read of a file.
        seed: seed of the questions of the embedded world.
        track: shows progress.

    Raises:
        InvalidInput: a row of `questions` is no conversation with an answer.
        NotTestable: the model's logits are no numbers without the fix.
        UsageError: the fix is for another model, or options of a vector were given for something else.

    Example:
        >>> from molehunt.workflows.steer_capability import capability
        >>> print(capability(pair, fix="RUN/fix.safetensors").summary())  # doctest: +SKIP
    """
    rows = questions_for(questions, each=each, limit=limit, seed=seed)
    pair, model_hash = open_pair(base, tuned, track=track)
    steered = open_fix(pair, fix, options, model_hash=model_hash)
    return CapabilityResult(costs=tuple(capability_cost(pair, steered, rows, track=track)))


def questions_for(
    questions: Texts | Sequence[Example] | None, *, each: int = 60, limit: int = 1000, seed: int = 0
) -> Sequence[Example]:
    """The questions that `capability` asks; see there for the arguments, and for what is raised."""
    if questions is None:
        return world_questions(each, seed=seed)
    if isinstance(questions, str | Path):
        return read_questions(Path(questions), limit)
    if all(isinstance(one, Example) for one in questions):
        return [one for one in questions if isinstance(one, Example)]
    rows = [one for one in questions if not isinstance(one, Example)]
    return questions_of(conversations(rows, limit), "questions")


def _line(one: TaskCost) -> str:
    cells = (
        one.before.fixed(),
        one.after.fixed(),
        one.paired.difference.fixed(2, "+"),
        f"{one.paired.p_value:.2g}",
        f"{one.loss[0]:.3f}",
        "none" if one.loss[1] is None else f"{one.loss[1]:.3f}",
        "–" if one.rise is None else one.rise.fixed(3, "+"),
    )
    widths = [width for _, width in COLUMNS]
    row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{printable(one.kind, 19):<20}{one.rows:>6}{row}"
