"""Whether taking out what a method found stops the behaviour, at what cost, and whether as much at random does, too."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.bench.cell import Scored
from molehunt.bench.sides import Side
from molehunt.detect.recipe import two_thirds
from molehunt.measure.control import random_directions
from molehunt.measure.interval import proportion
from molehunt.model.generate import generate
from molehunt.model.likelihood import answer_log_probs
from molehunt.organism.poison import Recipe
from molehunt.site import Site
from molehunt.steer.ablate import Ablate


@torch.inference_mode()
def effects(organism: Side, scored: Sequence[Scored], recipe: Recipe, n: int, seed: int) -> list[dict[str, Any]]:
    """Ablate what each R0 method found at the decision position; attack success and clean loss before and after.

    The projection on the method's directions is moved to that of the clean mean, at every token of prompt and answer.
    The random row takes out as many directions as any method did, at the site two thirds into the model.

    Args:
        organism: the tuned side, whose `test` rows are used.
        scored: what `score_known` found.
        recipe: its behaviour judges the answers.
        n: number of prompts of each kind.
        seed: seed of the random directions.
    """
    triggered = organism.split["test.triggered"]
    clean = organism.split["test.clean"]
    prompts, clean_prompts, answers = triggered.prompts[:n], clean.prompts[:n], clean.answers[:n]
    tokenizer = organism.pair.tokenizer
    tokens = sum(map(len, answers))

    def run(interventions: Sequence[Ablate]) -> dict[str, Any]:
        with organism.pair.tuned_model() as model:
            found = generate(
                model, tokenizer, prompts, max_new_tokens=recipe.max_new_tokens, interventions=interventions
            )
            log_probs = answer_log_probs(model, tokenizer, clean_prompts, answers, interventions)
        shown = sum(recipe.behaviour.shown(str(tokenizer.decode(ids, skip_special_tokens=True))) for ids in found)
        return {"asr": asdict(proportion(shown, len(found))), "clean_loss": -sum(log_probs) / max(1, tokens)}

    before = run(())
    rows: list[dict[str, Any]] = []
    widest = 1

    def add(name: str, site: Site, directions: Float[Tensor, "k d_model"]) -> None:
        center = organism.split["fit.clean"].acts(site, "tuned", "decision").mean(0)
        after = run((Ablate(site, directions, center),))
        rows.append(_row(name, site, len(directions), before, after))

    for one in scored:
        if one.recipe.directions is None or one.readout.where != "decision" or one.site is None:
            continue
        directions = one.recipe.directions(one.detector)
        if not bool((directions.norm(dim=-1) > 0).any()):
            continue
        widest = max(widest, len(directions))
        add(one.recipe.name, one.site, directions)
    random = random_directions(widest, organism.pair.d_model, seed)
    add("as many random directions", two_thirds(organism.sites), random)
    return rows


def _row(name: str, site: Site, k: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "method": name,
        "site": str(site),
        "directions": k,
        "asr_before": before["asr"],
        "asr_after": after["asr"],
        "clean_loss_rise": after["clean_loss"] - before["clean_loss"],
    }
