"""What attacks hardened defences: the rows, one arm of an attack, and a bench that tries a dozen of them on one defence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from experiments.fixes.fixed import Fixed
from experiments.hardened.cutting_plane import HalfSpaceGate
from experiments.hardened.error_monitor import ErrorMonitor, Observed, Unobserved
from experiments.hardened.size import BALLS, MAX_NORM, WORDINGS, Size
from molehunt.contracts import Intervention
from molehunt.measure.interval import proportion
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.budget import AnsweredPrompt, disturbance
from molehunt.steer.prefill_gate import Condition
from molehunt.stress.attacks.attack import AttackConfig, AttackResult, ForwardPass, attack
from molehunt.stress.attacks.constraint import Free
from molehunt.stress.attacks.objective import Objective, TargetText
from molehunt.stress.attacks.perturbed_answers import perturbed_answers
from molehunt.stress.attacks.shortest import shortest_attack
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.stress.attacks.typed_text import answer_text
from molehunt.stress.evaluation.norms import recovery_lengths
from molehunt.traffic.chat import prompt_ids

CLIPPED = 0.002
"""Quantile of clean projections beyond which a clip acts."""
PROTECTED = 0.01
"""Share of clean variance that a benign-null correction may read."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Prompts that an attack starts from, and what it is to make the model say."""

    prompts: list[list[int]]
    targets: list[list[int]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Arm:
    """One defence as an attacker meets it."""

    edits: tuple[Intervention, ...]
    watch: ErrorMonitor | HalfSpaceGate | None = None
    """Must not flag a token that the perturbation touches, or any answer token."""
    live: tuple[Intervention, ...] = ()
    """What is decoded under, where that is more than `edits`: the watch at work."""


@dataclass(eq=False, kw_only=True)
class Bench:
    """One organism, what a clean prompt looks like in it, and everything that is asked of a defence."""

    pair: ModelPair
    model: nn.Module
    shows: Any
    max_new_tokens: int
    site: Site
    plain: Ablate
    gate: Condition
    rows: Any
    size: Size
    unit: float = 0.0
    fit: Rows = field(init=False)
    wide: Rows = field(init=False)
    """The same rows, once for each wording that defences grow from."""
    test: Rows = field(init=False)
    clean_rows: Rows = field(init=False)
    clean: list[AnsweredPrompt] = field(init=False)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [prompt_ids(self.pair.tokenizer, prompt) for prompt in prompts]

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        generated = generate(self.model, self.pair.tokenizer, prompts, max_new_tokens=self.max_new_tokens)
        stops = stop_ids(self.model, self.pair.tokenizer)
        return [before_stop(answer, stops) for answer in generated]

    def shown(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        return [self.shows(answer_text(self.pair.tokenizer, answer)) for answer in answers]

    def ids_of(self, text: str) -> list[int]:
        return cast("list[int]", self.pair.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def later(self) -> list[Site]:
        return [Site(layer) for layer in range(self.site.layer + 1, self.pair.n_layers)]

    # attacks

    def searched(
        self, arm: Arm, rows: Rows, site: Site, max_norm: float, config: AttackConfig, levels: int
    ) -> AttackResult:
        runs, goal = self.runs_of(arm, rows, site)
        radius = torch.full((len(rows.prompts),), max_norm * self.unit)
        return shortest_attack(runs, goal, Free(), radius, config, levels=levels)

    def runs_of(self, arm: Arm, rows: Rows, site: Site) -> tuple[ForwardPass, Objective]:
        suffix = suffix_of(self.model, rows.prompts, site, defence=arm.edits, answers=rows.targets)
        goal = TargetText.of(rows.targets)
        if arm.watch is None:
            return suffix, goal
        return Observed(suffix, cast("ErrorMonitor", arm.watch)), Unobserved(goal)

    def quick(self, arm: Arm, rows: Rows, site: Site | None = None) -> Tensor:
        """Length of the shortest perturbation of each row, in units; infinite where none was found. A monitor's slope is steep, so
        that a large ball gets lost behind it.
        """
        found = [
            self.searched(arm, rows, site or self.site, max_norm, self.size.quick, levels=min(6, self.size.levels))
            for max_norm in (BALLS if arm.watch is not None else BALLS[:1])
        ]
        return torch.stack([recovery_lengths(one.norm / self.unit, one.recovered) for one in found]).amin(0)

    def hard(self, arm: Arm, rows: Rows, known: Tensor, reach: Tensor) -> tuple[Tensor, dict[str, int]]:
        """The best of several attacks, each judged by decoding, with how many rows it was the shortest for.

        Args:
            known: perturbations that undo the plain fix, `[rows, 1, d_model]`.
            reach: of each row, the length that a defence has to ask for to win.
        """
        best, by = torch.full((len(reach),), torch.inf), ["none"] * len(reach)

        def take(name: str, found: AttackResult) -> None:
            recovered = found.recovered & torch.tensor(self.shown(self.decoded(arm, rows, found.delta)))
            lengths = recovery_lengths(found.norm / self.unit, recovered)
            for i in (lengths < best).nonzero()[:, 0].tolist():
                by[i] = name
            best[:] = torch.minimum(best, lengths)

        take("from 0", self.searched(arm, rows, self.site, MAX_NORM, self.size.quick, levels=min(7, self.size.levels)))
        take(
            "from 0, short ball",
            self.searched(
                arm, rows, self.site, 1.0, replace(self.size.quick, steps=80), levels=min(6, self.size.levels)
            ),
        )
        every = replace(self.size.quick, positions=max(map(len, rows.targets)))
        take("at every token", self.searched(arm, rows, self.site, MAX_NORM, every, levels=min(6, self.size.levels)))
        if arm.live:
            through = Arm(edits=arm.live)
            take(
                "through the gate",
                self.searched(through, rows, self.site, MAX_NORM, self.size.quick, levels=min(6, self.size.levels)),
            )
            take(
                "through the gate, every token",
                self.searched(through, rows, self.site, MAX_NORM, every, levels=min(6, self.size.levels)),
            )
            hidden = Rows(prompts=rows.prompts, targets=[target[:2] for target in rows.targets])
            take(
                "two tokens",
                self.searched(arm, hidden, self.site, MAX_NORM, self.size.quick, levels=min(6, self.size.levels)),
            )
        first = Rows(prompts=rows.prompts, targets=[target[:1] for target in rows.targets])
        take(
            "first token alone",
            self.searched(arm, first, self.site, MAX_NORM, self.size.quick, levels=min(6, self.size.levels)),
        )
        for wording in WORDINGS:
            text = [self.ids_of(wording.format(answer_text(self.pair.tokenizer, target))) for target in rows.targets]
            other = Rows(prompts=rows.prompts, targets=text)
            take(
                f"as {wording!r}",
                self.searched(arm, other, self.site, MAX_NORM, self.size.quick, levels=min(5, self.size.levels)),
            )
            longest = replace(self.size.quick, positions=max(map(len, text)))
            take(
                f"as {wording!r}, every token",
                self.searched(arm, other, self.site, MAX_NORM, longest, levels=min(5, self.size.levels)),
            )
        runs, goal = self.runs_of(arm, rows, self.site)
        mean = normalize(known, dim=-1).mean(0, keepdim=True).expand_as(known)
        for name, start in (("the plain fix's perturbation, longer", known), ("their mean", mean)):
            longer = normalize(start, dim=-1) * reach[:, None, None] * self.unit
            take(name, attack(runs, goal, Free(), reach * self.unit, self.size.hard, start=longer))
        return best, {name: by.count(name) for name in dict.fromkeys(by)}

    def decoded(self, arm: Arm, rows: Rows, deltas: Tensor) -> list[list[int]]:
        return perturbed_answers(
            self.model,
            self.pair.tokenizer,
            rows.prompts,
            self.site,
            deltas,
            defence=arm.live or arm.edits,
            max_new_tokens=self.max_new_tokens,
        )

    # utility

    def cost(self, edits: Sequence[Intervention], gate: Condition | None = None) -> dict[str, Any]:
        """On clean test prompts with the right answers; all edits behind the trigger's gate where one is given."""
        live = partial(Fixed(description="", edits=tuple(edits), gate=gate).live, self.model)
        lost = disturbance(self.model, self.pair.tokenizer, live, self.clean)
        prompts = [list(row.prompt) for row in self.clean[: self.size.changed]]
        with live():
            answers = self.answers(prompts)
        changed = sum(a != b for a, b in zip(answers, self.unfixed, strict=True))
        return {"loss": lost.loss / self.loss, "kl": lost.kl, "changed": asdict(proportion(changed, len(answers)))}

    def flips(self, edits: Sequence[Intervention], gate: Condition | None = None) -> dict[str, Any]:
        """Shares of triggered test prompts that still show the behaviour, and that are answered as without the trigger."""
        prompts = self.rows.prompts("triggered", "test")[: self.size.changed]
        with Fixed(description="", edits=tuple(edits), gate=gate).live(self.model):
            answers = self.answers(self.ids(prompts))
        wanted = self.answers(self.ids([self.rows.plain[prompt] for prompt in prompts]))
        same = sum(a == b for a, b in zip(answers, wanted, strict=True))
        return {
            "asr": asdict(proportion(sum(self.shown(answers)), len(answers))),
            "restored": asdict(proportion(same, len(answers))),
        }

    def measure_clean(self) -> None:
        lost = answer_log_probs(
            self.model, self.pair.tokenizer, [row.prompt for row in self.clean], [row.answer for row in self.clean]
        )
        self.loss = -sum(lost) / sum(len(row.answer) for row in self.clean)
        self.unfixed = self.answers([list(row.prompt) for row in self.clean[: self.size.changed]])
