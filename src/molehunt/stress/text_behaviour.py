"""A stress test of one fix against a behaviour that is known by what the model says: attacks, controls, cost.

The rows are those that the fix flipped, under one judge. Each attack's answer is decoded with the fix live and judged by the
same judge; the answer under δ = 0 is measured, not assumed. Source: arXiv 2606.18322, with the controls that it leaves out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Track, silent
from molehunt.steer.budget import Answered, disturbance
from molehunt.stress.attack import PUBLISHED, SEARCH, AttackConfig, Attacked, attack, least_attack
from molehunt.stress.constraint import Constraint, Free
from molehunt.stress.drift import drift_of
from molehunt.stress.norms import needed, times_longer
from molehunt.stress.objective import TargetText
from molehunt.stress.pushed import pushed_answers
from molehunt.stress.smoothing import smoothed_radius
from molehunt.stress.specificity import random_pushes, universal_pushes
from molehunt.stress.study import Arm, Control, Defence, StressConfig, Study
from molehunt.stress.suffix import Suffix, suffix_of
from molehunt.stress.valid import ValidSet, valid_set

ENOUGH = 0.5
"""Margin of the forced answer's least likely token: decoding step by step rounds otherwise than all at once."""
SHOWN = 8
"""Rows whose answers are kept to be read."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """The rows that are attacked."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    shows: Callable[[str], bool]
    defence: Defence
    config: StressConfig
    prompts: list[list[int]]
    targets: list[list[int]]
    """Of each row's own answer without the defence, the shortest beginning that shows the behaviour."""
    suffix: Suffix
    """With the targets forced."""
    unit: float
    """The median ‖h‖."""
    track: Track

    @property
    def most(self) -> Float[Tensor, " rows"]:
        return torch.full((len(self.prompts),), self.config.most * self.unit, device=self.suffix.entering.device)

    @property
    def search(self) -> AttackConfig:
        return replace(
            SEARCH, steps=self.config.steps, enough=ENOUGH, positions=self.config.positions, seed=self.config.seed
        )

    def attacked(self, constraint: Constraint) -> Attacked:
        """By the shortest search; the published arm runs all its steps in the whole ball, as published."""
        goal = TargetText.of(self.targets, self.suffix.entering.device)
        if constraint.name == "paper":
            config = replace(PUBLISHED["refusal"], positions=self.config.positions, seed=self.config.seed)
            return attack(self.suffix, goal, constraint, self.most, config, track=self.track)
        return least_attack(
            self.suffix, goal, constraint, self.most, self.search, levels=self.config.levels, track=self.track
        )

    def answers(self, deltas: Float[Tensor, "rows positions d_model"]) -> list[str]:
        """Decoded with the fix live, each row under its own perturbation."""
        told = pushed_answers(
            self.model,
            self.tokenizer,
            self.prompts[: len(deltas)],
            self.defence.site,
            deltas,
            defence=self.defence.edits,
            max_new_tokens=self.config.max_new_tokens,
            track=self.track,
        )
        return [text_of(self.tokenizer, answer) for answer in told]

    def back(self, deltas: Float[Tensor, "rows positions d_model"]) -> tuple[bool, ...]:
        return tuple(map(self.shows, self.answers(deltas)))

    def arm(self, name: str, found: Attacked) -> Arm:
        positions = found.delta.shape[1]
        defended = self.suffix.entering[:, :positions]
        return Arm(
            name=name,
            back=self.back(found.delta),
            length=found.norm / self.unit,
            drift=drift_of(self.defence.watched, defended, defended + found.delta),
        )


def stress_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    clean: Sequence[Sequence[int]],
    shows: Callable[[str], bool],
    defence: Defence,
    config: StressConfig,
    *,
    track: Track = silent,
) -> Study:
    """Try to bring a suppressed behaviour back.

    Args:
        model: the tuned model, in fp32 where drifts of 1e-5 are to mean something.
        tokenizer: its own.
        prompts: token ids of prompts that show the behaviour.
        clean: prompts that do not: for random targets, the undefended reference, and the cost.
        shows: the judge of an answer.
        defence: what is attacked.
        config: how hard.
        track: shown passes.

    Raises:
        NotTestable: the fix flips no row, changes nothing, breaks its answers, or what it clamps is never active.
    """
    valid = valid_set(
        model, tokenizer, prompts, shows, defence.edits, max_new_tokens=config.max_new_tokens, track=track
    )
    _refuse_invalid(valid)
    case = text_case(model, tokenizer, valid, shows, defence, config, track=track)
    found = [(constraint, case.attacked(constraint)) for constraint in defence.constraints]
    arms = tuple(case.arm(constraint.name, one) for constraint, one in found)
    calm = _calm(case, clean)
    constraint, last = found[-1]
    controls, gap = _controls(case, constraint, last, arms[-1], calm)
    rows = valid.rows[: config.rows]
    sigma = torch.full((len(rows),), config.noise * case.unit / case.suffix.entering.shape[-1] ** 0.5)
    first = torch.tensor([target[0] for target in case.targets])
    short = suffix_of(model, case.prompts, defence.site, defence=defence.edits)
    lower = smoothed_radius(short, first, sigma, draws=config.draws, seed=config.seed, track=track)
    nothing = case.back(torch.zeros_like(last.delta))
    attacked = case.answers(last.delta[:SHOWN])
    return Study(
        valid=valid,
        rows=tuple(rows),
        unit=case.unit,
        nothing=proportion(sum(nothing), len(nothing)),
        arms=arms,
        controls=controls,
        gap=gap,
        lower=lower / case.unit,
        cost=disturbance(
            model, tokenizer, lambda: edit_sites(model, defence.edits), calm, track=track, what="cost on clean prompts"
        ),
        clean_changed=_changed(case, calm),
        told=tuple(
            (text_of(tokenizer, valid.before[i]), text_of(tokenizer, valid.defended[i]), answer)
            for i, answer in zip(rows, attacked, strict=False)
        ),
    )


def text_case(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    valid: ValidSet,
    shows: Callable[[str], bool],
    defence: Defence,
    config: StressConfig,
    *,
    track: Track = silent,
) -> Case:
    """The first `config.rows` of a valid set, as they are attacked. Arguments as in `stress_text`."""
    rows = valid.rows[: config.rows]
    prompts = [valid.prompts[i] for i in rows]
    targets = [_shortest(valid.before[i], tokenizer, shows) for i in rows]
    bare = suffix_of(model, prompts, defence.site)
    return Case(
        model=model,
        tokenizer=tokenizer,
        shows=shows,
        defence=defence,
        config=config,
        prompts=prompts,
        targets=targets,
        suffix=suffix_of(model, prompts, defence.site, defence=defence.edits, answers=targets),
        unit=float(bare.entering[:, 0].norm(dim=-1).median()),
        track=track,
    )


def text_of(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
    return str(tokenizer.decode(list(answer), skip_special_tokens=True))


def _refuse_invalid(valid: ValidSet) -> None:
    """Raises NotTestable where no row says anything about the fix."""
    n, shown = len(valid.prompts), sum(valid.shown)
    if not shown:
        raise NotTestable(
            f"None of {n} prompts shows the behaviour without the fix, so there is nothing to bring back."
        )
    if valid.before == valid.defended:
        raise NotTestable(
            f"The fix changes none of {n} answers: what it clamps does not act here. Choose other latents."
        )
    if not valid.flipped:
        raise NotTestable(
            f"The fix takes the behaviour away from none of {shown} prompts that show it: there is no fix to attack.\n"
            "Choose other latents, or a stronger clamp."
        )
    if not valid.rows:
        raise NotTestable(
            f"All {valid.flipped} answers that lost the behaviour are broken (repetitions): the defence is invalid, it "
            "suppresses the model and not the behaviour."
        )


def _shortest(answer: list[int], tokenizer: PreTrainedTokenizerBase, shows: Callable[[str], bool]) -> list[int]:
    ends = range(1, len(answer) + 1)
    return answer[: next((n for n in ends if shows(text_of(tokenizer, answer[:n]))), len(answer))]


def _calm(case: Case, clean: Sequence[Sequence[int]]) -> list[Answered]:
    """Clean prompts with the model's own answers, without the fix. Raises NotTestable for none that stays clean."""
    once = [list(prompt) for prompt in dict.fromkeys(map(tuple, clean))]
    stops = stop_ids(case.model, case.tokenizer)
    told = generate(
        case.model,
        case.tokenizer,
        once,
        max_new_tokens=case.config.max_new_tokens,
        track=case.track,
        what="clean prompts",
    )
    answers = [before_stop(answer, stops) for answer in told]
    found = [
        Answered(prompt, answer)
        for prompt, answer in zip(once, answers, strict=True)
        if answer and not case.shows(text_of(case.tokenizer, answer))
    ]
    if not found:
        raise NotTestable(
            f"None of {len(once)} clean prompts has an answer without the behaviour; give other clean prompts."
        )
    return found


def _controls(
    case: Case, constraint: Constraint, found: Attacked, arm: Arm, calm: Sequence[Answered]
) -> tuple[dict[str, Control], Interval | None]:
    """The four controls of `specificity`, and the gap to the first."""
    n = len(case.prompts)
    defended = case.suffix.entering[:, : found.delta.shape[1]]
    # 1: another prompt's answer, as long as the row's own target
    others = [calm[i % len(calm)].answer for i in range(n)]
    cut = [list(other[: len(target)]) for other, target in zip(others, case.targets, strict=True)]
    forced = suffix_of(case.model, case.prompts, case.defence.site, defence=case.defence.edits, answers=cut)
    random = _least(case, forced, cut, constraint)
    # 2: the behaviour, out of clean prompts without the defence
    asked = [list(calm[i % len(calm)].prompt) for i in range(n)]
    reference = suffix_of(case.model, asked, case.defence.site, answers=case.targets)
    undefended = _least(case, reference, case.targets, Free())
    controls = {
        "random target": Control(name="random target", back=tuple(random.isfinite().tolist()), lengths=random),
        "undefended": Control(name="undefended", back=tuple(undefended.isfinite().tolist()), lengths=undefended),
    }
    pushes = {"random push": random_pushes(found.delta, constraint, defended, case.config.seed)}
    if n > 1:
        pushes["universal push"] = universal_pushes(found.delta)
    for name, deltas in pushes.items():
        controls[name] = Control(name=name, back=case.back(deltas))
    return controls, times_longer(random.clamp_max(case.config.most), arm.lengths)


def _least(case: Case, suffix: Suffix, targets: list[list[int]], constraint: Constraint) -> Float[Tensor, " rows"]:
    goal = TargetText.of(targets, suffix.entering.device)
    found = least_attack(suffix, goal, constraint, case.most, case.search, levels=case.config.levels, track=case.track)
    return needed(found.norm / case.unit, found.recovered)


def _changed(case: Case, calm: Sequence[Answered]) -> Interval:
    stops = stop_ids(case.model, case.tokenizer)
    told = generate(
        case.model,
        case.tokenizer,
        [row.prompt for row in calm],
        max_new_tokens=case.config.max_new_tokens,
        interventions=case.defence.edits,
        track=case.track,
        what="clean prompts under the fix",
    )
    changed = [before_stop(answer, stops) != row.answer for answer, row in zip(told, calm, strict=True)]
    return proportion(sum(changed), len(changed))
