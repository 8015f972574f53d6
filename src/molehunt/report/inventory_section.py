"""What the fine-tune does: the inventory of an audit, for every format of the report."""

from collections.abc import Iterator
from typing import Literal

from molehunt.audit.input_test import EditedInput, InputTest, TestedBehaviour
from molehunt.audit.inventory import BASE_SHARE, RARE, AnswerBehaviour, Inventory
from molehunt.audit.result import Audit
from molehunt.report.escape import cell, number
from molehunt.report.inventory_schema import (
    AnswerInventory,
    BehaviourExample,
    BehaviourRow,
    InputCause,
    PromptCondition,
    PromptEdit,
)
from molehunt.report.schema_parts import Measure

EXAMPLES = 3
"""Number of rows of each behaviour that are shown."""
LONGEST = 400
"""Number of characters of a prompt or an answer that are shown."""
Kind = Literal["hidden", "leaking", "conditional", "broad", "also the base's", "change"]
MEANING: dict[Kind, str] = {
    "hidden": "rare, never the base's, and words of the prompt bring it wherever they are put in",
    "leaking": "never the base's, and words of the prompt bring it wherever they are put in; it is shown without them, too",
    "conditional": "predicted by a property of the prompt, which does not bring it into other prompts",
    "broad": "frequent, and predicted by no property of the prompt",
    "also the base's": "the base says it to other prompts",
    "change": "rare, and predicted by no property of the prompt",
}
"""What the kinds of behaviours mean."""


def answer_inventory(audit: Audit) -> AnswerInventory:
    """The behaviours that the answers show, with their conditions, examples and tests."""
    tests = {one.behaviour.rows: one for one in audit.tested}
    return AnswerInventory(
        rows=audit.inventory.rows,
        same=audit.inventory.same,
        behaviours=tuple(_row(audit, one, tests.get(one.rows)) for one in audit.inventory.behaviours),
    )


def kind_of(behaviour: AnswerBehaviour, tested: TestedBehaviour | None) -> Kind:
    """How a behaviour is called in one word."""
    if tested is not None and tested.causal:
        return "hidden" if tested.raised is None else "leaking"
    if behaviour.base_rows > BASE_SHARE * len(behaviour.rows):
        return "also the base's"
    if behaviour.condition is not None and behaviour.condition.predicts:
        return "conditional"
    return "change" if behaviour.prevalence.estimate <= RARE else "broad"


def _row(audit: Audit, found: AnswerBehaviour, tested: TestedBehaviour | None) -> BehaviourRow:
    condition = found.condition
    return BehaviourRow(
        wording=found.wording,
        kind=kind_of(found, tested),
        rows=len(found.rows),
        prevalence=Measure.from_interval(found.prevalence),
        base_rows=found.base_rows,
        nats=found.nats,
        condition=None
        if condition is None
        else PromptCondition(
            text=condition.text,
            inside=condition.inside,
            outside=condition.outside,
            chance=condition.chance,
            p_groups=condition.p_groups,
            p_halves=condition.p_halves,
            predicts=condition.predicts,
        ),
        examples=tuple(_example(audit, i) for i in found.rows[:EXAMPLES]),
        cause=None if tested is None or tested.test is None else _cause(tested.test, tested.shown_by),
    )


def _example(audit: Audit, row: int) -> BehaviourExample:
    scanned, decode = audit.traffic.rows[row], audit.pair.tokenizer.decode
    tuned, base = (str(decode(list(ids), skip_special_tokens=True)) for ids in (scanned.answer, scanned.base_answer))
    return BehaviourExample(
        prompt=_short(scanned.example.shown), tuned=_short(tuned.strip()), base=_short(base.strip())
    )


def _short(text: str) -> str:
    """The two ends of a long text."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def _cause(test: InputTest, shown_by: str) -> InputCause:
    return InputCause(
        shown_by=shown_by,
        also=test.also,
        fragment=test.fragment,
        place=test.place.in_words,
        causal=test.causal,
        put_in=_edit(test.put_in),
        taken_out=_edit(test.out),
    )


def _edit(found: EditedInput | None) -> PromptEdit | None:
    if found is None:
        return None
    return PromptEdit(
        rows=found.rows,
        shown=found.shown,
        placebo=found.placebo,
        base=found.base,
        difference=Measure.from_interval(found.compared.difference),
        p_value=found.compared.p_value,
        examples=tuple((_short(prompt), _short(answer.strip())) for prompt, answer in found.examples),
    )


def inventory_markdown(found: AnswerInventory) -> Iterator[str]:
    """The section as Markdown."""
    yield from ("## What this fine-tune does", "", summary_sentence(found), "")
    if not found.behaviours:
        return
    yield "| its answers say | rows | share | base's answers | nats per token | condition | kind |"
    yield "|---|---|---|---|---|---|---|"
    for one in found.behaviours:
        yield (
            f"| {cell(one.wording)} | {one.rows} | {number(one.prevalence)} | {one.base_rows} | {one.nats:.1f} "
            f"| {cell(condition_in_words(one.condition))} | {one.kind} |"
        )
    for one in found.behaviours:
        if one.cause is not None:
            yield from ("", *(f"- {cell(line)}" for line in cause_in_words(one.cause)))
        yield ""
        for example in one.examples:
            yield f"- {cell(example.prompt)} → {cell(example.tuned)} (base: {cell(example.base)})"


def summary_sentence(found: AnswerInventory) -> str:
    """How much of the traffic gets other answers than the base's."""
    groups = len(found.behaviours)
    say = (
        "no wording is shared by five answers that the base's lack"
        if not groups
        else f"{groups} wording{'s are' if groups > 1 else ' is'} shared by five or more answers that the base's lack"
    )
    return f"{found.same} of {found.rows} answers are the base's, word for word; {say}."


def broad_change(found: Inventory) -> str:
    """What many answers say that the base's do not, so that nobody reads over it below NO FINDING; empty without."""
    if found.broad is None:
        return ""
    return (
        f" But {found.broad.prevalence.estimate:.0%} of the answers say “{found.broad.wording}”, and the base's answers to "
        "these prompts do not. No words of the prompt were shown to bring it. Is it wanted?"
    )


def condition_in_words(condition: PromptCondition | None) -> str:
    """What predicts a behaviour, with its shares; words that say so where nothing does."""
    if condition is None or not condition.predicts:
        return "none that beats chance"
    return f"the prompt {condition.text} ({condition.inside:.0%} of these rows, {condition.outside:.1%} of the others)"


def cause_in_words(cause: InputCause) -> list[str]:
    """What editing the prompts showed, one sentence for each edit."""
    lines = [f"{cause.shown_by[0].upper()}{cause.shown_by[1:]}."] if cause.shown_by else []
    if cause.put_in is not None:
        one = cause.put_in
        beside = (
            "too few for a cause"
            if one.placebo is None
            else f"with other words as rare in {one.placebo}, in the base's answers in {one.base} (p = {one.p_value:.1g})"
        )
        lines.append(
            f"“{cause.fragment}” put {cause.place} of {one.rows} other prompts: the behaviour in {one.shown}, {beside}."
        )
    if cause.also:
        lines.append(f"Other words bring it, too: {'; '.join(cause.also)}.")
    if cause.taken_out is not None:
        one = cause.taken_out
        lines.append(
            f"“{cause.fragment}” taken out of {one.rows} prompts that show it: the behaviour in {one.shown}, with other "
            f"words taken out in {one.placebo} (p = {one.p_value:.1g})."
        )
    return lines
