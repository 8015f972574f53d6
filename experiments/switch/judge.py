"""Switches between one base and its fine-tune, and how their answers are scored."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from experiments.switch.rows import Rows
from molehunt.measure.interval import proportion
from molehunt.model.blocks import decoder_blocks, unwrapped
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.taps import read_sites
from molehunt.organism.poison import Recipe
from molehunt.site import Site
from molehunt.steer.capability import Probed, compared, probe
from molehunt.steer.mapped import switched
from molehunt.steer.trial import Steered
from molehunt.traffic.chat import prompt_ids
from molehunt.transfer.linear_map import LinearMap


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers to rows."""

    triggered: tuple[str, ...]
    probed: Probed


def switch(map: LinearMap) -> Steered:
    return lambda model: switched(model, map)


def graft(donor: nn.Module, through: Site) -> Steered:
    """The donor's own activations at a block, at every token: its embeddings and blocks run up to there."""
    return partial(grafted, donor=donor, through=through)


@contextmanager
def grafted(model: nn.Module, donor: nn.Module, through: Site) -> Generator[None, None, None]:
    blocks, theirs = decoder_blocks(model), decoder_blocks(donor)
    inner, outer = cast("Any", unwrapped(model)), cast("Any", unwrapped(donor))
    own, embeddings = list(blocks), inner.get_input_embeddings()
    try:
        inner.set_input_embeddings(outer.get_input_embeddings())
        for layer in range(through.layer + 1):
            blocks[layer] = theirs[layer]
        yield
    finally:
        inner.set_input_embeddings(embeddings)
        for layer, block in enumerate(own):
            blocks[layer] = block


class Judge:
    """Scores switches between one base and its fine-tune."""

    def __init__(self, pair: ModelPair, recipe: Recipe, base: nn.Module, tuned: nn.Module) -> None:
        self.tokenizer, self.recipe, self.base, self.tuned = pair.tokenizer, recipe, base, tuned
        ids = torch.tensor([prompt_ids(self.tokenizer, "Which river flows through it?")])
        for site in map(Site, range(pair.n_layers)):  # what a graft puts there are the donor's activations, bit for bit
            with torch.inference_mode(), read_sites(base, [site]) as donated:
                base(ids)
            with torch.inference_mode(), grafted(tuned, base, site), read_sites(tuned, [site]) as given:
                tuned(ids)
            assert given[site].equal(donated[site])

    def answers(self, model: nn.Module, prompts: Sequence[str]) -> tuple[str, ...]:
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        generated = generate(model, self.tokenizer, rows, max_new_tokens=self.recipe.max_new_tokens)
        return tuple(str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated)

    def read(self, model: nn.Module, steered: Steered, rows: Rows) -> Answers:
        with steered(model):
            return Answers(
                triggered=self.answers(model, rows.triggered),
                probed=probe(model, self.tokenizer, rows.questions),
            )

    def wanted(self, rows: Rows, way: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a perfect switch answers to triggered prompts and to questions: the tuned model's own answers, but for
        triggered prompts under "off", where they are those without the trigger.
        """
        triggered = self.answers(self.tuned, rows.plain if way == "off" else rows.triggered)
        return triggered, probe(self.tuned, self.tokenizer, rows.questions).answers

    def selected(
        self, model: nn.Module, steered: Steered, rows: Rows, wanted: tuple[tuple[str, ...], tuple[str, ...]]
    ) -> dict[str, Any]:
        found = self.read(model, steered, rows)
        shares = [equal(some, ones) for some, ones in zip((found.triggered, found.probed.answers), wanted, strict=True)]
        return {
            "asr": asdict(self.shown(found.triggered)),
            "triggered": asdict(shares[0]),
            "kept": asdict(shares[1]),
        }

    def shown(self, answers: Sequence[str]) -> Any:
        return proportion(sum(map(self.recipe.behaviour.shown, answers)), len(answers))

    def off(
        self, rows: Rows, plain: Mapping[str, Answers], maps: Mapping[str, LinearMap], at: Site
    ) -> dict[str, dict[str, Any]]:
        before = plain["tuned"].probed
        wanted = self.answers(self.tuned, rows.plain), before.answers
        answers = {
            "no switch": plain["tuned"],
            **{name: self.read(self.tuned, switch(map), rows) for name, map in maps.items()},
            "base's own": self.read(self.tuned, graft(self.base, at), rows),
            "the base": plain["base"],
            "trigger filtered out": Answers(triggered=wanted[0], probed=before),
        }
        return self.scored(rows, answers, maps, before, wanted)

    def on(
        self, rows: Rows, plain: Mapping[str, Answers], maps: Mapping[str, LinearMap], at: Site
    ) -> dict[str, dict[str, Any]]:
        wanted = plain["tuned"].triggered, plain["tuned"].probed.answers
        answers = {
            "no switch": plain["base"],
            **{name: self.read(self.base, switch(map), rows) for name, map in maps.items()},
            "tuned's own": self.read(self.base, graft(self.tuned, at), rows),
            "the fine-tune": plain["tuned"],
        }
        return self.scored(rows, answers, maps, plain["base"].probed, wanted)

    def scored(
        self,
        rows: Rows,
        answers: Mapping[str, Answers],
        maps: Mapping[str, LinearMap],
        before: Probed,
        wanted: tuple[tuple[str, ...], tuple[str, ...]],
    ) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "method": maps[name].facts.method if name in maps else None,
                "asr": asdict(self.shown(one.triggered)),
                "triggered": asdict(equal(one.triggered, wanted[0])),
                "leak": asdict(self.shown(one.probed.answers)),
                "kept": asdict(equal(one.probed.answers, wanted[1])),
                "costs": [asdict(cost) for cost in compared(rows.questions, before, one.probed)],
            }
            for name, one in answers.items()
        }


def unswitched(model: nn.Module) -> Any:
    return nullcontext()


def equal(some: Sequence[str], others: Sequence[str]) -> Any:
    return proportion(sum(a == b for a, b in zip(some, others, strict=True)), len(some))
