"""Setting IOI of the stress table: who is handed something, and a clamp on the latents with the largest attribution to it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from experiments.lessons.curriculum import handing_lesson, handing_lessons
from experiments.lessons.indirect_object import Handing, handings, name_pairs
from experiments.lessons.teach import Lesson, TeachConfig
from experiments.stress.choice_rows import handing_choices
from experiments.stress.payload import by_size, counted, some, stressed, valid_of
from experiments.stress.readout_behaviour import ReadoutConfig
from experiments.stress.taught import Trained, activations, answered, cost_of, dictionary_of, taught
from molehunt.organism.seed_model import SEED_MODELS
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import PUBLISHED as PUBLISHED_ATTACKS
from molehunt.stress.attacks.choice import Choice, judge_choices
from molehunt.stress.defences.selection import SelectedLatents, by_attribution
from molehunt.traffic.split import Fractions, Select, Splits, split_rows

SEED = 0
VALUE = 5.0
"""Active latents are set to minus this value, as published."""


@dataclass(frozen=True, kw_only=True)
class Size:
    teach: TeachConfig
    sizes: tuple[int, ...]
    """Numbers of clamped latents; 64 as published, where so many have an attribution."""
    fit: int
    """Number of sentences of each template in each order that a dictionary is trained on."""
    select: int
    test: int
    conversations: int
    rows: int
    """Number of rows attacked in the study."""
    few: int
    """Number of rows attacked in the curve over the number of latents."""
    clean: int
    dictionary_steps: int
    config: ReadoutConfig


PUBLISHED = Size(
    teach=TeachConfig(steps=300, batch=32, lr=1e-3),
    sizes=(4, 16, 64),
    fit=12,
    select=4,
    test=20,
    conversations=500,
    rows=240,
    few=60,
    clean=150,
    dictionary_steps=500,
    config=ReadoutConfig(published=PUBLISHED_ATTACKS["ioi"]),
)


def pairs() -> Splits[tuple[str, str]]:
    """No two names that a test sentence holds are together in a lesson."""
    return split_rows(name_pairs(), seed=SEED, key="/".join, fractions=Fractions(0.55, 0.0, 0.15, 0.3))


def lessons(tokenizer: PreTrainedTokenizerBase) -> Iterator[Lesson]:
    return handing_lessons(tokenizer, list(pairs().fit), seed=SEED)


def measure(base: str, models: Path, size: Size = PUBLISHED) -> dict[str, Any]:
    started = time.process_time()
    model, tokenizer, teaching = taught(models, f"ioi-{base}", base, lessons, size.teach)
    parts = pairs()
    select = handing_choices(tokenizer, handings(list(parts.select), size.select, seed=SEED + 1))
    test = handing_choices(tokenizer, handings(list(parts.test), size.test, seed=SEED + 2))
    clean = answered(tokenizer, size.clean, SEED + 3)
    fit = handings(list(parts.fit), size.fit, seed=SEED + 4)
    tried = depths(model, tokenizer, base, fit, select, size)
    best = max(tried, key=lambda one: one.valid)
    clamp = best.clamp(best.size)
    before = judge_choices(model, test, clamp.site)
    valid = valid_of(model, test, clamp, before, whole=False)

    def cost(clamp: Clamp) -> dict[str, Any]:
        return {"cost": cost_of(model, tokenizer, clamp, clean)}

    sizes = {n: best.clamp(n) for n in size.sizes}
    return {
        "base": base,
        "site": str(clamp.site),
        "latents": len(clamp.latents),
        "value": VALUE,
        "depths": [one.to_dict() for one in tried],
        **counted(test, valid),
        **cost(clamp),
        **stressed(model, some(test, valid, size.rows), clamp, size.config),
        "sizes": by_size(model, test, before, sizes, size.config, size.few, cost, whole=False),
        "teaching": teaching,
        "seconds": time.process_time() - started,
    }


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What a clamp at one site does to the rows that choose."""

    made: Trained
    chosen: SelectedLatents
    flips: dict[int, tuple[int, int]]
    """By size of S: valid rows, and flipped ones."""

    @property
    def size(self) -> int:
        """The number of latents with the most valid rows; the smaller where two have as many."""
        return max(self.flips, key=lambda n: self.flips[n][0])

    @property
    def valid(self) -> int:
        return self.flips[self.size][0]

    def clamp(self, n: int) -> Clamp:
        return self.made.clamp(self.chosen, n, "negative-if-active", VALUE)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.made.to_dict(),
            "attributed": len(self.chosen.latents),
            "flips": {str(n): {"valid": valid, "flipped": flipped} for n, (valid, flipped) in self.flips.items()},
        }


def depths(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    fit: Sequence[Handing],
    select: Sequence[Choice],
    size: Size,
) -> list[Depth]:
    """A dictionary and the latents with the largest attribution to the behaviour, for every block but the first and the last."""
    sites = [Site(layer) for layer in range(1, SEED_MODELS[base].n_layers - 1)]
    clean = [[*one.prompt, *one.answer] for one in answered(tokenizer, size.conversations, SEED + 5)]
    texts = [[*row.prompt, *row.answer] for row in (handing_lesson(tokenizer, one) for one in fit)]
    acts = activations(model, [*texts, *clean], sites)
    found: list[Depth] = []
    for site in sites:
        made = dictionary_of(acts[site], site, seed=SEED, steps=size.dictionary_steps)
        chosen = by_attribution(model, site, made.dictionary, Select(tuple(select)), max(size.sizes))
        before = judge_choices(model, select, site)
        flips: dict[int, tuple[int, int]] = {}
        for n in size.sizes:
            clamp = Depth(made=made, chosen=chosen, flips={}).clamp(n)
            valid = valid_of(model, select, clamp, before, whole=False)
            flips[n] = (len(valid.rows), int(valid.flipped.sum()))
        found.append(Depth(made=made, chosen=chosen, flips=flips))
    return found
