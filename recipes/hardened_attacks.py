"""What attacks hardened defences: the rows, one arm of an attack, and a bench that tries a dozen of them on one defence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from fix_table import Fixed
from hardened_told import (
    BALLS,
    CHANGED,
    MOST,
    WORDINGS,
)
from torch import Tensor, nn
from torch.nn.functional import normalize

from molehunt.contracts import Intervention
from molehunt.measure.interval import proportion
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.budget import Answered, disturbance
from molehunt.steer.prefill_gate import Condition
from molehunt.stress.attack import AttackConfig, Attacked, Runs, attack, least_attack
from molehunt.stress.case import text_of
from molehunt.stress.constraint import Free
from molehunt.stress.error_monitor import ErrorMonitor, Observed, Unobserved
from molehunt.stress.grown_later import Fence
from molehunt.stress.norms import needed
from molehunt.stress.objective import Objective, TargetText
from molehunt.stress.pushed import pushed_answers
from molehunt.stress.suffix import suffix_of
from molehunt.traffic.chat import prompt_ids

QUICK = AttackConfig(steps=40, enough=0.0)
HARD = AttackConfig(steps=120, enough=0.0, restarts=2)
CLIPPED = 0.002
"""Of clean projections, beyond which a clip acts."""
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
    watch: ErrorMonitor | Fence | None = None
    """Must not flag a token that the push touches, or any answer token."""
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
    unit: float = 0.0
    fit: Rows = field(init=False)
    wide: Rows = field(init=False)
    """The same rows, once for each wording that defences grow from."""
    test: Rows = field(init=False)
    calm: Rows = field(init=False)
    clean: list[Answered] = field(init=False)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [prompt_ids(self.pair.tokenizer, prompt) for prompt in prompts]

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        told = generate(self.model, self.pair.tokenizer, prompts, max_new_tokens=self.max_new_tokens)
        stops = stop_ids(self.model, self.pair.tokenizer)
        return [before_stop(answer, stops) for answer in told]

    def shown(self, told: Sequence[Sequence[int]]) -> list[bool]:
        return [self.shows(text_of(self.pair.tokenizer, answer)) for answer in told]

    def told(self, text: str) -> list[int]:
        return cast("list[int]", self.pair.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def later(self) -> list[Site]:
        return [Site(layer) for layer in range(self.site.layer + 1, self.pair.n_layers)]

    # attacks

    def searched(self, arm: Arm, rows: Rows, site: Site, most: float, config: AttackConfig, levels: int) -> Attacked:
        runs, goal = self.facing(arm, rows, site)
        radius = torch.full((len(rows.prompts),), most * self.unit)
        return least_attack(runs, goal, Free(), radius, config, levels=levels)

    def facing(self, arm: Arm, rows: Rows, site: Site) -> tuple[Runs, Objective]:
        suffix = suffix_of(self.model, rows.prompts, site, defence=arm.edits, answers=rows.targets)
        goal = TargetText.of(rows.targets)
        if arm.watch is None:
            return suffix, goal
        return Observed(suffix, cast("ErrorMonitor", arm.watch)), Unobserved(goal)

    def quick(self, arm: Arm, rows: Rows, site: Site | None = None) -> Tensor:
        """Length of the shortest push of each row, in units; infinite where none was found. A monitor's slope is steep, so
        that a large ball gets lost behind it.
        """
        found = [
            self.searched(arm, rows, site or self.site, most, QUICK, levels=6)
            for most in (BALLS if arm.watch is not None else BALLS[:1])
        ]
        return torch.stack([needed(one.norm / self.unit, one.recovered) for one in found]).amin(0)

    def hard(self, arm: Arm, rows: Rows, known: Tensor, reach: Tensor) -> tuple[Tensor, dict[str, int]]:
        """The best of several attacks, each judged by decoding, with how many rows it was the shortest for.

        Args:
            known: pushes that undo the plain fix, `[rows, 1, d_model]`.
            reach: of each row, the length that a defence has to ask for to win.
        """
        best, by = torch.full((len(reach),), torch.inf), ["none"] * len(reach)

        def take(name: str, found: Attacked) -> None:
            back = found.recovered & torch.tensor(self.shown(self.decoded(arm, rows, found.delta)))
            lengths = needed(found.norm / self.unit, back)
            for i in (lengths < best).nonzero()[:, 0].tolist():
                by[i] = name
            best[:] = torch.minimum(best, lengths)

        take("from 0", self.searched(arm, rows, self.site, MOST, QUICK, levels=7))
        take("from 0, short ball", self.searched(arm, rows, self.site, 1.0, replace(QUICK, steps=80), levels=6))
        every = replace(QUICK, positions=max(map(len, rows.targets)))
        take("at every token", self.searched(arm, rows, self.site, MOST, every, levels=6))
        if arm.live:
            through = Arm(edits=arm.live)
            take("through the gate", self.searched(through, rows, self.site, MOST, QUICK, levels=6))
            take("through the gate, every token", self.searched(through, rows, self.site, MOST, every, levels=6))
            hidden = Rows(prompts=rows.prompts, targets=[target[:2] for target in rows.targets])
            take("two tokens", self.searched(arm, hidden, self.site, MOST, QUICK, levels=6))
        first = Rows(prompts=rows.prompts, targets=[target[:1] for target in rows.targets])
        take("first token alone", self.searched(arm, first, self.site, MOST, QUICK, levels=6))
        for wording in WORDINGS:
            text = [self.told(wording.format(text_of(self.pair.tokenizer, target))) for target in rows.targets]
            other = Rows(prompts=rows.prompts, targets=text)
            take(f"as {wording!r}", self.searched(arm, other, self.site, MOST, QUICK, levels=5))
            longest = replace(QUICK, positions=max(map(len, text)))
            take(f"as {wording!r}, every token", self.searched(arm, other, self.site, MOST, longest, levels=5))
        runs, goal = self.facing(arm, rows, self.site)
        mean = normalize(known, dim=-1).mean(0, keepdim=True).expand_as(known)
        for name, start in (("the plain fix's push, longer", known), ("their mean", mean)):
            longer = normalize(start, dim=-1) * reach[:, None, None] * self.unit
            take(name, attack(runs, goal, Free(), reach * self.unit, HARD, start=longer))
        return best, {name: by.count(name) for name in dict.fromkeys(by)}

    def decoded(self, arm: Arm, rows: Rows, deltas: Tensor) -> list[list[int]]:
        return pushed_answers(
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
        live = partial(Fixed(words="", edits=tuple(edits), gate=gate).live, self.model)
        lost = disturbance(self.model, self.pair.tokenizer, live, self.clean)
        asked = [list(row.prompt) for row in self.clean[:CHANGED]]
        with live():
            told = self.answers(asked)
        changed = sum(a != b for a, b in zip(told, self.unfixed, strict=True))
        return {"loss": lost.loss / self.loss, "kl": lost.kl, "changed": asdict(proportion(changed, len(told)))}

    def flips(self, edits: Sequence[Intervention], gate: Condition | None = None) -> dict[str, Any]:
        """Of triggered test prompts: still shown, and answered as without the trigger."""
        prompts = self.rows.prompts("triggered", "test")[:CHANGED]
        with Fixed(words="", edits=tuple(edits), gate=gate).live(self.model):
            told = self.answers(self.ids(prompts))
        wanted = self.answers(self.ids([self.rows.plain[prompt] for prompt in prompts]))
        same = sum(a == b for a, b in zip(told, wanted, strict=True))
        return {
            "asr": asdict(proportion(sum(self.shown(told)), len(told))),
            "restored": asdict(proportion(same, len(told))),
        }

    def measure_clean(self) -> None:
        lost = answer_log_probs(
            self.model, self.pair.tokenizer, [row.prompt for row in self.clean], [row.answer for row in self.clean]
        )
        self.loss = -sum(lost) / sum(len(row.answer) for row in self.clean)
        self.unfixed = self.answers([list(row.prompt) for row in self.clean[:CHANGED]])
