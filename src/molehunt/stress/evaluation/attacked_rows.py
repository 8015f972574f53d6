"""The rows of a valid set that are attacked: each with its target answer, and a judge of decoded answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.run.progress import Track, silent
from molehunt.stress.attacks.attack import PUBLISHED, AttackConfig, AttackResult, attack
from molehunt.stress.attacks.constraint import Constraint
from molehunt.stress.attacks.objective import TargetText
from molehunt.stress.attacks.perturbed_answers import perturbed_answers
from molehunt.stress.attacks.shortest import SEARCH, shortest_attack
from molehunt.stress.attacks.suffix import Suffix, suffix_of
from molehunt.stress.attacks.typed_text import answer_text
from molehunt.stress.defences.defence import Defence
from molehunt.stress.evaluation.arms import Arm
from molehunt.stress.evaluation.config import StressConfig
from molehunt.stress.evaluation.drift import drift_of
from molehunt.stress.evaluation.norms import recovery_lengths
from molehunt.stress.evaluation.valid_set import ValidSet

TARGET_MARGIN = 0.5
"""Margin of the forced answer's least likely token. Decoding step by step rounds otherwise than one pass over all tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackedRows:
    """Prompts that are attacked together, in one model under one defence."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    judge: Callable[[str], bool]
    """Whether an answer shows the behaviour."""
    defence: Defence
    config: StressConfig
    prompts: list[list[int]]
    targets: list[list[int]]
    """The shortest beginning of each row's own answer without the defence that shows the behaviour."""
    suffix: Suffix
    """Forward passes over the prompts with the targets forced."""
    unit: float
    """The median ‖h‖."""
    track: Track

    @property
    def max_norm(self) -> Float[Tensor, " rows"]:
        """The largest norm of each row's perturbation, in the activations' own units."""
        return torch.full((len(self.prompts),), self.config.max_norm * self.unit, device=self.suffix.entering.device)

    @property
    def search(self) -> AttackConfig:
        """Settings of each attack in the search for the shortest perturbation."""
        return replace(
            SEARCH,
            steps=self.config.steps,
            target_margin=TARGET_MARGIN,
            positions=self.config.positions,
            seed=self.config.seed,
        )

    def attack(self, constraint: Constraint) -> AttackResult:
        """The shortest perturbations. The published arm takes all its steps in the whole ball, as published."""
        goal = TargetText.of(self.targets, self.suffix.entering.device)
        if constraint.name == "paper":
            config = replace(PUBLISHED["refusal"], positions=self.config.positions, seed=self.config.seed)
            return attack(self.suffix, goal, constraint, self.max_norm, config, track=self.track)
        return self.shortest(self.suffix, self.targets, constraint)

    def shortest(self, suffix: Suffix, targets: list[list[int]], constraint: Constraint) -> AttackResult:
        """The shortest perturbations to other targets, or from other prompts, with the same settings."""
        goal = TargetText.of(targets, suffix.entering.device)
        return shortest_attack(
            suffix, goal, constraint, self.max_norm, self.search, levels=self.config.levels, track=self.track
        )

    def lengths(self, suffix: Suffix, targets: list[list[int]], constraint: Constraint) -> Float[Tensor, " rows"]:
        """Lengths of `shortest` in units of the median ‖h‖; infinite where the target was not reached."""
        found = self.shortest(suffix, targets, constraint)
        return recovery_lengths(found.norm / self.unit, found.recovered)

    def answers(self, deltas: Float[Tensor, "rows positions d_model"]) -> list[str]:
        """Answers that are decoded with the fix live, each row under its own perturbation."""
        answers = perturbed_answers(
            self.model,
            self.tokenizer,
            self.prompts[: len(deltas)],
            self.defence.site,
            deltas,
            defence=self.defence.edits,
            max_new_tokens=self.config.max_new_tokens,
            track=self.track,
        )
        return [answer_text(self.tokenizer, answer) for answer in answers]

    def recovered(self, deltas: Float[Tensor, "rows positions d_model"]) -> tuple[bool, ...]:
        """Rows whose decoded answer shows the behaviour under these perturbations."""
        return tuple(map(self.judge, self.answers(deltas)))

    def arm(self, name: str, found: AttackResult) -> Arm:
        """What an attack reached, judged on decoded answers."""
        positions = found.delta.shape[1]
        defended = self.suffix.entering[:, :positions]
        return Arm(
            name=name,
            recovered_rows=self.recovered(found.delta),
            length=found.norm / self.unit,
            drift=drift_of(self.defence.watched, defended, defended + found.delta),
        )


def attacked_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    valid: ValidSet,
    judge: Callable[[str], bool],
    defence: Defence,
    config: StressConfig,
    *,
    track: Track = silent,
) -> AttackedRows:
    """The first `config.rows` rows of a valid set, ready to be attacked.

    Args:
        model: the tuned model.
        tokenizer: the model's tokenizer.
        valid: prompts with their answers, and which of them count.
        judge: whether an answer shows the behaviour.
        defence: the fix that is attacked.
        config: settings of the attacks.
        track: shows the passes.
    """
    rows = valid.rows[: config.rows]
    prompts = [valid.prompts[i] for i in rows]
    targets = [_shortest_beginning(valid.before[i], tokenizer, judge) for i in rows]
    undefended = suffix_of(model, prompts, defence.site)
    return AttackedRows(
        model=model,
        tokenizer=tokenizer,
        judge=judge,
        defence=defence,
        config=config,
        prompts=prompts,
        targets=targets,
        suffix=suffix_of(model, prompts, defence.site, defence=defence.edits, answers=targets),
        unit=float(undefended.entering[:, 0].norm(dim=-1).median()),
        track=track,
    )


def _shortest_beginning(
    answer: list[int], tokenizer: PreTrainedTokenizerBase, judge: Callable[[str], bool]
) -> list[int]:
    """The first tokens of an answer that show the behaviour; the whole answer where only that does."""
    ends = range(1, len(answer) + 1)
    return answer[: next((n for n in ends if judge(answer_text(tokenizer, answer[:n]))), len(answer))]
