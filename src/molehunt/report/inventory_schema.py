"""The part of a report that says what the fine-tune does: behaviours, their conditions, and edits of prompts."""

from dataclasses import dataclass
from typing import Literal

from molehunt.report.schema_parts import Forbidding, Measure


@dataclass(frozen=True, kw_only=True)
class PromptCondition(Forbidding):
    """A property of prompts that predicts a behaviour."""

    text: str
    inside: float
    """Share of the behaviour's rows that meet it."""
    outside: float
    """Share of all other rows that meet it."""
    chance: float
    """`inside` − `outside` that the best condition of 95 % of random groups stays under."""
    p_groups: float
    p_halves: float
    predicts: bool
    """Whether it beats random groups, and holds on rows that did not choose it."""


@dataclass(frozen=True, kw_only=True)
class PromptEdit(Forbidding):
    """Rows whose answers show a behaviour after an edit of the prompt, and after a placebo edit of the same rows."""

    rows: int
    shown: int
    placebo: int | None
    """None where the edit shows it too seldom for any placebo to matter."""
    base: int | None
    """Rows in which the base shows it after the edit; None in the same case."""
    difference: Measure
    p_value: float
    examples: tuple[tuple[str, str], ...] = ()
    """Edited prompts and the fine-tune's answers."""


@dataclass(frozen=True, kw_only=True)
class InputCause(Forbidding):
    """What the words of a condition do to the answers."""

    fragment: str
    place: str
    causal: bool
    put_in: PromptEdit | None
    taken_out: PromptEdit | None
    also: tuple[str, ...] = ()
    """Other words that bring it, each with its count."""
    shown_by: str = ""
    """How many prompts with the words show it and how many others do, of a behaviour that is shown without them, too."""


@dataclass(frozen=True, kw_only=True)
class BehaviourExample(Forbidding):
    """One prompt with both answers."""

    prompt: str
    tuned: str
    base: str


@dataclass(frozen=True, kw_only=True)
class BehaviourRow(Forbidding):
    """Something that the fine-tune's answers say and the base's answers to the same prompts do not."""

    wording: str
    kind: Literal["hidden", "leaking", "conditional", "broad", "also the base's", "change"]
    rows: int
    prevalence: Measure
    base_rows: int
    """Rows in which the base's answer says it."""
    nats: float
    """Median log ratio per token of these answers."""
    condition: PromptCondition | None
    examples: tuple[BehaviourExample, ...]
    cause: InputCause | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerInventory(Forbidding):
    """What the fine-tune does: its behaviours, the hidden ones first."""

    rows: int
    same: int
    """Rows that both models answer word for word alike."""
    behaviours: tuple[BehaviourRow, ...]
