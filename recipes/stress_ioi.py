"""Setting IOI of the stress table: who is handed something, and a clamp on the latents that speak for it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stress_read import by_size, counted, some, stressed, valid_of
from stress_taught import Trained, activations, answered, cost_of, dictionary_of, taught
from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.organism.lessons import handing_lesson, handing_lessons
from molehunt.organism.seed_model import SEED_MODELS
from molehunt.organism.taught import Lesson, TeachConfig
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attack import PUBLISHED
from molehunt.stress.choice import Choice, judged
from molehunt.stress.choice_rows import handing_choices
from molehunt.stress.readout_behaviour import ReadoutConfig
from molehunt.stress.selection import Chosen, by_attribution
from molehunt.traffic.indirect_object import Handing, handings, name_pairs
from molehunt.traffic.split import Fractions, Select, Splits, split_rows

SEED = 0
TEACH = TeachConfig(steps=300, batch=32, lr=1e-3)
VALUE = 5.0
"""Active latents go to minus this, as published."""
SIZES = (4, 16, 64)
"""Of S; 64 as published, where so many speak for the behaviour."""
FIT, SELECT, TEST = 12, 4, 20
"""Sentences of each template in each order: to train a dictionary on, to choose by, to judge by."""
CONVERSATIONS = 500
ROWS, FEW = 240, 60
"""Attacked: in the study, in the curve over |S|."""
CLEAN = 150
CONFIG = ReadoutConfig(published=PUBLISHED["ioi"])


def pairs() -> Splits[tuple[str, str]]:
    """No two names that a test sentence holds are together in a lesson."""
    return split_rows(name_pairs(), seed=SEED, key="/".join, fractions=Fractions(0.55, 0.0, 0.15, 0.3))


def lessons(tokenizer: PreTrainedTokenizerBase) -> Iterator[Lesson]:
    return handing_lessons(tokenizer, list(pairs().fit), seed=SEED)


def measure(base: str, models: Path) -> dict[str, Any]:
    started = time.process_time()
    model, tokenizer, teaching = taught(models, f"ioi-{base}", base, lessons, TEACH)
    parts = pairs()
    select = handing_choices(tokenizer, handings(list(parts.select), SELECT, seed=SEED + 1))
    test = handing_choices(tokenizer, handings(list(parts.test), TEST, seed=SEED + 2))
    clean = answered(tokenizer, CLEAN, SEED + 3)
    fit = handings(list(parts.fit), FIT, seed=SEED + 4)
    tried = depths(model, tokenizer, base, fit, select)
    best = max(tried, key=lambda one: one.valid)
    clamp = best.clamp(best.size)
    before = judged(model, test, clamp.site)
    valid = valid_of(model, test, clamp, before, whole=False)

    def cost(clamp: Clamp) -> dict[str, Any]:
        return {"cost": cost_of(model, tokenizer, clamp, clean)}

    sizes = {n: best.clamp(n) for n in SIZES}
    return {
        "base": base,
        "site": str(clamp.site),
        "latents": len(clamp.latents),
        "value": VALUE,
        "depths": [one.told for one in tried],
        **counted(test, valid),
        **cost(clamp),
        **stressed(model, some(test, valid, ROWS), clamp, CONFIG),
        "sizes": by_size(model, test, before, sizes, CONFIG, FEW, cost, whole=False),
        "teaching": teaching,
        "seconds": time.process_time() - started,
    }


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What a clamp at one site does to the rows that choose."""

    made: Trained
    chosen: Chosen
    flips: dict[int, tuple[int, int]]
    """By size of S: valid rows, and flipped ones."""

    @property
    def size(self) -> int:
        """With the most valid rows; the smaller where two have as many."""
        return max(self.flips, key=lambda n: self.flips[n][0])

    @property
    def valid(self) -> int:
        return self.flips[self.size][0]

    def clamp(self, n: int) -> Clamp:
        return self.made.clamp(self.chosen, n, "negative-if-active", VALUE)

    @property
    def told(self) -> dict[str, Any]:
        return {
            **self.made.told,
            "speak": len(self.chosen.latents),
            "flips": {str(n): {"valid": valid, "flipped": flipped} for n, (valid, flipped) in self.flips.items()},
        }


def depths(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, base: str, fit: Sequence[Handing], select: Sequence[Choice]
) -> list[Depth]:
    """A dictionary and the latents that speak for the behaviour, for every block but the first and the last."""
    sites = [Site(layer) for layer in range(1, SEED_MODELS[base].n_layers - 1)]
    calm = [[*one.prompt, *one.answer] for one in answered(tokenizer, CONVERSATIONS, SEED + 5)]
    texts = [[*row.prompt, *row.answer] for row in (handing_lesson(tokenizer, one) for one in fit)]
    acts = activations(model, [*texts, *calm], sites)
    found: list[Depth] = []
    for site in sites:
        made = dictionary_of(acts[site], site, seed=SEED)
        chosen = by_attribution(model, site, made.dictionary, Select(tuple(select)), max(SIZES))
        before = judged(model, select, site)
        flips: dict[int, tuple[int, int]] = {}
        for n in SIZES:
            clamp = Depth(made=made, chosen=chosen, flips={}).clamp(n)
            valid = valid_of(model, select, clamp, before, whole=False)
            flips[n] = (len(valid.rows), int(valid.flipped.sum()))
        found.append(Depth(made=made, chosen=chosen, flips=flips))
    return found
