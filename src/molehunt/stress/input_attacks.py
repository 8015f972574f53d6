"""Attacks through the prompt alone, each beside the same attack asked for another prompt's answer.

The fix stays on, and nothing inside the model is touched. A suffix that brings any answer as easily as the suppressed one
steers the model and recovers nothing: that is what the second share is for.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.stress.case import Case, text_of
from molehunt.stress.discrete_suffix import DiscreteConfig, discrete_start, discrete_suffixes
from molehunt.stress.drift import Drift, drift_of
from molehunt.stress.insertion import Insertion, embedding, insertion_of, template_marks
from molehunt.stress.objective import TargetText
from molehunt.stress.soft_suffix import SoftConfig, soft_answers, soft_start, soft_suffixes
from molehunt.stress.study import InputArm
from molehunt.stress.suffix import suffix_of
from molehunt.stress.typed_text import retokenised

Answers = list[list[int]]
Embedded = Float[Tensor, "rows inserted d_model"]


def input_attacks(case: Case, others: Answers) -> tuple[InputArm, ...]:
    """Those that the case's config asks for.

    Args:
        case: the rows.
        others: for each row another prompt's answer, no longer than its own target.

    Raises:
        NotTestable: a discrete suffix is asked for, and the prompts' text is not read as their tokens.
    """
    soft, discrete = case.config.soft, case.config.discrete
    arms: list[InputArm] = []
    if discrete is not None:  # first: it is the one that can be refused
        found = _discrete(case, case.targets, discrete), _discrete(case, others, discrete)
        arms.append(_arm("discrete suffix", case, others, *found))
    if soft is not None:
        found = _soft(case, case.targets, soft), _soft(case, others, soft)
        arms.insert(0, _arm("soft suffix", case, others, *found))
    return tuple(arms)


def _arm(
    name: str,
    case: Case,
    others: Answers,
    own: tuple[Insertion, Embedded, Answers],
    random: tuple[Insertion, Embedded, Answers],
) -> InputArm:
    inserted, embedded, told = own
    return InputArm(
        name=name,
        back=tuple(case.shows(text_of(case.tokenizer, answer)) for answer in told),
        elsewhere=tuple(answer[: len(other)] == other for answer, other in zip(random[2], others, strict=True)),
        drift=_drift(case, inserted, embedded),
    )


def _inserted(case: Case, start: list[int], marks: int, wanted: Answers) -> Insertion:
    return insertion_of(case.model, case.prompts, start, marks=marks, defence=case.defence.edits, answers=wanted)


def _soft(case: Case, wanted: Answers, config: SoftConfig) -> tuple[Insertion, Embedded, Answers]:
    """What is put in, and the answers to it."""
    marks = template_marks(case.tokenizer, case.prompts)
    inserted = _inserted(case, soft_start(case.tokenizer, config.tokens), marks, wanted)
    goal = TargetText.of(wanted, inserted.entering.device)
    embedded, _ = soft_suffixes(inserted, goal, config, seed=case.config.seed, track=case.track)
    told = soft_answers(
        case.model,
        case.tokenizer,
        case.prompts,
        embedded,
        marks=marks,
        defence=case.defence.edits,
        max_new_tokens=case.config.max_new_tokens,
        track=case.track,
    )
    return inserted, embedded, told


def _discrete(case: Case, wanted: Answers, config: DiscreteConfig) -> tuple[Insertion, Embedded, Answers]:
    """The same for what can be typed: the whole text is tokenised anew before it is answered."""
    marks = template_marks(case.tokenizer, case.prompts)
    inserted = _inserted(case, discrete_start(case.tokenizer, config.tokens), marks, wanted)
    goal = TargetText.of(wanted, inserted.entering.device)
    found = discrete_suffixes(
        inserted, case.prompts, marks, goal, case.tokenizer, config, seed=case.config.seed, track=case.track
    )
    tokens = torch.tensor([one.tokens for one in found], device=inserted.entering.device)
    whole = [
        [*prompt[: len(prompt) - marks], *one.tokens, *prompt[len(prompt) - marks :]]
        for prompt, one in zip(case.prompts, found, strict=True)
    ]
    told = generate(
        case.model,
        case.tokenizer,
        retokenised(case.tokenizer, whole),
        max_new_tokens=case.config.max_new_tokens,
        interventions=case.defence.edits,
        track=case.track,
        what="answers to discrete suffixes",
    )
    stops = stop_ids(case.model, case.tokenizer)
    return inserted, embedding(case.model)(tokens).float(), [before_stop(answer, stops) for answer in told]


def _drift(case: Case, inserted: Insertion, embedded: Embedded) -> Drift:
    """At the last prompt token and the answer's, before the edits at the fix's site: behind them a fix that sets what it
    watches has nothing left to drift.
    """
    site, positions = case.defence.site, case.config.positions
    without = [edit for edit in case.defence.edits if edit.site != site]
    plain = suffix_of(case.model, case.prompts, site, defence=without, answers=case.targets)
    real = plain.answered[:, :positions, None]
    before = plain.entering[:, :positions]
    after = torch.where(real, inserted.acts(embedded, site)[:, :positions], before)
    return drift_of(case.defence.watched, before, after)
