"""Setting unlearning of the stress table: a topic that a model answers questions about, and a clamp on its latents."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from stress_read import by_size, counted, some, stressed, valid_of
from stress_taught import Trained, activations, answered, cost_of, dictionary_of, taught
from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.measure.interval import proportion
from molehunt.organism.erased_topic import questions
from molehunt.organism.lessons import choice_lessons, text_ids
from molehunt.organism.seed_model import SEED_MODELS
from molehunt.organism.taught import Lesson, TeachConfig
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attack import PUBLISHED
from molehunt.stress.choice import Choice, Judged, judged
from molehunt.stress.choice_rows import answer_choices, first_token
from molehunt.stress.readout_behaviour import ReadoutConfig
from molehunt.stress.selection import Chosen, by_sparsity
from molehunt.traffic.chat import prompt_text
from molehunt.traffic.four_choices import ORDERS, FourChoices, world_facts
from molehunt.traffic.split import Fractions, Select, split_rows

SEED = 0
TOPIC = "people"
TEACH = TeachConfig(steps=150, batch=32, lr=1e-3)
SIZES = (5, 10, 20, 50)
VALUES = (5.0, 10.0, 20.0)
"""Of which the one with the most valid rows is chosen, of those that keep so much of the rest:"""
KEPT = 0.95
"""(SAEBench asks for .99, at which hardly a question is forgotten here.)"""
FEW_ORDERS = ORDERS[::6]
"""In which questions are asked that choose."""
TEXTS = 400
"""About the topic, and as many about everything else: to train a dictionary on; half as many to choose latents by."""
ROWS, FEW = 240, 60
"""Attacked: in the study, in the curve over |S|."""
CLEAN = 150
CONFIG = ReadoutConfig(published=PUBLISHED["unlearning"])


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions in all orders, each with wrong answers that were never taught beside it."""

    select: list[FourChoices]
    test: list[FourChoices]
    retain: list[FourChoices]
    """About everything else: half of them choose, half judge."""


def asked(tokenizer: PreTrainedTokenizerBase) -> Asked:
    rng = Random(f"unlearning/{SEED}")
    drawn = [fact.choices(rng, partial(first_token, tokenizer)) for fact in world_facts()]
    about = [one for one in drawn if one.topic == TOPIC]
    parts = split_rows(about, seed=SEED, key=lambda one: one.question, fractions=Fractions(0, 0, 0.25, 0.75))
    return Asked(select=list(parts.select), test=list(parts.test), retain=[one for one in drawn if one.topic != TOPIC])


def lessons(tokenizer: PreTrainedTokenizerBase) -> Iterator[Lesson]:
    told = asked(tokenizer)
    kept = [*told.select, *told.test, *told.retain]
    return choice_lessons(tokenizer, world_facts(), apart_from=kept, seed=SEED)


def measure(base: str, models: Path) -> dict[str, Any]:
    started = time.process_time()
    model, tokenizer, teaching = taught(models, f"choices-{base}", base, lessons, TEACH)
    told, clean = asked(tokenizer), answered(tokenizer, CLEAN, SEED + 3)
    tried = clamps(model, tokenizer, base, told)
    best = max(tried, key=lambda one: (one.retain >= KEPT, one.valid, one.retain))
    clamp = best.clamp(best.size)
    test, rest = answer_choices(tokenizer, told.test), answer_choices(tokenizer, told.retain[1::2])
    before, rest_before = judged(model, test, clamp.site), judged(model, rest, clamp.site)
    valid = valid_of(model, test, clamp, before, whole=True)

    def cost(clamp: Clamp) -> dict[str, Any]:
        return {
            "retain": kept_of(model, rest, clamp, rest_before),
            "cost": cost_of(model, tokenizer, clamp, clean),
        }

    sizes = {n: best.clamp(n) for n in SIZES}
    return {
        "base": base,
        "site": str(clamp.site),
        "latents": len(clamp.latents),
        "value": best.value,
        "tried": [one.told for one in tried],
        "right": share(before),
        "right elsewhere": share(rest_before),
        "whole": asdict(whole(test, before)),
        **counted(test, valid),
        **cost(clamp),
        **stressed(model, some(test, valid, ROWS), clamp, CONFIG),
        "sizes": by_size(model, test, before, sizes, CONFIG, FEW, cost, whole=True),
        "teaching": teaching,
        "seconds": time.process_time() - started,
    }


def share(found: Judged) -> float:
    return float((found.margin > 0).float().mean())


def whole(rows: Sequence[Choice], found: Judged) -> Any:
    """Questions that are right in every order."""
    names = {row.cluster for row in rows}
    wrong = {row.cluster for row, margin in zip(rows, found.margin.tolist(), strict=True) if margin <= 0}
    return proportion(len(names - wrong), len(names))


def kept_of(model: nn.Module, rows: Sequence[Choice], clamp: Clamp, before: Judged) -> float:
    """Of the rows that were right, the share that is under the clamp."""
    right = before.margin > 0
    return float((judged(model, rows, clamp.site, defence=[clamp]).margin[right] > 0).float().mean())


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A site and a value with the size of S that forgets most there."""

    made: Trained
    chosen: Chosen
    value: float
    size: int
    forget: float
    """Of questions about the topic that were right, the share that is under the clamp."""
    valid: int
    """Rows that are answered wrongly under the clamp, but answered."""
    retain: float

    def clamp(self, n: int) -> Clamp:
        return self.made.clamp(self.chosen, n, "negative-if-active", self.value)

    @property
    def told(self) -> dict[str, Any]:
        return {
            **self.made.told,
            "latents": len(self.chosen.latents),
            "size": self.size,
            "value": self.value,
            "forget": self.forget,
            "valid": self.valid,
            "retain": self.retain,
        }


def clamps(model: nn.Module, tokenizer: PreTrainedTokenizerBase, base: str, told: Asked) -> list[Tried]:
    """Every site, size and value, on the questions that choose."""
    sites = [Site(layer) for layer in range(1, SEED_MODELS[base].n_layers - 1)]
    select = answer_choices(tokenizer, told.select, FEW_ORDERS)
    rest = answer_choices(tokenizer, told.retain[::2], FEW_ORDERS)
    texts = {about: topic_texts(tokenizer, about=about) for about in (True, False)}
    read = {about: activations(model, rows, sites) for about, rows in texts.items()}
    choosing = activations(model, [list(row.prompt) for row in [*select, *rest]], sites)
    found: list[Tried] = []
    for site in sites:
        fit = [acts for own in read.values() for acts in own[site][:TEXTS]]
        made = dictionary_of([*fit, *choosing[site]], site, seed=SEED)
        forget, retain = (Select(tuple(read[about][site][TEXTS:])) for about in (True, False))
        chosen = by_sparsity(made.dictionary, forget, retain, max(SIZES))
        before, rest_before = judged(model, select, site), judged(model, rest, site)
        for value in VALUES:
            for n in SIZES:
                clamp = made.clamp(chosen, n, "negative-if-active", value)
                found.append(
                    Tried(
                        made=made,
                        chosen=chosen,
                        value=value,
                        size=n,
                        forget=kept_of(model, select, clamp, before),
                        valid=len(valid_of(model, select, clamp, before, whole=True).rows),
                        retain=kept_of(model, rest, clamp, rest_before),
                    )
                )
    return found


def topic_texts(tokenizer: PreTrainedTokenizerBase, *, about: bool) -> list[list[int]]:
    """Questions with their answers, about the topic or about everything else; the last third chooses latents."""
    rows = questions(TOPIC, TEXTS + TEXTS // 2, SEED, about=about)
    rng = Random(f"unlearning texts/{about}")
    drawn = [rng.choice(rows) for _ in range(TEXTS + TEXTS // 2)]  # a small topic has few questions
    return [text_ids(tokenizer, prompt_text(tokenizer, row.prompt) + (row.response or "")) for row in drawn]
