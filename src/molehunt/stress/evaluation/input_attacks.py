"""Attacks through the prompt alone, each beside the same attack with another prompt's answer as its target.

The fix stays active, and nothing inside the model is touched. A suffix that elicits any answer as easily as the suppressed
one steers the model and recovers nothing. The share of reached random targets shows that.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.stress.attacks.discrete_suffix import DiscreteConfig, discrete_start, discrete_suffixes
from molehunt.stress.attacks.insertion import Insertion, embedding, insertion_of, template_marks
from molehunt.stress.attacks.objective import TargetText
from molehunt.stress.attacks.soft_suffix import SoftConfig, soft_answers, soft_start, soft_suffixes
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.stress.attacks.typed_text import answer_text, retokenised
from molehunt.stress.evaluation.arms import InputArm
from molehunt.stress.evaluation.attacked_rows import AttackedRows
from molehunt.stress.evaluation.drift import WatchedDrift, drift_of

Answers = list[list[int]]
Embedded = Float[Tensor, "rows inserted d_model"]


def input_attacks(rows: AttackedRows, random_targets: Answers) -> tuple[InputArm, ...]:
    """Run the attacks by suffixes that the config requests.

    Args:
        rows: the rows that are attacked.
        random_targets: for each row another prompt's answer, no longer than its own target.

    Raises:
        NotTestable: a discrete suffix is requested, and the prompts' text is not read as their tokens.
    """
    soft, discrete = rows.config.soft, rows.config.discrete
    arms: list[InputArm] = []
    if discrete is not None:  # first: it is the one that can be refused
        found = _discrete(rows, rows.targets, discrete), _discrete(rows, random_targets, discrete)
        arms.append(_arm("discrete suffix", rows, random_targets, *found))
    if soft is not None:
        found = _soft(rows, rows.targets, soft), _soft(rows, random_targets, soft)
        arms.insert(0, _arm("soft suffix", rows, random_targets, *found))
    return tuple(arms)


def _arm(
    name: str,
    rows: AttackedRows,
    random_targets: Answers,
    own: tuple[Insertion, Embedded, Answers],
    random: tuple[Insertion, Embedded, Answers],
) -> InputArm:
    inserted, embedded, answers = own
    return InputArm(
        name=name,
        recovered_rows=tuple(rows.judge(answer_text(rows.tokenizer, answer)) for answer in answers),
        random_target_rows=tuple(
            answer[: len(target)] == target for answer, target in zip(random[2], random_targets, strict=True)
        ),
        drift=_drift(rows, inserted, embedded),
    )


def _inserted(rows: AttackedRows, start: list[int], marks: int, targets: Answers) -> Insertion:
    return insertion_of(rows.model, rows.prompts, start, marks=marks, defence=rows.defence.edits, answers=targets)


def _soft(rows: AttackedRows, targets: Answers, config: SoftConfig) -> tuple[Insertion, Embedded, Answers]:
    """Train soft suffixes to these targets, and decode the answers to them."""
    marks = template_marks(rows.tokenizer, rows.prompts)
    inserted = _inserted(rows, soft_start(rows.tokenizer, config.tokens), marks, targets)
    goal = TargetText.of(targets, inserted.entering.device)
    embedded, _ = soft_suffixes(inserted, goal, config, seed=rows.config.seed, track=rows.track)
    answers = soft_answers(
        rows.model,
        rows.tokenizer,
        rows.prompts,
        embedded,
        marks=marks,
        defence=rows.defence.edits,
        max_new_tokens=rows.config.max_new_tokens,
        track=rows.track,
    )
    return inserted, embedded, answers


def _discrete(rows: AttackedRows, targets: Answers, config: DiscreteConfig) -> tuple[Insertion, Embedded, Answers]:
    """Search discrete suffixes to these targets. The whole text is tokenised anew before it is answered."""
    marks = template_marks(rows.tokenizer, rows.prompts)
    inserted = _inserted(rows, discrete_start(rows.tokenizer, config.tokens), marks, targets)
    goal = TargetText.of(targets, inserted.entering.device)
    found = discrete_suffixes(
        inserted, rows.prompts, marks, goal, rows.tokenizer, config, seed=rows.config.seed, track=rows.track
    )
    tokens = torch.tensor([one.tokens for one in found], device=inserted.entering.device)
    whole = [
        [*prompt[: len(prompt) - marks], *one.tokens, *prompt[len(prompt) - marks :]]
        for prompt, one in zip(rows.prompts, found, strict=True)
    ]
    answers = generate(
        rows.model,
        rows.tokenizer,
        retokenised(rows.tokenizer, whole),
        max_new_tokens=rows.config.max_new_tokens,
        interventions=rows.defence.edits,
        track=rows.track,
        what="answers to discrete suffixes",
    )
    stops = stop_ids(rows.model, rows.tokenizer)
    return inserted, embedding(rows.model)(tokens).float(), [before_stop(answer, stops) for answer in answers]


def _drift(rows: AttackedRows, inserted: Insertion, embedded: Embedded) -> WatchedDrift:
    """Drift at the last prompt token and the answer's, before the edits at the fix's site.

    After those edits, a fix that sets the watched values leaves nothing that could drift.
    """
    site, positions = rows.defence.site, rows.config.positions
    without = [edit for edit in rows.defence.edits if edit.site != site]
    plain = suffix_of(rows.model, rows.prompts, site, defence=without, answers=rows.targets)
    real = plain.answered[:, :positions, None]
    before = plain.entering[:, :positions]
    after = torch.where(real, inserted.acts(embedded, site)[:, :positions], before)
    return drift_of(rows.defence.watched, before, after)
