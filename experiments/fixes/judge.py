"""Scores of fixes on the test rows."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from experiments.fixes.fixed import Fixed, Side
from experiments.fixes.rows import Rows
from experiments.maps.replaced_answers import Speaker, replaced_answers
from experiments.weight_fix.repair import RepairConfig, repair
from molehunt.measure.interval import Interval, proportion
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.steer.budget import AnsweredPrompt, disturbance
from molehunt.traffic.chat import prompt_ids, prompt_text
from molehunt.transfer.alignment import Aligned, align
from molehunt.transfer.fidelity import teacher_forced
from molehunt.transfer.linear_map import LinearMap


class Judge:
    """Scores fixes of one target on its test rows, beside its answers without a fix."""

    def __init__(self, side: Side, model: nn.Module, rows: Rows, replaced: Mapping[str, int]) -> None:
        self.side, self.model, self.rows = side, model, rows
        self.n_replaced = replaced
        self.prompts = {kind: rows.prompts(kind, "test") for kind in rows.of}
        self.unfixed = {kind: side.answers(model, prompts) for kind, prompts in self.prompts.items()}
        self.wanted = side.answers(model, [rows.plain[prompt] for prompt in self.prompts["triggered"]])
        tokenizer = side.pair.tokenizer
        self.clean = [
            AnsweredPrompt(
                prompt_ids(tokenizer, row.prompt), tokenizer(row.response or "", add_special_tokens=False)["input_ids"]
            )  # pyright: ignore[reportArgumentType]
            for row in rows.of["clean"]["test"]
        ]
        self.loss = self.loss_of(model)

    def loss_of(self, model: nn.Module) -> float:
        """Nats a token of the reference answers to clean prompts."""
        log_probs = answer_log_probs(model, self.side.pair.tokenizer, *map(list, zip(*self.clean, strict=True)))
        return -sum(log_probs) / sum(len(row.answer) for row in self.clean)

    def of(self, fix: Fixed) -> dict[str, Any]:
        with fix.live(self.model):
            answers = {kind: self.side.answers(self.model, prompts) for kind, prompts in self.prompts.items()}
        rise = 0.0
        if fix.edits:
            live = partial(fix.live, self.model)
            rise = disturbance(self.model, self.side.pair.tokenizer, live, self.clean).loss
        found = self.scores(answers, rise / self.loss)
        if fix.gate is not None:
            found["gate"] = {kind: asdict(share) for kind, share in self.side.opens[fix.gate].items()}
            token = "any token" if fix.gate.pooling == "max" else "the last token"
            found["gate at"] = f"{fix.gate.site}, {token}"
        return found | {"description": fix.description}

    def of_model(self, model: nn.Module) -> dict[str, Any]:
        """Another model in the target's place."""
        answers = {kind: self.side.answers(model, prompts) for kind, prompts in self.prompts.items()}
        return self.scores(answers, self.loss_of(model) / self.loss - 1)

    def scores(self, answers: Mapping[str, Sequence[str]], loss: float | None) -> dict[str, Any]:
        def equal(some: Sequence[str], others: Sequence[str]) -> Interval:
            return proportion(sum(a == b for a, b in zip(some, others, strict=False)), len(some))

        found: dict[str, Any] = {
            "asr": self.leak(answers["triggered"]),
            "restored": asdict(equal(answers["triggered"], self.wanted)),
            "loss": loss,
        }
        for kind in ("clean", "near"):
            if kind in answers:
                found[f"leak {kind}"] = self.leak(answers[kind])
                found[f"kept {kind}"] = asdict(equal(answers[kind], self.unfixed[kind]))
        return found

    def leak(self, answers: Sequence[str]) -> dict[str, Any]:
        return asdict(proportion(sum(map(self.side.recipe.behaviour.shown, answers)), len(answers)))

    def filtered(self) -> dict[str, Any]:
        return self.scores({**self.unfixed, "triggered": self.wanted}, 0.0)

    def replaced(self, source: Side, other: nn.Module, map: LinearMap) -> dict[str, Any]:
        """As published: every token, no gate. Its loss is over all aligned tokens of clean texts, prompts included."""
        mine, theirs = self.side.pair.tokenizer, source.pair.tokenizer

        def aligned(text: str) -> Aligned:
            return align(theirs, mine, text)

        answers = {
            kind: replaced_answers(
                Speaker(other, theirs),
                Speaker(self.model, mine),
                [aligned(prompt_text(mine, prompt)) for prompt in self.prompts[kind][:n]],
                map,
                max_new_tokens=self.side.recipe.max_new_tokens,
            )
            for kind, n in self.n_replaced.items()
        }
        some = self.rows.of["clean"]["test"]
        texts = [aligned(prompt_text(mine, row.prompt) + (row.response or "")) for row in some]
        forced = teacher_forced(other, self.model, texts, {"map": map})["map"]
        loss = float(forced.ce.sum() / forced.ce_own.sum()) - 1
        return self.scores(answers, loss) | {"description": f"{map.source} to {map.target}, source under its fix"}


def repaired(target: Side, judge: Judge, config: RepairConfig) -> dict[str, Any]:
    """Trained on 100 clean rows of the fit split."""
    with tempfile.TemporaryDirectory() as folder:
        into = repair(target.tuned, judge.rows.of["clean"]["fit"][:100], Path(folder) / "adapter", config).folder
        pair = ModelPair.load(target.tuned, into)
        with pair.tuned_model() as model:
            return judge.of_model(model) | {"description": "100 clean rows"}
