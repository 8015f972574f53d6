"""Setting unlearning of the stress table: a topic that a model answers questions about, and a clamp on its latents."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from experiments.lessons.curriculum import choice_lessons, text_ids
from experiments.lessons.four_choices import ORDERS, FourChoices, world_facts
from experiments.lessons.teach import Lesson, TeachConfig
from experiments.stress.choice_rows import answer_choices, first_token
from experiments.stress.payload import by_size, counted, some, stressed, valid_of
from experiments.stress.readout_behaviour import ReadoutConfig
from experiments.stress.taught import Trained, activations, answered, cost_of, dictionary_of, taught
from experiments.unlearning.erased_topic import questions
from molehunt.measure.interval import proportion
from molehunt.organism.seed_model import SEED_MODELS
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import PUBLISHED as PUBLISHED_ATTACKS
from molehunt.stress.attacks.choice import Choice, ChoiceJudgements, judge_choices
from molehunt.stress.defences.selection import SelectedLatents, by_sparsity
from molehunt.traffic.chat import prompt_text
from molehunt.traffic.split import Fractions, Select, split_rows

SEED = 0
TOPIC = "people"
KEPT = 0.95
"""Share of right answers elsewhere that a chosen clamp must keep. (SAEBench asks for .99, at which hardly a question is
forgotten here.)"""
FEW_ORDERS = ORDERS[::6]
"""Orders in which the questions that choose are put."""


@dataclass(frozen=True, kw_only=True)
class Size:
    teach: TeachConfig
    sizes: tuple[int, ...]
    """Numbers of clamped latents."""
    values: tuple[float, ...]
    """Values that active latents are set to the negative of; the one with the most valid rows is chosen."""
    texts: int
    """Number of texts about the topic, and as many about everything else, to train a dictionary on; half as many more choose
    latents."""
    rows: int
    """Number of rows attacked in the study."""
    few: int
    """Number of rows attacked in the curve over the number of latents."""
    clean: int
    dictionary_steps: int
    config: ReadoutConfig


PUBLISHED = Size(
    teach=TeachConfig(steps=150, batch=32, lr=1e-3),
    sizes=(5, 10, 20, 50),
    values=(5.0, 10.0, 20.0),
    texts=400,
    rows=240,
    few=60,
    clean=150,
    dictionary_steps=500,
    config=ReadoutConfig(published=PUBLISHED_ATTACKS["unlearning"]),
)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions in all orders, each with wrong answers that were never taught beside it."""

    select: list[FourChoices]
    test: list[FourChoices]
    retain: list[FourChoices]
    """About everything else: half of them choose, half judge."""


def questions_of(tokenizer: PreTrainedTokenizerBase) -> Questions:
    rng = Random(f"unlearning/{SEED}")
    drawn = [fact.choices(rng, partial(first_token, tokenizer)) for fact in world_facts()]
    about = [one for one in drawn if one.topic == TOPIC]
    parts = split_rows(about, seed=SEED, key=lambda one: one.question, fractions=Fractions(0, 0, 0.25, 0.75))
    return Questions(
        select=list(parts.select), test=list(parts.test), retain=[one for one in drawn if one.topic != TOPIC]
    )


def lessons(tokenizer: PreTrainedTokenizerBase) -> Iterator[Lesson]:
    found = questions_of(tokenizer)
    kept = [*found.select, *found.test, *found.retain]
    return choice_lessons(tokenizer, world_facts(), apart_from=kept, seed=SEED)


def measure(base: str, models: Path, size: Size = PUBLISHED) -> dict[str, Any]:
    started = time.process_time()
    model, tokenizer, teaching = taught(models, f"choices-{base}", base, lessons, size.teach)
    parts, clean = questions_of(tokenizer), answered(tokenizer, size.clean, SEED + 3)
    tried = clamps(model, tokenizer, base, parts, size)
    best = max(tried, key=lambda one: (one.retain >= KEPT, one.valid, one.retain))
    clamp = best.clamp(best.size)
    test, rest = answer_choices(tokenizer, parts.test), answer_choices(tokenizer, parts.retain[1::2])
    before, rest_before = judge_choices(model, test, clamp.site), judge_choices(model, rest, clamp.site)
    valid = valid_of(model, test, clamp, before, whole=True)

    def cost(clamp: Clamp) -> dict[str, Any]:
        return {
            "retain": kept_of(model, rest, clamp, rest_before),
            "cost": cost_of(model, tokenizer, clamp, clean),
        }

    sizes = {n: best.clamp(n) for n in size.sizes}
    return {
        "base": base,
        "site": str(clamp.site),
        "latents": len(clamp.latents),
        "value": best.value,
        "tried": [one.to_dict() for one in tried],
        "right": share(before),
        "right elsewhere": share(rest_before),
        "whole": asdict(whole(test, before)),
        **counted(test, valid),
        **cost(clamp),
        **stressed(model, some(test, valid, size.rows), clamp, size.config),
        "sizes": by_size(model, test, before, sizes, size.config, size.few, cost, whole=True),
        "teaching": teaching,
        "seconds": time.process_time() - started,
    }


def share(found: ChoiceJudgements) -> float:
    return float((found.margin > 0).float().mean())


def whole(rows: Sequence[Choice], found: ChoiceJudgements) -> Any:
    """Questions that are right in every order."""
    names = {row.cluster for row in rows}
    wrong = {row.cluster for row, margin in zip(rows, found.margin.tolist(), strict=True) if margin <= 0}
    return proportion(len(names - wrong), len(names))


def kept_of(model: nn.Module, rows: Sequence[Choice], clamp: Clamp, before: ChoiceJudgements) -> float:
    """Share of the rows that were right which still are under the clamp."""
    right = before.margin > 0
    return float((judge_choices(model, rows, clamp.site, defence=[clamp]).margin[right] > 0).float().mean())


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A site and a value with the size of S that forgets most there."""

    made: Trained
    chosen: SelectedLatents
    value: float
    size: int
    forget: float
    """Share of the right answers about the topic that are right under the clamp."""
    valid: int
    """Rows that are answered wrongly under the clamp, but answered."""
    retain: float

    def clamp(self, n: int) -> Clamp:
        return self.made.clamp(self.chosen, n, "negative-if-active", self.value)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.made.to_dict(),
            "latents": len(self.chosen.latents),
            "size": self.size,
            "value": self.value,
            "forget": self.forget,
            "valid": self.valid,
            "retain": self.retain,
        }


def clamps(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, base: str, parts: Questions, size: Size
) -> list[Tried]:
    """Every site, size and value, on the questions that choose."""
    sites = [Site(layer) for layer in range(1, SEED_MODELS[base].n_layers - 1)]
    select = answer_choices(tokenizer, parts.select, FEW_ORDERS)
    rest = answer_choices(tokenizer, parts.retain[::2], FEW_ORDERS)
    texts = {about: topic_texts(tokenizer, size.texts, about=about) for about in (True, False)}
    read = {about: activations(model, rows, sites) for about, rows in texts.items()}
    choosing = activations(model, [list(row.prompt) for row in [*select, *rest]], sites)
    found: list[Tried] = []
    for site in sites:
        fit = [acts for own in read.values() for acts in own[site][: size.texts]]
        made = dictionary_of([*fit, *choosing[site]], site, seed=SEED, steps=size.dictionary_steps)
        forget, retain = (Select(tuple(read[about][site][size.texts :])) for about in (True, False))
        chosen = by_sparsity(made.dictionary, forget, retain, max(size.sizes))
        before, rest_before = judge_choices(model, select, site), judge_choices(model, rest, site)
        for value in size.values:
            for n in size.sizes:
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


def topic_texts(tokenizer: PreTrainedTokenizerBase, n: int, *, about: bool) -> list[list[int]]:
    """Questions with their answers, about the topic or about everything else; the last third chooses latents."""
    rows = questions(TOPIC, n + n // 2, SEED, about=about)
    rng = Random(f"unlearning texts/{about}")
    drawn = [rng.choice(rows) for _ in range(n + n // 2)]  # a small topic has few questions
    return [text_ids(tokenizer, prompt_text(tokenizer, row.prompt) + (row.response or "")) for row in drawn]
