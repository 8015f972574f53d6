"""The rows of a valid set, as they are attacked: each with the answer that is asked for, and a judge that decodes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.run.progress import Track
from molehunt.stress.attack import PUBLISHED, SEARCH, AttackConfig, Attacked, attack, least_attack
from molehunt.stress.constraint import Constraint
from molehunt.stress.drift import drift_of
from molehunt.stress.objective import TargetText
from molehunt.stress.pushed import pushed_answers
from molehunt.stress.study import Arm, Defence, StressConfig
from molehunt.stress.suffix import Suffix

ENOUGH = 0.5
"""Margin of the forced answer's least likely token: decoding step by step rounds otherwise than all at once."""


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


def text_of(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
    return str(tokenizer.decode(list(answer), skip_special_tokens=True))
