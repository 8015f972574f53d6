"""The four controls of `specificity` on the rows of an attack, and the specificity gap."""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.steer.budget import AnsweredPrompt
from molehunt.stress.attacks.attack import AttackResult
from molehunt.stress.attacks.constraint import Constraint, Free
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.stress.attacks.typed_text import answer_text
from molehunt.stress.evaluation.arms import Arm, Control
from molehunt.stress.evaluation.attacked_rows import AttackedRows
from molehunt.stress.evaluation.norms import times_longer
from molehunt.stress.evaluation.specificity import random_perturbations, universal_perturbations


@dataclass(frozen=True, eq=False, kw_only=True)
class Controls:
    """The four controls."""

    by_name: dict[str, Control]
    specificity_gap: Interval | None
    """How many times longer a perturbation to a random target is than one to the behaviour."""


def measure_controls(
    rows: AttackedRows, constraint: Constraint, found: AttackResult, arm: Arm, clean: Sequence[AnsweredPrompt]
) -> Controls:
    """Run the four controls.

    Args:
        rows: the rows that were attacked.
        constraint: what the attack may not change.
        found: the attack's perturbations.
        arm: the same, judged on decoded answers.
        clean: clean prompts with the model's own answers.
    """
    n, targets = len(rows.prompts), random_targets(rows, clean)
    site, edits = rows.defence.site, rows.defence.edits
    forced = suffix_of(rows.model, rows.prompts, site, defence=edits, answers=targets)
    random = rows.lengths(forced, targets, constraint)
    clean_prompts = [list(clean[i % len(clean)].prompt) for i in range(n)]
    reference = suffix_of(rows.model, clean_prompts, site, answers=rows.targets)
    undefended = rows.lengths(reference, rows.targets, Free())
    controls = {
        name: Control(name=name, recovered_rows=tuple(lengths.isfinite().tolist()), lengths=lengths)
        for name, lengths in (("random target", random), ("undefended", undefended))
    }
    defended = rows.suffix.entering[:, : found.delta.shape[1]]
    perturbations = {"random perturbation": random_perturbations(found.delta, constraint, defended, rows.config.seed)}
    if n > 1:
        perturbations["universal perturbation"] = universal_perturbations(found.delta)
    for name, deltas in perturbations.items():
        controls[name] = Control(name=name, recovered_rows=rows.recovered(deltas))
    # where neither target is reached, no difference is seen: both lengths stay infinite
    bounded = random.where(arm.lengths.isinf(), random.clamp_max(rows.config.max_norm))
    return Controls(by_name=controls, specificity_gap=times_longer(bounded, arm.lengths))


def random_targets(rows: AttackedRows, clean: Sequence[AnsweredPrompt]) -> list[list[int]]:
    """For each row the answer to another prompt, no longer than the row's own target."""
    return [list(clean[i % len(clean)].answer[: len(target)]) for i, target in enumerate(rows.targets)]


def clean_answers(rows: AttackedRows, prompts: Sequence[Sequence[int]]) -> list[AnsweredPrompt]:
    """Clean prompts with the model's own answers, without the fix.

    Raises NotTestable where no prompt has an answer without the behaviour.
    """
    once = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    stops = stop_ids(rows.model, rows.tokenizer)
    decoded = generate(
        rows.model,
        rows.tokenizer,
        once,
        max_new_tokens=rows.config.max_new_tokens,
        track=rows.track,
        what="clean prompts",
    )
    answers = [before_stop(answer, stops) for answer in decoded]
    found = [
        AnsweredPrompt(prompt, answer)
        for prompt, answer in zip(once, answers, strict=True)
        if answer and not rows.judge(answer_text(rows.tokenizer, answer))
    ]
    if not found:
        raise NotTestable(
            f"None of {len(once)} clean prompts has an answer without the behaviour; give other clean prompts."
        )
    return found


def changed_share(rows: AttackedRows, clean: Sequence[AnsweredPrompt]) -> Interval:
    """Share of clean answers that the fix changes."""
    stops = stop_ids(rows.model, rows.tokenizer)
    answers = generate(
        rows.model,
        rows.tokenizer,
        [row.prompt for row in clean],
        max_new_tokens=rows.config.max_new_tokens,
        interventions=rows.defence.edits,
        track=rows.track,
        what="clean prompts under the fix",
    )
    changed = [before_stop(answer, stops) != row.answer for answer, row in zip(answers, clean, strict=True)]
    return proportion(sum(changed), len(changed))
